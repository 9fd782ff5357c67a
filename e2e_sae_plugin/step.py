"""One optimizer step: the gradient of token sequences, and the update, or why there is none."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.sae_trainer import SaveCheckpointFn
from torch import Tensor
from torch.nn import Parameter

from e2e_sae_plugin.adapters import build_adapter
from e2e_sae_plugin.checkpoint.state import State, capture
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.constraints import DecoderNorms, freeze
from e2e_sae_plugin.distributed import Ranks
from e2e_sae_plugin.early_stop import EarlyStop
from e2e_sae_plugin.faults import NOT_AGAIN, NonFiniteError, StepStatistics, find_fault, find_fault_alone
from e2e_sae_plugin.first_steps import FirstSteps
from e2e_sae_plugin.gradient import GradientTrainer
from e2e_sae_plugin.kernels.ranked_topk import share_threshold
from e2e_sae_plugin.metrics_log import MetricsLog
from e2e_sae_plugin.ranked_step import (
    check_digests,
    digest,
    dividing,
    sharded_norm,
    sum_gradients,
    sum_statistics,
)
from e2e_sae_plugin.shard import DIVIDED, Shard
from e2e_sae_plugin.splice import SplicedModel
from e2e_sae_plugin.splice.activations import trained_tokens
from e2e_sae_plugin.spliced_losses import position_draws
from e2e_sae_plugin.step_output import merge_step_outputs
from e2e_sae_plugin.token_stream import TokenStream
from e2e_sae_plugin.torch_state import own_torch_state

logger = logging.getLogger(__name__)


class SplicedStepTrainer(GradientTrainer):
    """SAELens's trainer with another `step`: token sequences `[n_prompts, pos]` in; clean pass, SAE, spliced pass,
    objective, one backward, one update. The gradient-norm clip is `max_grad_norm`, and a step whose loss or gradient is
    not finite does not reach the weights.

    What advances once per step (thresholds, dead-feature counters, schedules) does not see the micro-batches.

    Args: as in `E2ESAETrainer`.
    """

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
        ranks: Ranks | None = None,
    ):
        super().__init__(
            cfg=cfg.host_trainer_config(),
            sae=sae,
            data_provider=data_provider,
            save_checkpoint_fn=save_checkpoint_fn,
        )
        self.runner_cfg = cfg
        self.ranks, self._step_ranks = ranks, None
        self.shard = None
        if cfg.shard_dictionary:
            assert ranks is not None  # the runner has refused it
            self.shard = Shard(ranks, cfg.sae.d_sae)
            self.n_forward_passes_since_fired = torch.zeros(cfg.sae.d_sae, device=cfg.device)
            self._reset_running_sparsity_stats()
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
        self._has_updated = False  # this process, since it started or resumed
        self._good_state: State | None = None  # before the first of the steps that are being skipped
        self.last_good_state: State | None = None  # that, once they are too many
        self.is_updating = False
        self.early_stop = EarlyStop(cfg.patience_evaluations)
        self.first_steps = FirstSteps()

    def _reset_running_sparsity_stats(self) -> None:
        """As the host's, but of the whole SAE where this rank has a part of it: the statistics are the same on all."""
        super()._reset_running_sparsity_stats()
        if self.shard is not None:
            self.act_freq_scores = torch.zeros(self.shard.d_sae, device=self.cfg.device)

    def trained_parameters(self) -> dict[str, Parameter]:
        """What the optimizer moves, by name: the SAE's parameters that are not frozen, an adapter's in the place of those
        that it stands for."""
        adapted = () if self.adapter is None else self.adapter.weights
        named = {name: p for name, p in self.sae.named_parameters() if p.requires_grad and name not in adapted}
        return named | ({} if self.adapter is None else self.adapter.parameters)

    @own_torch_state()
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
        self._divide(batch)
        own = batch if self._step_ranks is None else self._step_ranks.part_of(batch)
        before = StepStatistics(self)
        try:
            for tokens in self._sae_batches(own):
                share = self._n_trained_tokens(tokens) / n_tokens
                if share > 0:
                    outputs.append(self._forward_and_backward(tokens, share, fired))
                    shares.append(share)
            output = merge_step_outputs(outputs, shares)
            if self.ranks is not None:
                output = self._add_up(batch, output, fired)
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

    def _divide(self, batch: Tensor) -> None:
        """Decide whose tokens the step's are, and from what their positions are drawn."""
        self._step_ranks = None if self.ranks is None else dividing(self.ranks, batch, self._n_trained_tokens)
        rank = 0 if self._step_ranks is None else self._step_ranks.rank
        self._draws = position_draws(self.runner_cfg.seed, self.n_training_steps, rank)

    def _add_up(self, batch: Tensor, output: TrainStepOutput, fired: Tensor) -> TrainStepOutput:
        """What each rank has of the step's loss and statistics, all but the gradients."""
        assert self.ranks is not None
        # First, and by way of the CPU: where a rank is gone, NCCL would wait for it.
        news = self.ranks.exchange([digest(batch), *self._news()])
        check_digests(self.ranks, news[:, 0].tolist(), self.n_training_steps)
        self._hear(news[:, 1:])
        if self.shard is not None or self._step_ranks is not None:
            share_threshold(self.sae, self.ranks, bool(fired.any()))
        if self._step_ranks is None:
            if self.shard is not None:
                self.ranks.sum_([fired])
            return output
        return sum_statistics(self._step_ranks, output, fired)

    def _news(self) -> list[float]:
        """What all ranks have to know of this one once a step."""
        return []

    def _hear(self, news: Tensor) -> None:
        """Every rank's `_news`, `[size, n]`, the same on all ranks."""

    def _n_trained_tokens(self, tokens: Tensor) -> int:
        mask = trained_tokens(tokens, self.runner_cfg.seqpos_slice, self.excluded_tokens)
        return tokens.numel() if mask is None else int(mask.sum())

    @torch.no_grad()
    def _count_firing(self, fired: Tensor, n_tokens: int) -> None:
        """The host's sparsity statistics, once per step, over the tokens really trained on."""
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[fired > 0] = 0
        self.act_freq_scores += fired
        self.n_frac_active_samples += n_tokens
        self.l0 = fired.sum() / n_tokens

    def _clip_gradients(self) -> bool:
        """Clip; whether the gradients are finite."""
        if self.decoder_norms is not None:
            self.decoder_norms.project_gradient()
        if self.adapter is not None:
            self.adapter.pull_gradients()
        limit, trained = self.runner_cfg.max_grad_norm, list(self.trained_parameters().values())
        if self.shard is not None:
            self.grad_norm = self._sharded_norm()
        else:
            if self._step_ranks is not None:
                sum_gradients(self._step_ranks, trained)
            self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        norm = float(self.grad_norm)
        # torch's clip_grad_norm_ multiplies by 1 what is within the limit: one more pass over all gradients.
        if limit is not None and not norm <= limit:
            torch.nn.utils.clip_grads_with_norm_(trained, limit, self.grad_norm)
        return math.isfinite(norm)

    def _sharded_norm(self) -> Tensor:
        """The norm of the whole SAE's gradient, once what every rank has of it is summed."""
        assert self.shard is not None
        trained = self.trained_parameters()
        everywhere = [p for name, p in trained.items() if name not in DIVIDED]
        if everywhere:  # each rank's features, and rank 0 for the reconstruction, have their part of b_dec's gradient
            sum_gradients(self.shard.ranks, everywhere)
        return sharded_norm(self.shard.ranks, [p for name, p in trained.items() if name in DIVIDED], everywhere)

    def _update(self) -> None:
        if not self.first_steps.are_over:
            self.first_steps.before_update(self.trained_parameters())
        self.optimizer.step()
        self._has_updated = True
        if self.adapter is not None:
            self.adapter.write(None if self.decoder_norms is None else self.decoder_norms.norms)
        if self.decoder_norms is not None:
            self.decoder_norms.restore()
        self.optimizer.zero_grad()
        self.n_skipped_in_a_row, self._good_state = 0, None
        if not self.first_steps.are_over:
            self.first_steps.after_update(self.trained_parameters())

    def _advance_schedules(self) -> None:
        """In the host's order. A skipped step counts: the number of steps is fixed in advance."""
        # Where the very first step is skipped, torch takes the order of the calls for a mistake. Only then: after
        # catch_warnings Python has forgotten which it has shown, so at every step all of a user's would come anew.
        with contextlib.nullcontext() if self._has_updated else warnings.catch_warnings():
            if not self._has_updated:
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
        fault = f"{self._find_fault(batch)} {place}".strip()
        if too_many:
            self.last_good_state = self._good_state
            raise NonFiniteError(
                f"{self.n_skipped_in_a_row} steps in a row (max_skipped_steps), up to step {self.n_training_steps}, had a "
                f"loss or gradient that is not finite. None of them has reached the weights. {fault}"
            )
        logger.warning("Step %d is skipped: its loss or gradient is not finite. %s", self.n_training_steps, fault)

    def _find_fault(self, batch: Tensor) -> str:
        """In this rank's part, or the first of the ranks' parts that has one."""
        ranks = self._step_ranks
        if self.shard is not None:
            own = batch if ranks is None else ranks.part_of(batch)
            found = self.shard.ranks.gather(find_fault_alone(self, own))
            faults = [f"{fault} (Of rank {rank}.)" for rank, fault in enumerate(found) if fault is not None]
            return faults[0] if faults else "The model's clean pass and the SAE's parameters are finite."
        if ranks is None:
            return find_fault(self, batch)
        found = ranks.gather(find_fault(self, ranks.part_of(batch)))
        faults = [f"{fault} (Of rank {rank}.)" for rank, fault in enumerate(found) if fault != NOT_AGAIN]
        return faults[0] if faults else NOT_AGAIN
