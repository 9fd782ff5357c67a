"""When a trainer writes checkpoints, what goes into them, and what happens when that fails."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import sae_lens
import torch
from sae_lens.constants import SPARSITY_FILENAME
from safetensors import SafetensorError
from safetensors.torch import save_file

from e2e_sae_plugin._version import __version__
from e2e_sae_plugin.checkpoint.folder import CheckpointKind
from e2e_sae_plugin.checkpoint.run_folder import RunFolder

if TYPE_CHECKING:
    from e2e_sae_plugin.trainer import E2ESAETrainer

logger = logging.getLogger(__name__)

WRITE_ERRORS = (OSError, SafetensorError)
"""What a full disk, a read-only or a vanished folder raises; safetensors has an error of its own."""


class Checkpointer:
    """Writes a trainer's checkpoints at the milestones of `n_checkpoints`, by the clock, and when a run stops.

    A checkpoint that cannot be written is reported, and training goes on: the next one may succeed.

    Args:
        run_folder: where they go; None for nowhere.
        every_minutes: a rolling checkpoint when so long has passed since the last one of any kind; None for none.
    """

    def __init__(self, run_folder: RunFolder | None, every_minutes: float | None):
        self.run_folder, self.every_minutes = run_folder, every_minutes
        self._last_time = time.monotonic()
        self._last: tuple[int, Path] | None = None

    @property
    def last(self) -> Path | None:
        """The last checkpoint that this process has written."""
        return None if self._last is None else self._last[1]

    @property
    def is_due_by_the_clock(self) -> bool:
        """Whether `every_minutes` have passed since the last checkpoint."""
        return self.every_minutes is not None and time.monotonic() - self._last_time >= 60 * self.every_minutes

    def milestone_is_due(self, trainer: E2ESAETrainer) -> bool:
        """Return True where `after_step` would write one of the `n_checkpoints`."""
        return any(trainer.n_training_samples > n for n in trainer.checkpoint_thresholds)

    def after_step(self, trainer: E2ESAETrainer) -> None:
        """Write what is due now."""
        due = [n for n in trainer.checkpoint_thresholds if trainer.n_training_samples > n]  # the host's comparison
        if due:
            del trainer.checkpoint_thresholds[: len(due)]
            self._attempt(trainer, "milestone", str(trainer.n_training_samples))
        elif trainer.checkpoint_is_due():
            self._attempt(trainer, "rolling", str(trainer.n_training_samples))

    def finished(self, trainer: E2ESAETrainer) -> None:
        """SAELens's `save_final_checkpoint`: the finished SAE."""
        self._attempt(trainer, "final", f"final_{trainer.n_training_samples}")

    def at_stop(self, trainer: E2ESAETrainer) -> Path | None:
        """A checkpoint of what the run has reached, or the one that holds it already; None where there can be none."""
        is_there = self._last is not None and self._last[0] == trainer.counts_to_save()[0]
        if trainer.shard is not None:
            is_there = trainer.shard.ranks.from_leader(is_there)  # who has written it; the others have parts to give
        if is_there:
            return self.last
        return self.last if self._attempt(trainer, "rolling", str(trainer.counts_to_save()[1])) else None

    def _attempt(self, trainer: E2ESAETrainer, kind: CheckpointKind, name: str) -> bool:
        self._last_time = time.monotonic()
        if self.run_folder is None and not (kind != "rolling" and trainer.cfg.logger.log_to_wandb):
            return False
        try:
            trainer.save_checkpoint(name, kind=kind)
        except WRITE_ERRORS as error:
            logger.error(
                "The %s checkpoint after step %d could not be written (%s); the last whole one is %s.",
                kind, trainer.n_training_steps, error, self.last or "of an earlier start of the run, or none",
            )  # fmt: skip
            return False
        return True

    def write(self, trainer: E2ESAETrainer, run_folder: RunFolder, name: str, kind: CheckpointKind) -> Path:
        """Write one checkpoint.

        Raises:
            OSError, SafetensorError: it cannot be written; what was there before still is.
        """
        counts = dict(zip(("n_training_steps", "n_training_samples"), trainer.counts_to_save(), strict=True))
        versions = {
            "e2e_sae_plugin_version": __version__,
            "sae_lens_version": sae_lens.__version__,
            "torch_version": torch.__version__,
        }

        def fill(folder: Path) -> None:
            trainer.large_state_to_save().sae.save_model(folder)
            save_file({"sparsity": trainer.log_feature_sparsity}, folder / SPARSITY_FILENAME)
            trainer.save_trainer_state(folder)
            if trainer.save_checkpoint_fn is not None:
                trainer.save_checkpoint_fn(checkpoint_path=folder)

        path = run_folder.write(name, kind, {**counts, **versions, "identity": trainer.identity}, fill)
        if kind != "final":
            self._last = counts["n_training_steps"], path
            self._last_time = time.monotonic()
        return path
