"""One optimizer step: from token sequences through the model and the SAE, and back."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer, SaveCheckpointFn
from torch import Tensor
from torch.nn import Parameter

from e2e_sae_plugin import kernels
from e2e_sae_plugin.adapters import build_adapter
from e2e_sae_plugin.architectures import (
    AUXILIARY_FOR_DEAD_FEATURES,
    RUN_TIME_NORMALISATIONS,
    TOKEN_SEPARABLE,
    combine_sae_losses,
    inner_reconstructions,
)
from e2e_sae_plugin.checkpoint.state import State, capture
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.constraints import DecoderNorms, freeze
from e2e_sae_plugin.early_stop import EarlyStop
from e2e_sae_plugin.faults import NonFiniteError, StepStatistics, find_fault
from e2e_sae_plugin.kernels.heap import give_back
from e2e_sae_plugin.kernels.sparse import fired_counts
from e2e_sae_plugin.kernels.sparse_sae import SPARSE_DENSITY
from e2e_sae_plugin.metrics_log import MetricsLog
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.splice import SplicedModel
from e2e_sae_plugin.splice.activations import trained_tokens
from e2e_sae_plugin.spliced_losses import MicroBatch, SplicedTerms, clean_micro_batch, position_draws, spliced_terms
from e2e_sae_plugin.step_output import merge_step_outputs, without_large_tensors
from e2e_sae_plugin.token_stream import TokenStream

logger = logging.getLogger(__name__)

KL_FLOOR = 1e-6
"""Nats per token: the smallest KL that `Objective.balance_kl` divides by."""


class SplicedStepTrainer(SAETrainer[TrainingSAE[Any], Any]):
    """SAELens's trainer with another `step`: token sequences `[n_prompts, pos]` in; clean pass, SAE, spliced pass,
    objective, one backward, one update. The gradient-norm clip is `max_grad_norm`, and a step whose loss or gradient is
    not finite does not reach the weights.

    Micro-batches give the gradient of the one big batch. Where tokens do not touch each other (`TOKEN_SEPARABLE`) the SAE
    goes through the micro-batches with the model; elsewhere (BatchTopK) it runs once on the whole step, as SAELens's
    trainer runs it, and only the model's passes are chunked. What advances once per step (thresholds, dead-feature
    counters, schedules) does not see the micro-batches.

    Args: as in `E2ESAETrainer`.
    """

    act_freq_scores: Tensor
    n_forward_passes_since_fired: Tensor

    def __init__(
        self,
        cfg: E2ESAERunnerConfig,
        sae: TrainingSAE[Any],
        spliced_model: SplicedModel,
        data_provider: Iterator[Tensor],
        metrics_log: MetricsLog,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        excluded_tokens: Tensor | None = None,
    ):
        super().__init__(
            cfg=cfg.to_sae_trainer_config(),
            sae=sae,
            data_provider=data_provider,
            save_checkpoint_fn=save_checkpoint_fn,
        )
        self.runner_cfg = cfg
        freeze(sae, cfg.frozen_parameters)
        self.decoder_norms = DecoderNorms(sae) if cfg.keep_decoder_norms else None
        self.adapter = build_adapter(sae, cfg.adapter, cfg.adapter_rank, cfg.frozen_parameters, cfg.seed)
        self.optimizer.param_groups[0]["params"] = list(self.trained_parameters().values())
        # One pass over weights, gradients and moments, where torch's default takes a dozen and as much memory again. Local
        # training stays the host's own computation, to the bit.
        self.optimizer.param_groups[0]["fused"] = cfg.objective.needs_spliced_pass
        self.spliced_model = spliced_model
        self.spliced_model.recompute_blocks(cfg.checkpoint_blocks)
        self.metrics_log = metrics_log
        self.excluded_tokens = excluded_tokens
        self.grad_norm: Tensor | None = None
        self.l0 = torch.zeros(())  # of the last step
        self.kl_scale: Tensor | None = None  # of the last step, with balance_kl
        self._draws = position_draws(cfg.seed, 0)  # of the current step, with kl_positions; its micro-batches share it
        self.n_skipped_steps = 0
        self.n_skipped_in_a_row = 0
        self._good_state: State | None = None  # before the first of the steps that are being skipped
        self.last_good_state: State | None = None  # that, once they are too many
        self.is_updating = False
        self.early_stop = EarlyStop(cfg.patience_evaluations)

    def trained_parameters(self) -> dict[str, Parameter]:
        """What the optimizer moves, by name: the SAE's parameters that are not frozen, an adapter's in the place of those
        that it stands for."""
        adapted = () if self.adapter is None else self.adapter.weights
        named = {name: p for name, p in self.sae.named_parameters() if p.requires_grad and name not in adapted}
        return named | ({} if self.adapter is None else self.adapter.parameters)

    @property
    def objective(self) -> Objective:
        """What the current step minimises: the local objective in the first `local_first` of the run's tokens."""
        still_local = self.n_training_samples < self.runner_cfg.local_first * self.runner_cfg.training_tokens
        return Objective.local() if self.runner_cfg.local_first and still_local else self.runner_cfg.objective

    def step(self, batch: Int[Tensor, "prompts pos"]) -> TrainStepOutput:
        """Train on one batch of token sequences `[n_prompts, pos]`.

        Returns:
            As in SAELens: `loss` is the whole weighted objective, `losses` its terms unweighted; all detached.

        Raises:
            ValueError: every token of the batch is excluded.
        """
        outputs: list[TrainStepOutput] = []
        shares: list[float] = []
        n_tokens = self._n_trained_tokens(batch)
        if not n_tokens:
            raise ValueError(
                f"Every token of the batch at step {self.n_training_steps} is excluded by exclude_special_tokens="
                f"{self.runner_cfg.exclude_special_tokens!r}, so there is nothing to train on."
            )
        fired = torch.zeros_like(self.act_freq_scores)
        self._draws = position_draws(self.runner_cfg.seed, self.n_training_steps)
        before = StepStatistics(self)
        try:
            for tokens in self._sae_batches(batch):
                share = self._n_trained_tokens(tokens) / n_tokens
                if share > 0:
                    outputs.append(self._forward_and_backward(tokens, share, fired))
                    shares.append(share)
            output = merge_step_outputs(outputs, shares)
            self._count_firing(fired, n_tokens)
            finite = self._clip_gradients() and bool(torch.isfinite(output.loss))
        except BaseException:
            before.restore(self)
            raise
        if not finite:
            before.restore(self)
            self._skip(batch)
        self.is_updating = True  # from here to the count, the weights are of no step
        if finite:
            self._update()
        self._advance_schedules()
        # Last, where the host counts first: an interrupted step has not been trained on, and is done again on resume.
        self.n_training_samples += batch.shape[0] * self.runner_cfg.training_context_size
        self.is_updating = False
        return output

    def _n_trained_tokens(self, tokens: Tensor) -> int:
        mask = trained_tokens(tokens, self.runner_cfg.seqpos_slice, self.excluded_tokens)
        return tokens.numel() if mask is None else int(mask.sum())

    def _sae_batches(self, batch: Tensor) -> tuple[Tensor, ...]:
        """The sequences that the SAE runs on together: a micro-batch where tokens do not touch each other, else all.

        Local training has no passes to wait for, and keeps the host's order of summation.
        """
        separable = self.sae.cfg.architecture() in TOKEN_SEPARABLE and self.objective.needs_spliced_pass
        separable &= not self.objective.balance_kl  # whose scale is known when the whole step's KL is
        separable &= not self._parts_cost_more(batch)
        return batch.split(self.runner_cfg.micro_batch_size_prompts if separable else len(batch))

    def _parts_cost_more(self, batch: Tensor) -> bool:
        """Whether to run the SAE once takes less memory than micro-batches, whose gradients of full size are summed up.

        By statistics that a checkpoint has, so that a resumed run adds up its gradients in the same order.
        """
        if not kernels.can_be_sparse(self.sae):
            return False  # the host's code makes several `[tokens, d_sae]` tensors
        if self.n_frac_active_samples:
            density = float(self.act_freq_scores.mean()) / self.n_frac_active_samples
            if density < SPARSE_DENSITY / 2:  # by a margin: where it turns out dense after all, that takes more memory
                return True
        further_tokens = batch[self.runner_cfg.micro_batch_size_prompts :].numel()
        return kernels.takes_less_at_once(further_tokens, self.sae.cfg.d_in)

    def _forward_and_backward(self, tokens: Tensor, share: float, fired: Tensor) -> TrainStepOutput:
        """Adds the gradient of these sequences' part of the step to the SAE's parameters.

        Args:
            share: their trained tokens as a share of the step's, by which means over them enter the step's means.
            fired: `[d_sae]`, receives how many of the tokens each feature fired on.
        """
        micro_batches = self.clean_micro_batches(
            tokens, hidden=self.objective.kl > 0, downstream=self.objective.beta > 0
        )
        output = self.sae_forward(self.scaled_sae_in(micro_batches))
        with torch.no_grad():
            fired += fired_counts(output.feature_acts)
        reconstructions = self.reconstructions(output)
        spliced = self._spliced_terms(micro_batches, reconstructions, output.loss)
        if self.objective.balance_kl:
            spliced.scale(self._kl_scale(output, spliced))
        sae_total, sae_terms = combine_sae_losses(output, self.sae.cfg.architecture(), self.objective, spliced.weighted)
        # One backward through the SAE, from its own losses and from what the spliced passes ask of its output.
        roots = [(sae_total, torch.full_like(sae_total, share))]
        roots += [(r, g * share) for (_, _, r), g in zip(reconstructions, spliced.gradients, strict=True)]
        roots = [(root, seed) for root, seed in roots if root.requires_grad]
        if self.sae.device.type == "cpu" and reconstructions:
            give_back(sum(p.nbytes for p in self.sae.parameters()))
        torch.autograd.backward([root for root, _ in roots], [seed for _, seed in roots])
        output.loss = (spliced.weighted + sae_total).detach()
        output.losses = {**spliced.named, **sae_terms}
        return output if share == 1 else without_large_tensors(output)

    def clean_micro_batches(
        self, tokens: Tensor, *, hidden: bool = False, downstream: bool = False
    ) -> list[MicroBatch]:
        """Clean passes over `tokens [n_prompts, pos]`, at most `micro_batch_size_prompts` sequences at a time."""
        with self.model_autocast():
            return [
                clean_micro_batch(
                    self.spliced_model,
                    chunk,
                    hidden=hidden,
                    downstream=downstream,
                    seqpos_slice=self.runner_cfg.seqpos_slice,
                    excluded=self.excluded_tokens,
                )
                for chunk in tokens.split(self.runner_cfg.micro_batch_size_prompts)
            ]

    def scaled_sae_in(self, micro_batches: list[MicroBatch]) -> Tensor:
        """The step's activations `[tokens, d_in]` in fp32, normalised as the SAE trains on them."""
        return self.activation_scaler(self.raw_sae_in(micro_batches))

    def raw_sae_in(self, micro_batches: list[MicroBatch]) -> Tensor:
        """The step's activations `[tokens, d_in]` as the model has them, in fp32."""
        head = self.runner_cfg.hook_head_index
        acts = torch.cat([micro.sae_in(head) for micro in micro_batches])
        return acts.to(self.sae.device, torch.get_default_dtype())  # the dtype that the host's store hands out

    def sae_forward(self, sae_in: Tensor) -> TrainStepOutput:
        """The forward half of the host's `_train_step`."""
        self.sae.train()
        step_input = TrainStepInput(
            sae_in=sae_in,
            dead_neuron_mask=None if self._leaves_out_dead_features else self.dead_neurons,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )
        with self.autocast_if_enabled:
            # Local training stays the host's own computation, to the bit; but not the local part of a run.
            is_local = not self.runner_cfg.objective.needs_spliced_pass
            output = None if is_local else kernels.training_forward_pass(self.sae, step_input)
            return self.sae.training_forward_pass(step_input) if output is None else output

    @property
    def _leaves_out_dead_features(self) -> bool:
        """Whether the auxiliary loss, all that the mask of dead features is for there, has no weight and would fail."""
        cfg = self.sae.cfg
        fails = (
            cfg.architecture() in AUXILIARY_FOR_DEAD_FEATURES and cfg.normalize_activations in RUN_TIME_NORMALISATIONS
        )
        return self.objective.auxiliary == 0 and fails

    @torch.no_grad()
    def _count_firing(self, fired: Tensor, n_tokens: int) -> None:
        """The host's sparsity statistics, once per step, over the tokens really trained on."""
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[fired > 0] = 0
        self.act_freq_scores += fired
        self.n_frac_active_samples += n_tokens
        self.l0 = fired.sum() / n_tokens

    def reconstructions(self, output: TrainStepOutput) -> list[tuple[str, float, Tensor]]:
        """(suffix, weight, reconstruction in the model's own space): the SAE's output and Matryoshka's inner levels."""
        if not self.objective.needs_spliced_pass:
            return []
        named = [("", 1.0, output.sae_out)]
        with self.autocast_if_enabled:
            inner = [
                (f"_{width}", 1.0, tensor) for width, tensor in inner_reconstructions(self.sae, output.feature_acts)
            ]
        if inner and self.objective.matryoshka_levels == "sampled":
            # Drawn from the step's number, so that a resumed run draws what the run would have drawn.
            generator = torch.Generator().manual_seed(self.runner_cfg.seed * 1_000_003 + self.n_training_steps)
            suffix, _, tensor = inner[int(torch.randint(len(inner), (), generator=generator))]
            inner = [(suffix, float(len(inner)), tensor)]
        return [(suffix, weight, self.activation_scaler.unscale(tensor)) for suffix, weight, tensor in named + inner]

    def _spliced_terms(
        self, micro_batches: list[MicroBatch], reconstructions: list[tuple[str, float, Tensor]], like: Tensor
    ) -> SplicedTerms:
        if not reconstructions:
            return SplicedTerms(weighted=like.detach().new_zeros(()))
        with self.model_autocast():
            head = self.runner_cfg.hook_head_index
            return spliced_terms(self.spliced_model, self.objective, micro_batches, reconstructions, head, self._draws)

    def _clip_gradients(self) -> bool:
        """Clip; whether the gradients are finite."""
        if self.decoder_norms is not None:
            self.decoder_norms.project_gradient()
        if self.adapter is not None:
            self.adapter.pull_gradients()
        limit, trained = self.runner_cfg.max_grad_norm, list(self.trained_parameters().values())
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        norm = float(self.grad_norm)
        # torch's clip_grad_norm_ multiplies by 1 what is within the limit: one more pass over all gradients.
        if limit is not None and not norm <= limit:
            torch.nn.utils.clip_grads_with_norm_(trained, limit, self.grad_norm)
        return math.isfinite(norm)

    def _update(self) -> None:
        self.optimizer.step()
        if self.adapter is not None:
            self.adapter.write(None if self.decoder_norms is None else self.decoder_norms.norms)
        if self.decoder_norms is not None:
            self.decoder_norms.restore()
        self.optimizer.zero_grad()
        self.n_skipped_in_a_row, self._good_state = 0, None

    def _advance_schedules(self) -> None:
        """In the host's order. A skipped step counts: the number of steps is fixed in advance."""
        with warnings.catch_warnings():
            # Where the very first step is skipped, torch takes the order of the calls for a mistake.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before")
            self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()

    def _skip(self, batch: Tensor) -> None:
        """Count a step that is not finite, and say where that comes from.

        Raises:
            NonFiniteError: `max_skipped_steps` in a row were.
        """
        if self._good_state is None:
            self._good_state = capture(self, last_batch_is_trained=False)
        self.n_skipped_steps += 1
        self.n_skipped_in_a_row += 1
        too_many = self.n_skipped_in_a_row >= self.runner_cfg.max_skipped_steps
        if self.n_skipped_in_a_row > 1 and not too_many:
            return
        source = self.data_provider
        place = f"The batch: {source.describe_last_batch()}." if isinstance(source, TokenStream) else ""
        fault = f"{find_fault(self, batch)} {place}".strip()
        if too_many:
            self.last_good_state = self._good_state
            raise NonFiniteError(
                f"{self.n_skipped_in_a_row} steps in a row (max_skipped_steps), up to step {self.n_training_steps}, had a "
                f"loss or gradient that is not finite. None of them has reached the weights. {fault}"
            )
        logger.warning("Step %d is skipped: its loss or gradient is not finite. %s", self.n_training_steps, fault)

    def _kl_scale(self, output: TrainStepOutput, spliced: SplicedTerms) -> Tensor:
        """`alpha = MSE / KL` of the step; the KL has a floor, below which there is nothing to gain."""
        if "mse_loss" not in output.losses:
            raise ValueError(
                f"objective.balance_kl needs a loss named 'mse_loss', but architecture {self.sae.cfg.architecture()!r} "
                f"names {sorted(output.losses)}. Name it, or set objective.balance_kl=False."
            )
        self.kl_scale = output.losses["mse_loss"].detach() / spliced.named["kl_loss"].clamp(min=KL_FLOOR)
        return self.kl_scale

    def model_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for the model's passes, where `autocast_lm` asks for it."""
        return self.spliced_model.autocast(self.runner_cfg.autocast_lm)
