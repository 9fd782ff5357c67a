"""`E2ESAETrainingRunner`: builds the parts of a run, trains, saves in SAELens's format."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens.config import HfDataset
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training._interruption import interrupt_callback
from torch import Tensor
from tqdm.auto import tqdm

from e2e_sae_plugin._version import __version__
from e2e_sae_plugin.build import build_sae, check_model_and_sae, load_model_for, reading_dataset
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.evaluation import measure
from e2e_sae_plugin.metrics_log import MetricsLog
from e2e_sae_plugin.splice import SplicedModel, splice_into
from e2e_sae_plugin.summary import summarise
from e2e_sae_plugin.token_stream import TokenStream, check_evaluation_tokens
from e2e_sae_plugin.trainer import E2ESAETrainer

logger = logging.getLogger(__name__)

E2E_CFG_FILENAME = "e2e_runner_cfg.json"


class E2ESAETrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens's training runner, end to end. Adds to it:

    * the model is spliced and run twice per step; the trainer is `E2ESAETrainer`;
    * a held-out evaluation and `metrics.jsonl` with Weights & Biases or without, a summary at the end;
    * the objective goes into the SAE's metadata, the whole config into `e2e_runner_cfg.json` beside SAELens's files;
    * an interrupted or failing run saves a checkpoint with weights before it ends.

    Args:
        cfg: the run's config.
        override_dataset: use this dataset instead of `cfg.dataset_path`, as in SAELens.
        override_model: use this model instead of `cfg.model_name`: a `HookedTransformer`, a `TransformerBridge` or a
            `HookedProxyLM`. It is put into evaluation mode and its parameters stop requiring gradients.
        override_sae: train this SAE instead of a new one.
        override_evaluation_tokens: token ids `[n_prompts, context_size]` to evaluate on; by default the head of the
            dataset is held out for that.

    Raises:
        ValueError: the config does not fit the model or the data; the message says what to change.
    """

    cfg: E2ESAERunnerConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        cfg: E2ESAERunnerConfig,
        override_dataset: HfDataset | None = None,
        override_model: Any = None,
        override_sae: TrainingSAE[Any] | None = None,
        override_evaluation_tokens: Tensor | None = None,
    ):
        if cfg.logger.log_to_wandb:
            check_wandb_login()
        sae = build_sae(cfg) if override_sae is None else override_sae
        own_model = load_model_for(cfg) if override_model is None else None
        with reading_dataset(cfg, override_dataset), quiet_override_warning(own_model is not None):
            super().__init__(
                cfg,
                override_dataset=override_dataset,
                override_model=override_model if own_model is None else own_model,
                override_sae=sae,
            )
        self.spliced_model = self._splice(needs_downstream=cfg.objective.beta > 0)
        check_model_and_sae(self.spliced_model, self.sae, cfg)
        self.evaluation_model = self._evaluation_model()
        self.tokens = TokenStream(
            self.activations_store,
            n_prompts=cfg.step_size_prompts,
            n_held_out=0 if override_evaluation_tokens is not None else self._n_held_out_prompts(),
            vocabulary=self.spliced_model.vocabulary,
        )
        held_out = self.tokens.held_out
        if override_evaluation_tokens is not None:
            held_out = override_evaluation_tokens
            check_evaluation_tokens(held_out, cfg.context_size, self.spliced_model.vocabulary)
        self.evaluation_tokens = held_out if cfg.n_eval_batches > 0 else None

    def run(self) -> TrainingSAE[Any]:
        """Train, save, and return the SAE.

        Re-implemented because the host builds its trainer inside `run`; a test fails when the installed host's version
        of it changes.
        """
        self._set_sae_metadata()
        if self.cfg.logger.log_to_wandb:
            self._start_wandb()
        trainer = self._build_trainer()
        if self.cfg.resume_from_checkpoint is not None:
            logger.info("Resuming from checkpoint: %s", self.cfg.resume_from_checkpoint)
            trainer.load_trainer_state(self.cfg.resume_from_checkpoint)
            self.sae.load_weights_from_checkpoint(self.cfg.resume_from_checkpoint)
            self.activations_store.load_from_checkpoint(self.cfg.resume_from_checkpoint)
            self.tokens.resumed()
        self._compile_sae_if_needed()
        sae = self.run_trainer_with_interruption_handling(trainer)
        if self.cfg.output_path is not None:
            self.save_final_sae(sae, self.cfg.output_path, trainer.log_feature_sparsity)
        if self.cfg.logger.log_to_wandb:
            wandb.finish()
        if self.cfg.verbose:
            tqdm.write(summarise(trainer, self.cfg))
        return sae

    # The parts, each replaceable by a subclass.

    def _splice(self, needs_downstream: bool) -> SplicedModel:
        return splice_into(
            self.model,
            self.cfg.hook_name,
            downstream_hooks=self.cfg.objective.downstream_hooks if needs_downstream else None,
            needs_downstream=needs_downstream,
        )

    def _evaluation_model(self) -> SplicedModel:
        """Evaluation measures every later layer, whatever the objective uses."""
        if self.cfg.objective.downstream_hooks or not self.spliced_model.position.default_downstream:
            return self.spliced_model
        model = splice_into(self.model, self.cfg.hook_name)
        model.vocabulary, model.unembed = self.spliced_model.vocabulary, self.spliced_model.unembed
        return model

    def _build_trainer(self) -> E2ESAETrainer:
        output = self.cfg.output_path
        return E2ESAETrainer(
            cfg=self.cfg,
            sae=self.sae,
            spliced_model=self.spliced_model,
            data_provider=self.tokens,
            metrics_log=MetricsLog(
                Path(output) if output is not None else None,
                to_wandb=self.cfg.logger.log_to_wandb,
                resume=self.cfg.resume_from_checkpoint is not None,
            ),
            held_out_evaluator=None if self.evaluation_tokens is None else self._evaluate,
            save_checkpoint_fn=self.save_checkpoint,
            excluded_tokens=self.activations_store.exclude_special_tokens,
        )

    def _evaluate(self, trainer: E2ESAETrainer) -> dict[str, float]:
        assert self.evaluation_tokens is not None
        scaler = trainer.activation_scaler

        def reconstruct(sae_in: Tensor) -> tuple[Tensor, Tensor]:
            feature_acts = self.sae.encode(scaler(sae_in.to(self.sae.device, torch.get_default_dtype())))
            return feature_acts, scaler.unscale(self.sae.decode(feature_acts))

        with trainer.model_autocast():
            metrics = measure(
                reconstruct,
                self.evaluation_model,
                self.evaluation_tokens,
                batch_size_prompts=self.cfg.eval_batch_size_prompts or self.cfg.store_batch_size_prompts,
                seqpos_slice=self.cfg.seqpos_slice,
                excluded=self.activations_store.exclude_special_tokens,
                head_index=self.cfg.hook_head_index,
            )
        return metrics.to_log()

    def _n_held_out_prompts(self) -> int:
        per_batch = self.cfg.eval_batch_size_prompts or self.cfg.store_batch_size_prompts
        return self.cfg.n_eval_batches * per_batch

    def _start_wandb(self) -> None:
        logging_cfg = self.cfg.logger
        wandb.init(
            project=logging_cfg.wandb_project,
            entity=logging_cfg.wandb_entity,
            config=self.cfg.to_dict(),
            name=logging_cfg.run_name,
            id=logging_cfg.wandb_id,
        )

    # Saving.

    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        self.sae.cfg.metadata.objective = self.cfg.objective.to_dict()
        self.sae.cfg.metadata.local_first = self.cfg.local_first
        self.sae.cfg.metadata.local_first = self.cfg.local_first
        self.sae.cfg.metadata.downstream_hooks = list(self.spliced_model.downstream_hooks)
        self.sae.cfg.metadata.e2e_sae_plugin_version = __version__

    def save_final_sae(
        self, sae: TrainingSAE[Any], output_path: str, log_feature_sparsity: Tensor | None = None
    ) -> None:
        """SAELens's files, with a `runner_cfg.json` that SAELens can read and the whole config beside it."""
        super().save_final_sae(sae, output_path, log_feature_sparsity)
        self._write_configs(Path(output_path))

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Called by the trainer once the SAE and the optimizer are in `checkpoint_path`; None for nowhere."""
        super().save_checkpoint(checkpoint_path)
        if checkpoint_path is not None:
            self._write_configs(checkpoint_path)

    def _write_configs(self, folder: Path) -> None:
        for name, config in ((RUNNER_CFG_FILENAME, self.cfg.host_dict()), (E2E_CFG_FILENAME, self.cfg.to_dict())):
            (folder / name).write_text(json.dumps(config, indent=2) + "\n")

    def run_trainer_with_interruption_handling(self, trainer: Any) -> TrainingSAE[Any]:
        """Train; if that is interrupted or fails, save weights, optimizer and data position first.

        The host's own version saves no weights and leaves its signal handlers installed.
        """
        with interrupt_signals():
            try:
                return trainer.fit()
            except BaseException as error:
                if self.cfg.checkpoint_path is not None and trainer.n_training_steps > 0:
                    name = str(trainer.n_training_samples)
                    trainer.save_checkpoint(checkpoint_name=name)
                    logger.warning(
                        "%s at step %d. Saved a checkpoint; to go on from it, set resume_from_checkpoint=%r.",
                        type(error).__name__,
                        trainer.n_training_steps,
                        str(Path(self.cfg.checkpoint_path) / name),
                    )
                raise


@contextmanager
def interrupt_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise SAELens's `InterruptedException` inside; the handlers before are restored after.

    Nothing is touched outside the main thread, where Python allows no handlers.
    """
    installed: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                installed[number] = signal.signal(number, interrupt_callback)
            except ValueError:
                break
        yield
    finally:
        for number, previous in installed.items():
            signal.signal(number, previous)


@contextmanager
def quiet_override_warning(active: bool) -> Iterator[None]:
    """The host warns that an overridden model is not reproducible; ours was loaded from the config."""
    host_logger = logging.getLogger("sae_lens")

    def not_about_the_model(record: logging.LogRecord) -> bool:
        return "passed in a model" not in record.getMessage()

    if active:
        host_logger.addFilter(not_about_the_model)
    try:
        yield
    finally:
        if active:
            host_logger.removeFilter(not_about_the_model)


def check_wandb_login() -> None:
    """Refuse Weights & Biases without credentials, before anything slow happens.

    Raises:
        ValueError: no API key is known and `WANDB_MODE` is not offline or disabled.
    """
    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun") or wandb.run is not None:
        return
    if not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "logger.log_to_wandb is True but there is no Weights & Biases login. Run `wandb login`, set WANDB_API_KEY, "
            "set WANDB_MODE=offline, or use logger=LoggingConfig(log_to_wandb=False)."
        )
