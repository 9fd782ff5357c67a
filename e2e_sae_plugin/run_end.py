"""How a run ends that stops before its last step: a checkpoint first, and one rank that says how to go on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from e2e_sae_plugin.checkpoint.lock import locked
from e2e_sae_plugin.checkpoint.run_folder import RunFolder
from e2e_sae_plugin.distributed import LostRankError, Ranks
from e2e_sae_plugin.faults import NonFiniteError
from e2e_sae_plugin.trainer import E2ESAETrainer

logger = logging.getLogger(__name__)


def how_to_resume(checkpoint: Path) -> str:
    """A sentence for whoever reads the log."""
    path = str(checkpoint.absolute())  # it may be read in another folder
    return f"To go on from it, set resume_from_checkpoint={path!r} (on the command line: --resume)."


class RunEnd:
    """What is done for a run that has been stopped, or has failed.

    Args:
        run_folder: the run's checkpoints; None for nowhere.
        ranks: of the run; None for a process alone.
        folders: gives those that the run holds a lock on.
        wait_for_leader: returns when rank 0 has come this far.
    """

    def __init__(
        self,
        run_folder: RunFolder | None,
        ranks: Ranks | None,
        folders: Callable[[], Sequence[Path]],
        wait_for_leader: Callable[[], None],
    ):
        self._run_folder, self._ranks, self._folders, self._wait_for_leader = (
            run_folder,
            ranks,
            folders,
            wait_for_leader,
        )
        self._leads = ranks is None or ranks.leads

    def save_at_stop(self, trainer: E2ESAETrainer, why: str) -> Path | None:
        """Write a checkpoint of the last complete step, and say how to go on.

        Args:
            why: what has stopped the run, for the log.
        """
        trainer.unfold()
        steps = trainer.n_training_steps
        if trainer.is_updating:  # the optimizer failed half-way: these weights are of no step
            checkpoint, done = trainer.checkpointer.last, "Its weights are incomplete and were not saved"
        elif steps == 0:
            checkpoint, done = None, "Nothing was trained yet"
        else:
            checkpoint = trainer.checkpointer.at_stop(trainer)
            done = "Saved a checkpoint" if checkpoint is not None else "No checkpoint could be written"
        if checkpoint is None and steps > 0 and self._run_folder is None:
            done = "There is no checkpoint: checkpoint_path is None"
        how = "" if checkpoint is None else " " + how_to_resume(checkpoint)
        # At a level that other ranks than 0 log too, should one of them have to save.
        level = logging.WARNING if self._leads else logging.ERROR
        if trainer.shard is None or self._leads:
            logger.log(level, "%s at step %d. %s.%s", why, steps, done, how)
        return checkpoint

    def of_ranks(self, trainer: E2ESAETrainer, error: Exception) -> None:
        """Rank 0 saves and says how to go on; the lowest that is left does, where rank 0 is lost.

        Raises:
            SystemExit: another rank speaks for a lost one.
        """
        assert self._ranks is not None
        lost = isinstance(error, LostRankError)
        if trainer.shard is not None:
            self._of_shards(trainer, error)
            return
        why = f"A rank of {self._ranks.size} was lost" if lost else type(error).__name__
        speaks = self._ranks.is_successor() and (self._leads or lost)
        if speaks:
            trainer.takes_over = True
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(locked(*([] if self._leads else self._folders())))
                except ValueError:  # another rank does
                    speaks = False
                speaks = speaks and (self._leads or not self._is_saved(trainer))
                if speaks:
                    self.save_at_stop(trainer, why)
            self._ranks.succeeded()
        if lost and not speaks:
            raise SystemExit(1) from None

    def _of_shards(self, trainer: E2ESAETrainer, error: Exception) -> None:
        """Of a sharded dictionary no rank has all, so what all come to at once can be saved, and a rank's own failure not.

        Raises:
            SystemExit: another rank speaks for a lost one.
        """
        assert self._ranks is not None
        if isinstance(error, NonFiniteError):  # of the whole step, so all ranks are here
            self.save_at_stop(trainer, type(error).__name__)
            self._wait_for_leader()
            return
        lost = isinstance(error, LostRankError)
        speaks = self._ranks.is_successor() and (self._leads or lost)
        if speaks:
            why = f"A rank of {self._ranks.size} was lost" if lost else type(error).__name__
            there = [] if self._run_folder is None else self._run_folder.checkpoints()
            found = [(manifest["n_training_steps"], path) for path, manifest in there if manifest["kind"] != "final"]
            how = "There is no checkpoint." if not found else how_to_resume(max(found)[1])
            logger.error(
                "%s at step %d. No rank has all of the sharded dictionary, so no checkpoint of this step could be "
                "written. %s",
                why, trainer.n_training_steps, how,
            )  # fmt: skip
            self._ranks.succeeded()
        if lost and not speaks:
            raise SystemExit(1) from None

    def _is_saved(self, trainer: E2ESAETrainer) -> bool:
        """Whether another rank has written the checkpoint of the last complete step."""
        there = [] if self._run_folder is None else self._run_folder.checkpoints()
        return any(manifest["n_training_steps"] == trainer.n_training_steps for _, manifest in there)
