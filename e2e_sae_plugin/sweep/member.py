"""One SAE of a sweep: an ordinary run whose batches, model and clean passes are shared."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from e2e_sae_plugin.build import quiet_override_warning
from e2e_sae_plugin.checkpoint.checkpointer import WRITE_ERRORS
from e2e_sae_plugin.checkpoint.folder import write_whole
from e2e_sae_plugin.checkpoint.run_folder import RunFolder
from e2e_sae_plugin.interruption import StopRequest
from e2e_sae_plugin.runner import E2ESAETrainingRunner
from e2e_sae_plugin.sweep.config import SweepMember
from e2e_sae_plugin.sweep.stream import Reader
from e2e_sae_plugin.token_stream import TokenStream
from e2e_sae_plugin.trainer import E2ESAETrainer, Stopped

FAILURE_FILENAME = "failed.json"

Status = Literal["training", "finished", "failed"]


class MemberRunner(E2ESAETrainingRunner):
    """Builds and saves one SAE of a sweep; the sweep drives its trainer.

    Args:
        member: which one.
        model: the language model that all share.
        dataset: the data that all share.
        evaluation_tokens: the held-out sequences that all share; None for no evaluation.
        checkpoint: the SAE's own, to go on from; None to start anew.
    """

    def __init__(
        self,
        member: SweepMember,
        model: Any,
        dataset: Any,
        evaluation_tokens: Tensor | None,
        checkpoint: Path | None,
    ):
        self.member = member
        self.trainer: E2ESAETrainer | None = None
        self.reader: Reader | None = None
        self.status: Status = "training"
        config = copy.copy(member.config)
        config.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        with quiet_override_warning(True, ("model", "dataset")):  # both are shared, as the config says
            super().__init__(
                config,
                override_model=model,
                override_dataset=dataset,
                override_evaluation_tokens=evaluation_tokens,
            )

    @property
    def output(self) -> Path:
        assert self.cfg.output_path is not None
        return Path(self.cfg.output_path)

    def start(self, reader: Reader, run_folder: RunFolder | None, stop_request: StopRequest) -> E2ESAETrainer:
        """The trainer, reading from `reader`, where its checkpoint left it."""
        self.reader = reader
        self.run_folder = run_folder
        trainer = self._claim_output_and_build_trainer()
        trainer.stop_request = stop_request
        if self.resumed_from is not None:
            trainer.load_trainer_state(self.resumed_from)
        (self.output / FAILURE_FILENAME).unlink(missing_ok=True)
        self.trainer = trainer
        return trainer

    @property
    def place(self) -> int:
        """The number of the batch that comes next."""
        assert self.reader is not None
        return self.reader.place

    def _build_trainer(self) -> E2ESAETrainer:
        trainer = super()._build_trainer()
        assert self.reader is not None
        trainer.data_provider = self.reader
        return trainer

    @property
    def _stream(self) -> TokenStream:
        """The one that all read from."""
        assert self.reader is not None
        return self.reader.batches.source

    def attempt(self, action: Callable[[E2ESAETrainer], object]) -> Exception | None:
        """Do something with the trainer; what it raises is this SAE's failure alone, kept beside where it would lie."""
        assert self.trainer is not None
        assert self.reader is not None
        try:
            action(self.trainer)
        except (Stopped, *WRITE_ERRORS):
            if self.trainer._batch_is_pending:  # its step was taken back: it comes again
                self.reader.place -= 1
            raise
        except Exception as error:
            self.status = "failed"
            failure = {"error": f"{type(error).__name__}: {error}", "step": self.trainer.n_training_steps}
            write_whole(self.output / FAILURE_FILENAME, json.dumps(failure, indent=2) + "\n")
            self.trainer = None
            return error
        return None

    def finish(self, trainer: E2ESAETrainer) -> None:
        """End the run and save its SAE."""
        trainer.end()
        self._record_rows(self.sae.cfg.metadata, trainer.n_training_samples)
        self._save_or_keep_resumable(trainer, str(self.output))
        self.status = "finished"
        self.trainer = None

    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        self.sae.cfg.metadata.kind = self.member.kind
        self.sae.cfg.metadata.sparsity = self.member.sparsity
