"""The gradient of one optimizer step: clean pass, SAE, spliced pass, objective, one backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from e2e_sae_plugin import kernels
from e2e_sae_plugin.architectures import (
    AUXILIARY_FOR_DEAD_FEATURES,
    RUN_TIME_NORMALISATIONS,
    TOKEN_SEPARABLE,
    combine_sae_losses,
    inner_reconstructions,
)
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.distributed import Ranks
from e2e_sae_plugin.kernels.heap import give_back
from e2e_sae_plugin.kernels.ranked_topk import chosen_across
from e2e_sae_plugin.kernels.sharded import ShardedTokens
from e2e_sae_plugin.kernels.sparse import fired_counts
from e2e_sae_plugin.kernels.sparse_sae import SPARSE_DENSITY
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.shard import Shard
from e2e_sae_plugin.splice import SplicedModel
from e2e_sae_plugin.spliced_losses import MicroBatch, SplicedTerms, clean_micro_batch, spliced_terms
from e2e_sae_plugin.step_output import without_large_tensors

KL_FLOOR = 1e-6
"""Nats per token: the smallest KL that `Objective.balance_kl` divides by."""


class GradientTrainer(SAETrainer[TrainingSAE[Any], Any]):
    """SAELens's trainer with what adds the gradient of token sequences to the SAE's parameters.

    Micro-batches give the gradient of the one big batch. Where tokens do not touch each other (`TOKEN_SEPARABLE`) the SAE
    goes through the micro-batches with the model, unless that takes more memory; elsewhere (BatchTopK) it runs once on the
    whole step, as SAELens's trainer runs it, and only the model's passes are chunked.

    Attributes that `SplicedStepTrainer` sets are declared here.
    """

    act_freq_scores: Tensor
    runner_cfg: E2ESAERunnerConfig
    spliced_model: SplicedModel
    excluded_tokens: Tensor | None
    kl_scale: Tensor | None
    """Of the last step, with `balance_kl`."""
    shard: Shard | None
    """Which of the SAE's features `sae` has, where other ranks have the others; None where it has all."""
    _step_ranks: Ranks | None
    """Between which the tokens of the current step are divided; None where this process has all of them."""
    _draws: np.random.Generator
    """Of the current step, with `kl_positions`; its micro-batches share it."""

    @property
    def objective(self) -> Objective:
        """What the current step minimises: the local objective in the first `local_first` of the run's tokens."""
        still_local = self.n_training_samples < self.runner_cfg.local_first * self.runner_cfg.training_tokens
        return Objective.local() if self.runner_cfg.local_first and still_local else self.runner_cfg.objective

    def _sae_batches(self, batch: Tensor) -> tuple[Tensor, ...]:
        """The sequences that the SAE runs on together: a micro-batch where tokens do not touch each other, else all.

        Local training has no passes to wait for, and keeps the host's order of summation. Of a sharded dictionary the
        ranks talk in every forward pass, so all of them make one.
        """
        if self.shard is not None:
            return (batch,)
        separable = self.sae.cfg.architecture() in TOKEN_SEPARABLE and self.objective.needs_spliced_pass
        separable &= not self.objective.balance_kl  # whose scale is known when the whole step's KL is
        separable &= not self._parts_cost_more(batch)
        return batch.split(self._micro_batch_size(batch) if separable else len(batch))

    def _micro_batch_size(self, batch: Tensor) -> int:
        """Sequences of `batch` that go through the model at once."""
        return (
            self.runner_cfg.micro_batch_of(len(batch)) if self._step_ranks else self.runner_cfg.micro_batch_size_prompts
        )

    def _parts_cost_more(self, batch: Tensor) -> bool:
        """Whether to run the SAE once takes less memory than micro-batches, whose gradients of full size are summed up.

        By statistics that a checkpoint has, so that a resumed run adds up its gradients in the same order.
        """
        with self.autocast_if_enabled:  # under which no kernel stands for the host's code
            has_kernel = kernels.can_be_sparse(self.sae)
        if not has_kernel:
            return False  # the host's code makes several `[tokens, d_sae]` tensors
        if self.n_frac_active_samples:
            density = float(self.act_freq_scores.mean()) / self.n_frac_active_samples
            if density < SPARSE_DENSITY / 2:  # by a margin: where it turns out dense after all, that takes more memory
                return True
        further_tokens = batch[self._micro_batch_size(batch) :].numel()
        return kernels.takes_less_at_once(further_tokens, self.sae.cfg.d_in)

    def _forward_and_backward(self, tokens: Tensor, share: float, fired: Tensor) -> TrainStepOutput:
        """Adds the gradient of these sequences' part of the step to the SAE's parameters.

        Args:
            share: their trained tokens as a share of the step's, by which means over them enter the step's means.
            fired: `[d_sae]`, receives how many of the tokens each feature fired on; of a sharded dictionary, how many of
                all ranks' tokens each of this rank's features did.
        """
        micro_batches = self.clean_micro_batches(
            tokens, hidden=self.objective.kl > 0, downstream=self.objective.beta > 0
        )
        with chosen_across(self.sae, self._step_ranks if self.shard is None else None):
            output = self.sae_forward(self.scaled_sae_in(micro_batches))
        with torch.no_grad():
            if self.shard is None:
                fired += fired_counts(output.feature_acts)
            else:  # of all tokens, but no other features, which says nothing of a token
                fired[self.shard.features] += fired_counts(output.feature_acts)
                output.feature_acts = output.sae_out.new_empty(0, self.shard.width)
        reconstructions = self.reconstructions(output)
        spliced = self._spliced_terms(micro_batches, reconstructions, output.loss)
        if self.objective.balance_kl:
            spliced.scale(self._kl_scale(output, spliced, share))
        sae_total, sae_terms = combine_sae_losses(
            output, self.sae.cfg.architecture(), self.objective, spliced.weighted, self._of_step(share)
        )
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
                for chunk in tokens.split(self._micro_batch_size(tokens))
            ]

    def scaled_sae_in(self, micro_batches: list[MicroBatch]) -> Tensor:
        """The step's activations `[tokens, d_in]` in fp32, normalised as the SAE trains on them."""
        return self.activation_scaler(self.raw_sae_in(micro_batches))

    def raw_sae_in(self, micro_batches: list[MicroBatch]) -> Tensor:
        """The step's activations `[tokens, d_in]` as the model has them, in fp32."""
        head = self.runner_cfg.hook_head_index
        acts = torch.cat([micro.sae_in(head) for micro in micro_batches])
        return acts.to(self.sae.device, torch.float32)

    def sae_forward(self, sae_in: Tensor) -> TrainStepOutput:
        """The forward half of the host's `_train_step`."""
        self.sae.train()
        dead = self.dead_neurons if self.shard is None else self.dead_neurons[self.shard.features]
        step_input = TrainStepInput(
            sae_in=sae_in,
            dead_neuron_mask=None if self._leaves_out_dead_features else dead,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )
        if self.shard is not None:
            output = kernels.training_forward_pass(self.sae, step_input, self._sharded_tokens(len(sae_in)))
            assert output is not None
            return output
        with self.autocast_if_enabled:
            # Local training stays the host's own computation, to the bit; but not the local part of a run.
            is_local = not self.runner_cfg.objective.needs_spliced_pass
            output = None if is_local else kernels.training_forward_pass(self.sae, step_input)
            return self.sae.training_forward_pass(step_input) if output is None else output

    def _sharded_tokens(self, n_own: int) -> ShardedTokens:
        """The step's tokens, of which this rank has `n_own`."""
        assert self.shard is not None
        ranks = self.shard.ranks
        if self._step_ranks is None:
            return ShardedTokens(ranks, None)
        return ShardedTokens(ranks, [int(n) for n in ranks.exchange([n_own])[:, 0]])

    @property
    def _leaves_out_dead_features(self) -> bool:
        """Whether the auxiliary loss, all that the mask of dead features is for there, has no weight and would fail."""
        cfg = self.sae.cfg
        fails = (
            cfg.architecture() in AUXILIARY_FOR_DEAD_FEATURES and cfg.normalize_activations in RUN_TIME_NORMALISATIONS
        )
        return self.objective.auxiliary == 0 and fails

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

    def _of_step(self, share: float) -> Callable[[Tensor], Tensor] | None:
        """From means over this rank's tokens, a `share` of the step's, to those of the step; None where it has them all."""
        ranks = self._step_ranks
        return None if ranks is None else lambda means: ranks.summed(means * share)

    def _kl_scale(self, output: TrainStepOutput, spliced: SplicedTerms, share: float) -> Tensor:
        """`alpha = MSE / KL` of the step; the KL has a floor, below which there is nothing to gain."""
        if "mse_loss" not in output.losses:
            raise ValueError(
                f"objective.balance_kl needs a loss named 'mse_loss', but architecture {self.sae.cfg.architecture()!r} "
                f"names {sorted(output.losses)}. Name it, or set objective.balance_kl=False."
            )
        mse, kl = output.losses["mse_loss"].detach(), spliced.named["kl_loss"]
        of_step = self._of_step(share)
        if of_step is not None:
            mse, kl = of_step(torch.stack([mse, kl.to(mse)])).unbind()
        self.kl_scale = mse / kl.clamp(min=KL_FLOOR)
        return self.kl_scale

    def model_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for the model's passes, where `autocast_lm` asks for it."""
        return self.spliced_model.autocast(self.runner_cfg.autocast_lm)
