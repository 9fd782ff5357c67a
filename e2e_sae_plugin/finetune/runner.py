"""`FinetuneRunner`: a run that starts from a finished SAE and ends with one of the same form, and the report on both."""

from __future__ import annotations

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.config import HfDataset
from sae_lens.constants import SAE_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import save_file
from torch import Tensor

from e2e_sae_plugin.checkpoint.folder import whole_files, write_whole
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.data.settings import text_name
from e2e_sae_plugin.evaluation import SpliceMetrics, encode_with, measure, reconstruct_with
from e2e_sae_plugin.evaluation.place import Place, check_centred, flatten_heads
from e2e_sae_plugin.evaluation.tokens import MeasuredTokens
from e2e_sae_plugin.finetune.checks import (
    check_given_model,
    check_l1_coefficient,
    check_not_overwritten,
    check_same_sae,
    check_tokenizer,
    warn_of_overlap,
    without_row_settings,
)
from e2e_sae_plugin.finetune.gauge import balancing_factor, unfold_scale
from e2e_sae_plugin.finetune.labels import label_transfer
from e2e_sae_plugin.finetune.lineage import finetuned_metadata
from e2e_sae_plugin.finetune.movement import movement
from e2e_sae_plugin.finetune.report import FinetuneReport
from e2e_sae_plugin.finetune.start import finished_form, training_counterpart
from e2e_sae_plugin.output_folder import write_configs
from e2e_sae_plugin.preflight import check_device
from e2e_sae_plugin.rank_checks import check_alone
from e2e_sae_plugin.runner import E2ESAETrainingRunner
from e2e_sae_plugin.spliced_losses import clean_micro_batch
from e2e_sae_plugin.torch_state import own_torch_state
from e2e_sae_plugin.trainer import E2ESAETrainer

logger = logging.getLogger(__name__)

REPORT_FILENAME = "finetune_report.json"
TABLE_FILENAME = "finetune_report.md"
FEATURES_FILENAME = "finetune_features.csv"
PROGRESS_SHARE = 8
"""The evaluations during a run use this fraction of the held-out sequences."""


class FinetuneRunner(E2ESAETrainingRunner):
    """Fine-tunes a finished SAE. What comes out has the original's form, features in the same places, and its lineage in
    the metadata; beside it lie a report on before and after, and what became of each feature.

    Args:
        cfg: from `finetune_config`, of the same SAE.
        sae: the SAE to start from; it is left as it is.
        source: where it came from, for the metadata.
        force: accept a model or tokenizer other than that of the SAE's metadata, and weights that are not centred.
        override_dataset: as in `E2ESAETrainingRunner`.
        override_model: as in `E2ESAETrainingRunner`.
        override_evaluation_tokens: as in `E2ESAETrainingRunner`.

    Raises:
        ValueError: the SAE does not fit the model, its tokenizer or the config, or as in `E2ESAETrainingRunner`.
    """

    @own_torch_state()
    def __init__(
        self,
        cfg: E2ESAERunnerConfig,
        sae: SAE[Any],
        *,
        source: str | None = None,
        force: bool = False,
        override_dataset: HfDataset | None = None,
        override_model: Any = None,
        override_evaluation_tokens: Tensor | None = None,
    ):
        check_alone("A fine-tune", "Start it once, without torchrun.")
        check_device(cfg)  # the SAE is moved there first
        if override_model is not None and not force:
            check_given_model(sae, override_model)
        check_same_sae(sae, cfg)
        if override_dataset is not None:
            cfg = without_row_settings(cfg)
        check_not_overwritten(sae, cfg)
        if cfg.n_eval_batches == 0:
            raise ValueError(
                "n_eval_batches=0 leaves no tokens for the report of before and after: set it to 1 or more."
            )
        if cfg.hub_checkpoints:
            raise ValueError(
                "hub_checkpoints=True is refused in a fine-tune: its checkpoints are in training form, and only the "
                "finished SAE is put back into its original's. Leave it out."
            )
        self.original, self.source, self.force = sae.to(cfg.device), source, force
        super().__init__(
            cfg,
            override_dataset=override_dataset,
            override_model=override_model,
            override_sae=training_counterpart(sae, cfg.sae),
            override_evaluation_tokens=override_evaluation_tokens,
        )
        if not force:
            check_tokenizer(sae, getattr(self.model, "tokenizer", None))
            check_centred(sae, self.spliced_model, self.spliced_model.check(min(8, cfg.context_size)))
        assert self.evaluation_tokens is not None
        if override_evaluation_tokens is None:
            warn_of_overlap(sae, self.data.settings, self._held_out_rows, cfg.context_size)
        self.report_tokens = self.evaluation_tokens
        self.evaluation_tokens = self.report_tokens[: max(1, len(self.report_tokens) // PROGRESS_SHARE)]
        self.report: FinetuneReport | None = None
        self._last_said = -1

    def run(self) -> SAE[Any]:
        """Fine-tune, save, report, share if that is asked; returns the fine-tuned SAE in inference form. The report is
        `self.report`.

        Of a run that `"auto"` finds finished, the SAE that it has saved; `self.report` is None then, unless the report was
        missing and is made up for.
        """
        return super().run()

    def _train_and_save(self) -> SAE[Any]:
        if not self.is_finished and self.resumed_from is None:
            self._check_sparsity()
            before, n_shown = self.before, 0 if self.evaluation_tokens is None else len(self.evaluation_tokens)
            self._say(
                f"Before: CE loss increase {before.ce_loss_increase:+.4f} (from {before.ce_loss_without_sae:.4f}), KL "
                f"{before.kl:.4f}, L0 {before.l0:.1f}, on {before.n_tokens:,} held-out tokens "
                f"in {len(self.report_tokens):,} sequences. While it trains, on the first {n_shown:,} of these:"
            )
        sae = super()._train_and_save()
        output = None if self.cfg.output_path is None else Path(self.cfg.output_path)
        finished = sae if self.is_finished else self._finished(self.trainer.sae)
        if self.is_finished and output is not None and (output / REPORT_FILENAME).exists():
            self._say(f"\n{(output / TABLE_FILENAME).read_text()}")
            return finished
        self.report = self._compare(finished)
        if output is not None:
            self._write_report(self.report, output)
        self._say(f"\n{self.report}")
        return finished

    # Before and after.

    @cached_property
    def before(self) -> SpliceMetrics:
        """The original SAE on the held-out tokens."""
        return self._measure(self.original)

    def _measure(self, sae: SAE[Any]) -> SpliceMetrics:
        with self.spliced_model.autocast(self.cfg.autocast_lm):
            return measure(
                reconstruct_with(sae, self._activation_shape), self.spliced_model, self.report_tokens, **self._places()
            )

    @cached_property
    def _activation_shape(self) -> tuple[int, ...]:
        """Of one token, for SAEs that reshape heads by themselves."""
        clean = self.spliced_model.clean_pass(self.report_tokens[:1], hidden=False, downstream=False)
        return tuple(clean.activation.shape[2:])

    @property
    def _held_out_rows(self) -> tuple[int, int]:
        """First and last row of the dataset that held-out sequences are of."""
        first = self.cfg.skip_examples
        return first, first + self.tokens.n_held_out_rows - 1

    def _measured_on(self, held_out_are_given: bool) -> MeasuredTokens:
        """The tokens of before and after."""
        excluded = self.activations_store.exclude_special_tokens
        place = Place(
            self.cfg.hook_name,
            self.cfg.hook_head_index,
            tuple(self.cfg.seqpos_slice),
            () if excluded is None else tuple(sorted(excluded.cpu().tolist())),
        )
        n_sequences, context_size = self.report_tokens.shape
        source = MeasuredTokens(n_sequences, context_size)
        settings = self.data.settings
        if settings is not None and not held_out_are_given:
            source = MeasuredTokens(
                n_sequences,
                context_size,
                dataset=text_name(settings.dataset_path),
                split=settings.split,
                text_column=settings.text_column,
                shuffle_seed=settings.shuffle_seed,
                rows=(self._held_out_rows,),
                prepend_bos=None if self.activations_store.is_dataset_tokenized else self.cfg.prepend_bos,
            )
        return source.of(self.report_tokens, place)

    def _places(self) -> dict[str, Any]:
        return {
            "batch_size_prompts": self.cfg.eval_batch_size_prompts or self.cfg.store_batch_size_prompts,
            "seqpos_slice": self.cfg.seqpos_slice,
            "excluded": self.activations_store.exclude_special_tokens,
            "head_index": self.cfg.hook_head_index,
        }

    def _compare(self, finished: SAE[Any]) -> FinetuneReport:
        moved = movement(self.original, finished)
        before, after = (encode_with(sae, self._activation_shape) for sae in (self.original, finished))
        with self.spliced_model.autocast(self.cfg.autocast_lm):
            labels = label_transfer(before, after, moved, self.spliced_model, self.report_tokens, **self._places())
        return FinetuneReport(
            before=self.before,
            after=self._measure(finished),
            movement=moved,
            labels=labels,
            training_tokens=finished.cfg.metadata.finetuning["training_tokens"],
            d_sae=self.original.cfg.d_sae,
            measured_on=self._measured_on(self.tokens.held_out is None),
        )

    def _write_report(self, report: FinetuneReport, output: Path) -> None:
        try:
            report.labels.write_csv(output / FEATURES_FILENAME)
            write_whole(output / TABLE_FILENAME, report.to_markdown())
            write_whole(output / REPORT_FILENAME, json.dumps(report.to_dict(), indent=2) + "\n")
        except OSError as error:  # the SAE is saved; a report that cannot be is no reason to fail
            logger.error("The report could not be written to %s: %s", output, error)

    # What the run does otherwise.

    def _check_sparsity(self) -> None:
        """The coefficient of the metadata against what the SAE's reconstructions say of it."""
        known = self.original.cfg.metadata.training_architecture_details or {}
        coefficient: Any = getattr(self.cfg.sae, "l1_coefficient", None)
        if self.force or self.original.cfg.architecture() != "standard" or coefficient != known.get("l1_coefficient"):
            return  # the user's own, or one that is not on the reconstruction's scale
        places = self._places()
        batch_size, head_index = places.pop("batch_size_prompts"), places.pop("head_index")
        micro = clean_micro_batch(
            self.spliced_model, self.report_tokens[:batch_size], hidden=False, downstream=False, **places
        )
        x = micro.sae_in(head_index).to(self.original.W_dec.device, self.original.W_dec.dtype)
        check_l1_coefficient(self.original, float(coefficient), x, self._activation_shape)

    def _evaluate(self, trainer: E2ESAETrainer) -> dict[str, float]:
        found = super()._evaluate(trainer)
        if trainer.n_training_samples == self._last_said:
            return found  # the last step's evaluation and that of the end are one
        self._last_said = trainer.n_training_samples
        self._say(
            f"{trainer.n_training_samples:>13,} tokens   held-out KL {found['metrics/held_out_kl']:.4f}   "
            f"CE loss increase {found['metrics/ce_loss_increase']:+.4f}   L0 {found['metrics/held_out_l0']:.1f}"
        )
        return found

    def _build_trainer(self) -> E2ESAETrainer:
        factor = balancing_factor(self.original)
        unfold_scale(self.sae, factor)  # folded again at the end, as an estimated normalisation is
        self.trainer = super()._build_trainer()
        if factor != 1:
            self.trainer.activation_scaler.scaling_factor = factor
        return self.trainer

    def _summary(self, trainer: E2ESAETrainer) -> str:
        """The report says the rest, on all the held-out tokens."""
        text = f"\nFine-tuned for {trainer.n_training_steps:,} steps, {trainer.n_training_samples:,} tokens."
        if trainer.early_stop.reached:
            n = trainer.early_stop.n_without_gain
            text += f" It stopped early: the held-out KL has not fallen for {n} evaluations in a row."
        if self.cfg.output_path is not None:
            text += f"\nSaved in {self.cfg.output_path} (sae_lens.SAE.load_from_disk reads it)."
        return text

    def _finished(self, trained: TrainingSAE[Any]) -> SAE[Any]:
        """The fine-tuned SAE in the original's form, with where it comes from in its metadata."""
        finished = finished_form(trained, self.original)
        finished.cfg.metadata = finetuned_metadata(
            self.original.cfg.metadata,
            trained.cfg.metadata,
            self.cfg,
            source=self.source,
            weights_sha256=self.identity["override_sae"],
            training_tokens=self.trainer.n_training_samples,
            trained_parameters=sorted(self.trainer.trained_parameters()),
        )
        flatten_heads(finished)
        return finished

    def save_final_sae(
        self, sae: TrainingSAE[Any], output_path: str, log_feature_sparsity: Tensor | None = None
    ) -> None:
        """In the original's form. SAELens's export of a training SAE would fold its decoder's norms into its encoder.

        Raises:
            OSError, SafetensorError: it cannot be written.
        """
        with whole_files(Path(output_path), last=SAE_CFG_FILENAME) as folder:
            weights, config = self._finished(sae).save_model(folder)
            sparsity = None
            if log_feature_sparsity is not None:
                sparsity = folder / SPARSITY_FILENAME
                save_file({"sparsity": log_feature_sparsity}, sparsity)
            write_configs(self.cfg, folder)
            if self.cfg.logger.log_to_wandb:
                self.cfg.logger.log(self, weights, config, sparsity_path=sparsity, wandb_aliases=["final_model"])
