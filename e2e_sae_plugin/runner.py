"""`E2ESAETrainingRunner`: builds the parts of a run, trains, saves in SAELens's format."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import wandb
from sae_lens import SAE
from sae_lens.config import HfDataset
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor
from tqdm.auto import tqdm

from e2e_sae_plugin._version import __version__
from e2e_sae_plugin.build import (
    build_sae,
    check_model_and_sae,
    earlier_rows,
    load_model_for,
    quiet_override_warning,
    reading_dataset,
)
from e2e_sae_plugin.cache_folders import explained_cache_errors
from e2e_sae_plugin.checkpoint.checkpointer import WRITE_ERRORS
from e2e_sae_plugin.checkpoint.folder import recover, whole_files
from e2e_sae_plugin.checkpoint.identity import run_identity, tokenizer_fingerprint
from e2e_sae_plugin.checkpoint.lock import locked
from e2e_sae_plugin.checkpoint.resume import AUTO, check_identity, find_checkpoint, read_saved_config, run_folder_of
from e2e_sae_plugin.checkpoint.state import STATE_FILENAME
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.config_values import require_round_trip
from e2e_sae_plugin.data import DataSettings, LoadedData, loaded_data
from e2e_sae_plugin.data.load import check_tokenized_for
from e2e_sae_plugin.data.rows import RECORD, TrainedRows
from e2e_sae_plugin.data.tokenizer import check_tokenizer
from e2e_sae_plugin.demo.bundled import BUNDLED
from e2e_sae_plugin.distributed import LostRankError, join
from e2e_sae_plugin.evaluation import measure
from e2e_sae_plugin.evaluation.place import flatten_heads
from e2e_sae_plugin.hub.finished_run import push_finished_run, warn_without_token
from e2e_sae_plugin.interruption import run_interrupted, stop_on_signals
from e2e_sae_plugin.kernels import sharded_sae
from e2e_sae_plugin.kernels.sharded import ShardedTokens
from e2e_sae_plugin.metrics_log import MetricsLog
from e2e_sae_plugin.output_folder import mark_output, output_is_finished, write_configs
from e2e_sae_plugin.preflight import (
    check_device,
    check_folders,
    check_model_shape,
    check_wandb_login,
)
from e2e_sae_plugin.rank_checks import check_one_process, check_ranks, check_same, check_same_config
from e2e_sae_plugin.run_end import RunEnd, how_to_resume
from e2e_sae_plugin.seekable_store import SeekableActivationsStore
from e2e_sae_plugin.shard import Shard
from e2e_sae_plugin.splice import SplicedModel, splice_into
from e2e_sae_plugin.splice.given_model import uncompiled
from e2e_sae_plugin.summary import announce, summarise
from e2e_sae_plugin.token_stream import TokenStream, check_evaluation_tokens
from e2e_sae_plugin.torch_state import own_torch_state
from e2e_sae_plugin.trainer import E2ESAETrainer, Stopped

logger = logging.getLogger(__name__)


class E2ESAETrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens's training runner, end to end. Adds to it:

    * the model is spliced and run twice per step; the trainer is `E2ESAETrainer`;
    * a held-out evaluation and `metrics.jsonl` with Weights & Biases or without, a summary at the end;
    * the objective goes into the SAE's metadata, the whole config into `e2e_runner_cfg.json` beside SAELens's files;
    * checkpoints from which a run goes on exactly, written by the clock too, and before an interrupted or failing run ends;
    * what can be known to fail is refused before anything is loaded;
    * started by `torchrun`, each of its processes builds and runs it alike, and they train together
      (docs/guides/many_devices.md).

    Args:
        cfg: the run's config.
        override_dataset: use this dataset instead of `cfg.dataset_path`, as in SAELens.
        override_model: use this model instead of `cfg.model_name`: a `HookedTransformer`, a `TransformerBridge` or a
            `HookedProxyLM`. It is put into evaluation mode and its parameters stop requiring gradients.
        override_sae: train this SAE instead of a new one.
        override_evaluation_tokens: token ids `[n_prompts, context_size]` to evaluate on; by default the head of the
            dataset is held out for that.

    Raises:
        ValueError: the config does not fit the model, the data, the folders or the checkpoint to go on from; the message
            says what to change.
    """

    cfg: E2ESAERunnerConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @own_torch_state()
    def __init__(
        self,
        cfg: E2ESAERunnerConfig,
        override_dataset: HfDataset | LoadedData | None = None,
        override_model: Any = None,
        override_sae: TrainingSAE[Any] | None = None,
        override_evaluation_tokens: Tensor | None = None,
    ):
        if not isinstance(cfg, E2ESAERunnerConfig):
            raise ValueError(
                f"This runner takes an E2ESAERunnerConfig, got a {type(cfg).__name__}. The former has the same fields, and "
                "objective."
            )
        self.ranks = join()
        if self.ranks is None:
            check_one_process(cfg)
            self._load(cfg, override_dataset, override_model, override_sae, override_evaluation_tokens)
            return
        check_same_config(cfg, self.ranks)
        with self.ranks.all_or_none():
            check_ranks(cfg, self.ranks)
        self.ranks.use_device(str(cfg.device))
        with self.ranks.all_or_none():
            self._load(cfg, override_dataset, override_model, override_sae, override_evaluation_tokens)
        where = "Give all of them the same files, on a disk that they share."
        check_same("the checkpoint to go on from", self.resumed_from, self.ranks, where)
        check_same("whether output_path holds the finished run", self.is_finished, self.ranks, where)
        check_same("the model's or the given SAE's weights", self.identity, self.ranks, where)

    @explained_cache_errors()
    def _load(
        self,
        cfg: E2ESAERunnerConfig,
        override_dataset: HfDataset | LoadedData | None,
        override_model: Any,
        override_sae: TrainingSAE[Any] | None,
        override_evaluation_tokens: Tensor | None,
    ) -> None:
        """What this process can build by itself; refuses first what can be known to fail."""
        require_round_trip(cfg)
        if cfg.logger.log_to_wandb and self.leads:
            check_wandb_login()
        if self.leads:
            warn_without_token(cfg)
        check_device(cfg)
        is_named = {"model": override_model is None, "dataset": override_dataset is None}
        by_name = tuple(name for name, named in is_named.items() if named)
        if override_model is None:
            override_model = load_model_for(cfg) if cfg.model_name == BUNDLED else None
        override_model = uncompiled(override_model)
        self.identity = run_identity(override_model, override_sae)
        self.is_finished = cfg.resume_from_checkpoint == AUTO and output_is_finished(cfg, self.identity)
        self.has_run = False
        self.last_evaluation: dict[str, float] = {}
        """What the end of the run measured on the held-out sequences, by the names of `metrics.jsonl`; empty before."""
        self.resumed_from = None if self.is_finished else find_checkpoint(cfg, self.identity)
        self.run_folder = run_folder_of(cfg, self.resumed_from)
        # The whole of a sharded dictionary is only ever on the CPU.
        sae = build_sae(cfg, "cpu" if cfg.shard_dictionary else None) if override_sae is None else override_sae
        if not self.is_finished and self.leads:
            check_folders(cfg, sae, self.run_folder, self.resumed_from)
        if cfg.shard_dictionary:
            assert self.ranks is not None  # refused
            sae = Shard(self.ranks, cfg.sae.d_sae).cut(sae)
        if override_model is None:
            check_model_shape(cfg)
        self.data = loaded_data(DataSettings.of(cfg), override_dataset, cfg.context_size)
        own_model = load_model_for(cfg) if override_model is None else None
        with (
            reading_dataset(self.data.dataset, self.data.name),
            quiet_override_warning(bool(by_name), by_name),
        ):
            super().__init__(
                cfg,
                override_dataset=self.data.dataset,
                override_model=override_model if own_model is None else own_model,
                override_sae=sae,
            )
            store = self._seekable_store()
        self.identity = run_identity(self.model, override_sae)
        self._earlier_rows = earlier_rows(cfg, override_sae)
        if self.resumed_from is not None:
            check_identity(self.resumed_from, self.identity)
        self.spliced_model = self._splice(needs_downstream=cfg.objective.beta > 0)
        check_model_and_sae(self.spliced_model, self.sae, cfg)
        self.evaluation_model = self._evaluation_model()
        is_first = not isinstance(override_dataset, LoadedData)  # of several SAEs that share the data
        self.tokens = self._token_stream(store, override_evaluation_tokens is None, checks_tokenizer=is_first)
        held_out = self.tokens.held_out
        if override_evaluation_tokens is not None:
            held_out = override_evaluation_tokens
            check_evaluation_tokens(held_out, cfg.context_size, self.spliced_model.vocabulary)
        self.evaluation_tokens = held_out if cfg.n_eval_batches > 0 else None

    @property
    def leads(self) -> bool:
        """Whether this process writes, prints and logs: the only one, or rank 0."""
        return self.ranks is None or self.ranks.leads

    @own_torch_state()
    def run(self) -> SAE[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Train, save, share if that is asked, and return the SAE; of a run that `"auto"` finds finished, the SAE that it
        has saved. Every rank returns the SAE; with `shard_dictionary` rank 0 does, on its CPU, and the others their shard
        of it.

        Re-implemented because the host builds its trainer inside `run`; a test fails when the installed host's version
        of it changes.
        """
        sae = self._train_and_save()
        if not self.leads:
            return sae
        push = push_finished_run(self.cfg, self.run_folder or run_folder_of(self.cfg, None))
        if push is not None:
            self._say(f"\n{push}")
        return sae

    def _train_and_save(self) -> SAE[Any]:
        if self.is_finished:
            assert self.cfg.output_path is not None
            if self.leads:
                with locked(Path(self.cfg.output_path)):
                    self._clear_leftovers()
            self._wait_for_leader()
            self._say(f"This run is finished: its SAE is in {self.cfg.output_path}. There is nothing to do.")
            device = "cpu" if self.cfg.shard_dictionary else str(self.cfg.device)
            return SAE.load_from_disk(self.cfg.output_path, device=device)
        if self.has_run:
            raise RuntimeError(
                "This runner has run already: its SAE is no longer a new one. Build another runner; to go on with an "
                "interrupted run, with resume_from_checkpoint set."
            )
        self.has_run = True
        with contextlib.ExitStack() as held, stop_on_signals(says_so=self.leads) as stop_request:
            with contextlib.nullcontext() if self.ranks is None else self.ranks.all_or_none():
                held.enter_context(locked(*self._folders()) if self.leads else contextlib.nullcontext())
                if self.cfg.logger.log_to_wandb and self.leads:
                    self._start_wandb()
                trainer = self._claim_output_and_build_trainer()
                trainer.stop_request = stop_request
                if self.resumed_from is not None:
                    trainer.load_trainer_state(self.resumed_from)
            if self.resumed_from is not None:
                self._say(f"Resumed from {self.resumed_from}, after step {trainer.n_training_steps}.")
            self._say(announce(self.cfg))
            self._compile_sae_if_needed()
            sae = self.run_trainer_with_interruption_handling(trainer)
            self._record_rows(self.sae.cfg.metadata, trainer.n_training_samples)
            if trainer.shard is not None:
                sae = trainer.shard.join_sae(trainer.sae) or sae
            if self.cfg.output_path is not None and (self.leads or trainer.shard is not None):
                self._save_or_keep_resumable(trainer, self.cfg.output_path, sae)
            self._wait_for_leader()
            if self.cfg.logger.log_to_wandb and self.leads:
                wandb.finish()
            self.last_evaluation = trainer.last_evaluation
            if self.cfg.verbose and self.leads:
                tqdm.write(self._summary(trainer))
        if stop_request.signal_number is not None:  # it came when the last step was done
            logger.warning("The run was finished and saved when the signal came; there is nothing to resume.")
            raise run_interrupted(stop_request.signal_number, None)
        return sae

    def _claim_output_and_build_trainer(self) -> E2ESAETrainer:
        """The first things that a run does once its folders are its own."""
        self._set_sae_metadata()
        if self.leads:
            self._clear_leftovers()
        if self.cfg.output_path is not None and self.leads:
            mark_output(self.cfg, Path(self.cfg.output_path), starts_anew=self.resumed_from is None)
        return self._build_trainer()

    def _say(self, text: str) -> None:
        """What a user has to see, also in a script that has not set up logging."""
        if not self.leads:
            return
        if self.cfg.verbose:
            tqdm.write(text)
        else:
            logger.info("%s", text)

    def _folders(self) -> list[Path]:
        """That the run writes into: its output, and that of its checkpoints, once there is one."""
        output = [] if self.cfg.output_path is None else [Path(self.cfg.output_path)]
        has_checkpoints = self.run_folder is not None and self.run_folder.path.is_dir()
        return output + ([self.run_folder.path] if self.run_folder is not None and has_checkpoints else [])

    def _wait_for_leader(self) -> None:
        """Until rank 0 has come here too.

        Raises:
            SystemExit: it has not, and has said why.
        """
        if self.ranks is not None:
            try:
                self.ranks.from_leader(None)
            except LostRankError:
                raise SystemExit(1) from None

    # The parts, each replaceable by a subclass.

    def _summary(self, trainer: E2ESAETrainer) -> str:
        return summarise(trainer, self.cfg)

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
        model.output = self.spliced_model.output
        return model

    def _seekable_store(self) -> SeekableActivationsStore:
        """The host builds its store itself; this one gives the same sequences, and can go back to a place in them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the host's store has said it all already
            store = SeekableActivationsStore.from_config(
                self.model, self.cfg, override_dataset=self.activations_store.dataset
            )
        self.activations_store = self.evaluator.activations_store = store
        store = cast(SeekableActivationsStore, store)
        store.source = self.data.name
        if store.is_dataset_tokenized and self.data.settings is not None:
            check_tokenized_for(self.data.settings.dataset_path, getattr(self.model, "tokenizer", None))
        return store

    def _token_stream(self, store: SeekableActivationsStore, holds_out: bool, *, checks_tokenizer: bool) -> TokenStream:
        tokenizer, cfg = getattr(self.model, "tokenizer", None), self.cfg
        if checks_tokenizer and tokenizer is not None and not store.is_dataset_tokenized:
            check_tokenizer(tokenizer, self.spliced_model.vocabulary, prepend_bos=cfg.prepend_bos)
        try:
            return TokenStream(
                store,
                n_prompts=cfg.step_size_prompts,
                n_held_out=self._n_held_out_prompts() if holds_out else 0,
                vocabulary=self.spliced_model.vocabulary,
            )
        except ValueError as error:
            if not cfg.skip_examples:
                raise
            raise ValueError(f"{error} skip_examples={cfg.skip_examples} leaves out the rows before.") from error

    def _build_trainer(self) -> E2ESAETrainer:
        output = self.cfg.output_path
        return E2ESAETrainer(
            cfg=self.cfg,
            sae=self.sae,
            spliced_model=self.spliced_model,
            data_provider=self.tokens,
            metrics_log=MetricsLog(
                Path(output) if output is not None and self.leads else None,
                to_wandb=self.cfg.logger.log_to_wandb and self.leads,
                resume=self.resumed_from is not None,
                kept_by_another=not self.leads,
            ),
            held_out_evaluator=None if self.evaluation_tokens is None else self._evaluate,
            save_checkpoint_fn=self.save_checkpoint,
            excluded_tokens=self.activations_store.exclude_special_tokens,
            run_folder=self.run_folder,
            identity=self.identity,
            ranks=self.ranks,
        )

    def _evaluate(self, trainer: E2ESAETrainer) -> dict[str, float]:
        assert self.evaluation_tokens is not None
        scaler = trainer.activation_scaler

        def reconstruct(sae_in: Tensor) -> tuple[Tensor, Tensor]:
            scaled = scaler(sae_in.to(self.sae.device, torch.float32))
            if trainer.shard is not None:
                feature_acts, sae_out = sharded_sae.reconstruct(
                    self.sae, scaled, ShardedTokens(trainer.shard.ranks, None)
                )
                return feature_acts, scaler.unscale(sae_out)
            feature_acts = self.sae.encode(scaled)
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
        if trainer.shard is not None:  # each rank has counted its own features
            l0 = float(trainer.shard.ranks.exchange([metrics.l0]).sum())
            metrics = dataclasses.replace(metrics, l0=l0)
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
            resume=None if self.resumed_from is None else "allow",
        )

    @property
    def _end(self) -> RunEnd:
        """For a run that stops before its last step."""
        return RunEnd(self.run_folder, self.ranks, self._folders, self._wait_for_leader)

    # Saving.

    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        flatten_heads(self.sae)
        self.sae.cfg.metadata.objective = self.cfg.objective.to_dict()
        self.sae.cfg.metadata.local_first = self.cfg.local_first
        self.sae.cfg.metadata.downstream_hooks = list(self.spliced_model.downstream_hooks)
        self.sae.cfg.metadata.seed = self.cfg.seed
        self.sae.cfg.metadata.run_identity = self.identity
        self.sae.cfg.metadata.tokenizer_sha256 = tokenizer_fingerprint(getattr(self.model, "tokenizer", None))
        self.sae.cfg.metadata.e2e_sae_plugin_version = __version__

    @property
    def _stream(self) -> TokenStream:
        """Where the batches come from."""
        return self.tokens

    def _record_rows(self, metadata: Any, n_training_tokens: int) -> None:
        """Say in an SAE's metadata which rows it was trained on, after those of earlier runs."""
        record = TrainedRows.of_run(self.data, self._stream.rows(), n_training_tokens, self.cfg.context_size)
        metadata[RECORD] = [*self._earlier_rows, record.to_dict()]

    def _clear_leftovers(self) -> None:
        """What killed starts of the run have left half done."""
        if self.run_folder is not None:
            self.run_folder.clean()
        if self.cfg.output_path is not None:
            recover(Path(self.cfg.output_path))

    def save_final_sae(
        self, sae: TrainingSAE[Any], output_path: str, log_feature_sparsity: Tensor | None = None
    ) -> None:
        """SAELens's files, with a `runner_cfg.json` that SAELens can read and the whole config beside it.

        They are written aside and moved into place once they are whole and on disk, `cfg.json`, without which nothing
        loads, last.

        Raises:
            OSError, SafetensorError: they cannot be written.
        """
        with whole_files(Path(output_path), last=SAE_CFG_FILENAME) as folder:
            super().save_final_sae(sae, str(folder), log_feature_sparsity)
            write_configs(self.cfg, folder)

    def _save_or_keep_resumable(self, trainer: E2ESAETrainer, output_path: str, sae: Any = None) -> None:
        """Save `sae`, or the trainer's; where that fails, a checkpoint. Of a sharded dictionary rank 0 saves the whole, and
        the others are here for the checkpoint."""
        error, checkpoint = None, None
        if self.leads:
            try:
                self.save_final_sae(trainer.sae if sae is None else sae, output_path, trainer.log_feature_sparsity)
            except WRITE_ERRORS as caught:
                error = caught
        failed = error is not None if trainer.shard is None else trainer.shard.ranks.from_leader(error is not None)
        if failed:
            trainer.unfold()
            checkpoint = trainer.checkpointer.at_stop(trainer)
        if error is not None:
            where = "It is still in memory, as runner.sae." if checkpoint is None else how_to_resume(checkpoint)
            raise OSError(
                f"The finished SAE could not be saved in output_path={output_path!r}: {error}. {where}"
            ) from error

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Called by the trainer once all else of a checkpoint is in `checkpoint_path`; None for nowhere."""
        if checkpoint_path is None:
            return
        write_configs(self.cfg, checkpoint_path)
        config = read_saved_config(checkpoint_path / SAE_CFG_FILENAME)
        state = read_saved_config(checkpoint_path / STATE_FILENAME)
        self._record_rows(config["metadata"], state["n_training_samples"])
        (checkpoint_path / SAE_CFG_FILENAME).write_text(json.dumps(config))

    def run_trainer_with_interruption_handling(self, trainer: Any) -> TrainingSAE[Any]:
        """Train; if that is interrupted or fails, write a checkpoint first and say how to go on.

        The host's own version saves no weights and leaves its signal handlers installed.

        Raises:
            RunInterrupted: SIGINT or SIGTERM came.
        """
        try:
            return trainer.fit()
        except Stopped:
            number = trainer.stop_request.signal_number
            saves = self.leads or trainer.shard is not None  # every rank has a part to give
            checkpoint = self._end.save_at_stop(trainer, signal.Signals(number).name) if saves else None
            if self.ranks is not None:  # the others stay until it is saved: where one ends, torchrun ends all
                checkpoint = self.ranks.from_leader(checkpoint)
            raise run_interrupted(number, checkpoint) from None
        except KeyboardInterrupt:
            if trainer.checkpointer.last is not None:
                logger.warning("Stopped at once. %s", how_to_resume(trainer.checkpointer.last))
            raise
        except Exception as error:
            if self.ranks is None:
                self._end.save_at_stop(trainer, type(error).__name__)
            else:
                self._end.of_ranks(trainer, error)
            raise
