"""`E2ESAETrainer`: the run from its first step to its last, logged, evaluated and checkpointed."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SaveCheckpointFn
from sae_lens.util import path_or_tmp_dir
from torch import Tensor

from e2e_sae_plugin.checkpoint import state as trainer_state
from e2e_sae_plugin.checkpoint.checkpointer import Checkpointer
from e2e_sae_plugin.checkpoint.finished import fold_activation_scaling
from e2e_sae_plugin.checkpoint.folder import CheckpointKind
from e2e_sae_plugin.checkpoint.run_folder import RunFolder
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.distributed import Ranks
from e2e_sae_plugin.initialisation import estimate_activation_scaling, initialise_b_dec
from e2e_sae_plugin.interruption import StopRequest
from e2e_sae_plugin.kernels.saved_threshold import as_saved, settle_threshold
from e2e_sae_plugin.metrics_log import MetricsLog
from e2e_sae_plugin.progress import Progress
from e2e_sae_plugin.ranked_step import with_all_tokens
from e2e_sae_plugin.sparsity_scale import SparsityScale
from e2e_sae_plugin.splice import SplicedModel
from e2e_sae_plugin.step import SplicedStepTrainer
from e2e_sae_plugin.torch_state import own_torch_state

logger = logging.getLogger(__name__)

HeldOutEvaluator = Callable[["E2ESAETrainer"], dict[str, float]]
"""Measures a trainer's SAE as it stands; its metrics go to the log."""


class Stopped(Exception):
    """Raised between two steps when the run has been asked to stop."""


class E2ESAETrainer(SplicedStepTrainer):
    """The whole run. Adds to SAELens's `SAETrainer`:

    * `step` goes from token sequences through the model and back (`SplicedStepTrainer`);
    * metrics and held-out evaluation run with Weights & Biases or without;
    * checkpoints are whole, hold everything, and also come by the clock.

    Args:
        cfg: the run's config.
        sae: a training SAE of SAELens.
        spliced_model: the frozen model with the SAE's place in it.
        data_provider: batches of token ids `[n_prompts, context_size]`.
        metrics_log: where metrics go.
        held_out_evaluator: called at the evaluation interval and at the end; None for no evaluation.
        save_checkpoint_fn: as in SAELens.
        excluded_tokens: ids of tokens that are not trained on.
        run_folder: where checkpoints go; None for nowhere.
        identity: fingerprints of what the run depends on besides its config, for the checkpoints.
        ranks: the processes that train together, each with its part of every batch; None for this one alone. All of them
            get the same batches; rank 0 alone evaluates, writes checkpoints and logs. With `shard_dictionary`, `sae` is
            the rank's `Shard` of the whole, and all of them evaluate and give their parts to a checkpoint.
    """

    def __init__(
        self,
        cfg: E2ESAERunnerConfig,
        sae: TrainingSAE[Any],
        spliced_model: SplicedModel,
        data_provider: Iterator[Tensor],
        metrics_log: MetricsLog,
        held_out_evaluator: HeldOutEvaluator | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        excluded_tokens: Tensor | None = None,
        run_folder: RunFolder | None = None,
        identity: dict[str, str | None] | None = None,
        ranks: Ranks | None = None,
    ):
        super().__init__(
            cfg, sae, spliced_model, data_provider, metrics_log, save_checkpoint_fn, excluded_tokens, ranks
        )
        self.held_out_evaluator = held_out_evaluator
        self._sparsity_scale = SparsityScale(cfg)
        self.last_evaluation: dict[str, float] = {}
        self.checkpointer = Checkpointer(run_folder, cfg.checkpoint_every_minutes)
        self.identity = identity or {}
        self.stop_request = StopRequest()
        self.takes_over = False  # whether this rank stands in for rank 0, which is lost
        self._checkpoint_is_due, self._agreed_signal = False, None
        self._batch_is_pending = False
        self._large: trainer_state.LargeState | None = None  # while a checkpoint is being written
        self._unfolded: tuple[dict[str, Tensor], ActivationScaler, Any] | None = None

    @own_torch_state()
    def fit(self) -> TrainingSAE[Any]:
        """SAELens's `fit`, with metrics and evaluation that do not depend on Weights & Biases.

        Re-implemented because the host's loop only logs and evaluates with Weights & Biases on; a test fails when the
        installed host's version of it changes.
        """
        self.begin()
        with Progress(self.cfg.total_training_samples, self.n_training_samples, shown=self.leads) as progress:
            while not self.is_done:
                output = self.advance()
                progress.show(self.n_training_steps, self.n_training_samples, output, self.l0, now=self.is_done)
                self.checkpointer.after_step(self)
                self.stop_if_asked()
        return self.end()

    def begin(self) -> None:
        """What comes before the first step, or before going on: estimates that are not there yet, the start's evaluation."""
        self.sae.to(self.cfg.device)
        estimate_activation_scaling(self)
        initialise_b_dec(self)
        if self.early_stop.patience is not None and self.n_training_steps == 0 and self.objective.needs_spliced_pass:
            self.early_stop.see(self.evaluate()["metrics/held_out_kl"], self.sae)  # what all others are compared with

    @property
    def leads(self) -> bool:
        """Whether this process evaluates, writes and shows the run: the only one, or rank 0."""
        return self.ranks is None or self.ranks.leads

    def _news(self) -> list[float]:
        return [float(self.stop_request.signal_number or 0), float(self.checkpointer.is_due_by_the_clock)]

    def _hear(self, news: Tensor) -> None:
        """A signal on any rank stops all of them after the same step; rank 0's clock says when a checkpoint is due."""
        self._agreed_signal = int(news[:, 0].max()) or None
        self._checkpoint_is_due = bool(news[0, 1])

    def checkpoint_is_due(self) -> bool:
        """Whether so long has passed since the last checkpoint that another is due; the same on all ranks."""
        return self.checkpointer.is_due_by_the_clock if self.ranks is None else self._checkpoint_is_due

    @property
    def is_done(self) -> bool:
        """Whether the last step has been made."""
        return self.n_training_samples >= self.cfg.total_training_samples or self.early_stop.reached

    def advance(self) -> TrainStepOutput:
        """The next step, with what the log gets before and after it."""
        self._log(self.maybe_reset_sparsity())
        return self._train_on_next_batch()

    def end(self) -> TrainingSAE[Any]:
        """What comes after the last step: the last evaluation, the best weights, the SAE in its finished form."""
        self.first_steps.check(self.trained_parameters())
        self._log(self.full_sparsity_window_log())
        is_measured = self.early_stop.patience is not None and not self.early_stop.reached
        if is_measured:
            self.early_stop.see(self.evaluate()["metrics/held_out_kl"], self.sae)
        if self.early_stop.patience is not None and self.early_stop.restore_best(self.sae):
            logger.info("The run ends with the weights of its lowest held-out KL, %.6g.", self.early_stop.lowest)
            is_measured = False
        with as_saved(self.sae) as is_another_form:
            if is_another_form or not is_measured:
                self.evaluate()
        self._keep_unfolded()
        fold_activation_scaling(self.sae, self.activation_scaler)
        self.set_final_sae_metadata()
        if self.cfg.save_final_checkpoint:
            self.checkpointer.finished(self)
        return self.sae

    def _train_on_next_batch(self) -> TrainStepOutput:
        """One step, counted, logged and evaluated."""
        logs, evaluates = self._is_logging_step(), self._is_evaluation_step()
        batch = next(self.data_provider)
        self._batch_is_pending = True
        output = self.step(batch)
        self.n_training_steps += 1  # at once: what follows may fail, but the step is done
        self._batch_is_pending = False
        is_compared = evaluates and self.early_stop.patience is not None
        if self.is_done or is_compared or self.checkpointer.milestone_is_due(self):
            self.settle_threshold(output.sae_in)
        self._sparsity_scale.see(output, self.n_training_steps - 1)
        if logs:
            self._log(self._step_metrics(output), self.n_training_steps - 1)
        if evaluates:
            held_out = self.evaluate(self.n_training_steps - 1)
            if held_out and self.objective.needs_spliced_pass:  # the KL of a local part is not what is watched
                self.early_stop.see(held_out["metrics/held_out_kl"], self.sae)
        return output

    def settle_threshold(self, sae_in: Tensor) -> None:
        """Set the threshold that BatchTopK and Matryoshka SAEs are saved with, before the SAE as it is now may be kept.

        Args:
            sae_in: of the last step, `[own tokens, d_in]`.
        """
        if self.shard is not None:
            shards = self._sharded_tokens(len(sae_in))
            everyones = shards.everyones(sae_in)
            settle_threshold(self.sae, everyones, len(everyones), shards.ranks)
            return
        ranks = self._step_ranks
        n_tokens = len(sae_in) if ranks is None else int(ranks.exchange([len(sae_in)]).sum())
        settle_threshold(self.sae, sae_in, n_tokens, ranks)

    def stop_if_asked(self) -> None:
        """Between two steps, or two batches of an estimate.

        Raises:
            Stopped: a signal has asked for it.
        """
        if self.ranks is not None:
            if self._agreed_signal is None:
                return  # a signal that came since they last talked is for after the next step
            self.stop_request.signal_number = self._agreed_signal
        if self.stop_request:
            raise Stopped

    def stop_if_any_rank_is_asked(self) -> None:
        """The same where no step has told the ranks of each other.

        Raises:
            Stopped: a signal has asked one of the ranks for it.
        """
        if self.ranks is not None:
            self._hear(self.ranks.exchange(self._news()))
        self.stop_if_asked()

    # Checkpoints.

    def state_to_save(self) -> trainer_state.State:
        """The run's state as a checkpoint of now should have it."""
        return self.last_good_state or trainer_state.capture(self, last_batch_is_trained=not self._batch_is_pending)

    def counts_to_save(self) -> tuple[int, int]:
        """Steps and tokens of `state_to_save`."""
        if self.last_good_state is not None:
            return self.last_good_state[0]["n_training_steps"], self.last_good_state[0]["n_training_samples"]
        return self.n_training_steps, self.n_training_samples

    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
        kind: CheckpointKind = "milestone",
    ) -> None:
        """As in SAELens, but whole or not at all, and with all that a run needs to go on.

        Raises:
            OSError, SafetensorError: it cannot be written; what was there before still is.
        """
        large = None if self.shard is None else trainer_state.large_state(self)  # all ranks have their parts to give
        if not self.leads and not self.takes_over:
            return
        run_folder = self.checkpointer.run_folder
        if base_path is not None:
            run_folder = RunFolder(Path(base_path), self.runner_cfg.keep_checkpoints)
        if run_folder is None and not self.cfg.logger.log_to_wandb:
            return
        self._large = large
        with path_or_tmp_dir(None if run_folder is None else run_folder.path) as path:
            try:
                written = self.checkpointer.write(self, run_folder or RunFolder(path, 1), checkpoint_name, kind)
            finally:
                self._large = None
            if self.cfg.logger.log_to_wandb and kind != "rolling" and self.leads:
                self.cfg.logger.log(
                    self,
                    written / SAE_WEIGHTS_FILENAME,
                    written / SAE_CFG_FILENAME,
                    sparsity_path=written / SPARSITY_FILENAME,
                    wandb_aliases=wandb_aliases,
                )

    def large_state_to_save(self) -> trainer_state.LargeState:
        """What of the state is as large as the SAE; of a sharded dictionary, what the ranks have put together."""
        large = self._large or trainer_state.large_state(self)
        assert large is not None  # of a sharded dictionary, `save_checkpoint` alone writes
        return large

    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """All but the SAE's weights, as safetensors and JSON where SAELens pickles."""
        checkpoint_path.mkdir(exist_ok=True, parents=True)
        trainer_state.save(self, checkpoint_path, self.state_to_save(), self.large_state_to_save())
        self.activation_scaler.save(str(checkpoint_path / ACTIVATION_SCALER_CFG_FILENAME))

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """The weights too, and the data's place.

        Raises:
            ValueError: the data is not what the checkpoint was made with.
        """
        self.activation_scaler.load(Path(checkpoint_path) / ACTIVATION_SCALER_CFG_FILENAME)
        trainer_state.load(self, Path(checkpoint_path))

    def _keep_unfolded(self) -> None:
        """What folding and saving for inference overwrite; kept where a checkpoint could be needed after all."""
        if self.checkpointer.run_folder is not None:
            weights = {name: value.cpu().clone() for name, value in self.sae.state_dict().items()}
            self._unfolded = weights, copy.copy(self.activation_scaler), copy.deepcopy(self.sae.cfg)

    def unfold(self) -> None:
        """Take back the end of `fit`: the final SAE could not be saved, so the run has to be able to end once more."""
        if self._unfolded is not None:
            weights, self.activation_scaler, self.sae.cfg = self._unfolded
            self.sae.load_state_dict(weights)
            self._unfolded = None

    # Logging.

    def evaluate(self, step: int | None = None) -> dict[str, float]:
        """Run the held-out evaluation now and log it, under `step` or the number of steps done."""
        if self.held_out_evaluator is not None:
            self.sae.eval()
            evaluate = partial(self.held_out_evaluator, self)
            if self.ranks is None:
                self.last_evaluation = evaluate()
            elif self.shard is None:
                self.last_evaluation = self.ranks.by_leader(evaluate)
            else:  # every rank has features that it takes
                self.last_evaluation = self.ranks.from_leader(evaluate())
            self.sae.train()
            self._log(self.last_evaluation, step)
            if not math.isfinite(self.last_evaluation.get("metrics/ce_loss_increase", 0.0)):
                logger.warning(
                    "The held-out evaluation is not finite (%s): look at the held-out sequences, and at the model's dtype.",
                    {name: value for name, value in self.last_evaluation.items() if not math.isfinite(value)},
                )
        return self.last_evaluation

    def _is_logging_step(self) -> bool:
        return (self.n_training_steps + 1) % self.cfg.logger.wandb_log_frequency == 0

    def _is_evaluation_step(self) -> bool:
        interval = self.cfg.logger.wandb_log_frequency * self.cfg.logger.eval_every_n_wandb_logs
        return (self.n_training_steps + 1) % interval == 0

    def _step_metrics(self, output: TrainStepOutput) -> dict[str, Any]:
        if self._step_ranks is not None:
            output = with_all_tokens(self._step_ranks, output)
        metrics = self.build_train_step_log_dict(output=output, n_training_samples=self.n_training_samples)
        if not len(output.feature_acts):  # too large to be kept
            metrics["metrics/l0"] = float(self.l0)
        if self.grad_norm is not None:
            metrics["details/grad_norm"] = float(self.grad_norm)
        if self.kl_scale is not None:
            metrics["details/kl_scale"] = float(self.kl_scale)
        if self.n_skipped_steps:
            metrics["details/n_skipped_steps"] = self.n_skipped_steps
        return metrics

    def _log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.metrics_log.log(metrics, self.n_training_steps if step is None else step, self.n_training_samples)
