"""The objective's terms that need the model: from a reconstruction, through the spliced pass, to `dL/d sae_out`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from e2e_sae_plugin.kernels.head import LinearHead
from e2e_sae_plugin.kernels.kl import fused_kl_sum
from e2e_sae_plugin.kernels.kl_top_k import top_k_kl_sum
from e2e_sae_plugin.losses import squared_error_sum
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.precision import gradient_scale
from e2e_sae_plugin.splice import CleanPass, SplicedModel, SplicedPass
from e2e_sae_plugin.splice.activations import insert_sae_out, select_sae_in, select_tokens, trained_tokens


@dataclass
class MicroBatch:
    """Sequences that went through the clean model at once, and which of their tokens are trained on."""

    tokens: Tensor
    clean: CleanPass
    mask: Tensor | None
    """`[batch, pos]`; None for every token."""
    n_tokens: int

    def sae_in(self, head_index: int | None) -> Tensor:
        """`[n_tokens, d_in]`, in the model's dtype."""
        return select_sae_in(self.clean.activation, self.mask, head_index)


@dataclass
class SplicedTerms:
    """Values of the model's terms at one step, detached, and the gradient that they send to the SAE."""

    weighted: Tensor
    """Their weighted sum."""
    named: dict[str, Tensor] = field(default_factory=dict)
    """Each term, unweighted: mean over the trained tokens."""
    gradients: list[Tensor] = field(default_factory=list)
    """For each reconstruction, `d weighted / d reconstruction`, `[tokens, d_in]`."""

    def scale(self, factor: Tensor) -> None:
        """Weigh all the terms by a number without gradient."""
        self.weighted = self.weighted * factor
        self.gradients = [gradient * factor for gradient in self.gradients]


def clean_micro_batch(
    model: SplicedModel,
    tokens: Tensor,
    *,
    hidden: bool,
    downstream: bool = True,
    seqpos_slice: Sequence[int | None] = (None,),
    excluded: Tensor | None = None,
) -> MicroBatch:
    """The clean pass over `tokens [batch, pos]`; arguments as in `SplicedModel.clean_pass` and `trained_tokens`."""
    tokens = tokens.to(model.token_device)
    clean = model.clean_pass(tokens, hidden=hidden, downstream=downstream)
    mask = trained_tokens(tokens, seqpos_slice, excluded)
    n_tokens = tokens.numel() if mask is None else int(mask.sum())
    return MicroBatch(tokens, clean, None if mask is None else mask.to(clean.activation.device), n_tokens)


def sequence_of(micro: MicroBatch) -> Tensor:
    """Which sequence each trained token belongs to, `[n_tokens]`."""
    rows = torch.arange(len(micro.tokens), device=micro.tokens.device)[:, None].expand_as(micro.tokens)
    return rows.flatten() if micro.mask is None else rows[micro.mask.to(rows.device)]


def splice(
    model: SplicedModel, micro: MicroBatch, sae_out: Tensor, *, head_index: int | None, hidden: bool
) -> SplicedPass:
    """The spliced pass with `sae_out [n_tokens, d_in]` at the trained tokens of `micro`."""
    activation = insert_sae_out(micro.clean.activation, sae_out, micro.mask, head_index)
    return model.spliced_pass(micro.clean, activation, hidden=hidden)


def kl_sum(
    model: SplicedModel,
    micro: MicroBatch,
    spliced: SplicedPass,
    *,
    positions: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Sum over the trained tokens of `D_KL(y || y_hat)` in nats.

    Args:
        positions: which of the trained tokens to sum over, `[n]`; None for all.
        top_k: as `Objective.kl_top_k`, an approximation; None for the exact KL.

    Raises:
        ValueError: as `check_kl_top_k`.
    """
    assert micro.clean.hidden is not None
    assert spliced.hidden is not None
    device_mask = None if micro.mask is None else micro.mask.to(spliced.hidden.device)
    clean_hidden, spliced_hidden = (
        select_tokens(hidden, device_mask) for hidden in (micro.clean.hidden, spliced.hidden)
    )
    if positions is not None:
        positions = positions.to(spliced_hidden.device)
        clean_hidden, spliced_hidden = clean_hidden[positions], spliced_hidden[positions]
    if top_k is None:
        return fused_kl_sum(clean_hidden, spliced_hidden, model.unembed, model.vocabulary)
    return top_k_kl_sum(clean_hidden, spliced_hidden, check_kl_top_k(model, top_k), top_k)


def check_kl_top_k(model: SplicedModel, top_k: int) -> LinearHead:
    """The head that a KL over `top_k` tokens reads, of a model after its `check`.

    Raises:
        ValueError: the unembedding is not linear, or the vocabulary is smaller.
    """
    if not isinstance(model.unembed, LinearHead):
        raise ValueError(
            f"objective.kl_top_k={top_k} needs logits that are products of the final hidden state, scaled or soft-capped at "
            "most, which this model's are not (quantized weights, a hook on its head). Leave it at None; "
            "objective.kl_positions works with every model."
        )
    if top_k > model.vocabulary:
        raise ValueError(
            f"objective.kl_top_k={top_k} is more than the model's vocabulary of {model.vocabulary} tokens. Lower it, or "
            "leave it at None for the exact KL."
        )
    return model.unembed


def position_draws(seed: int, step: int, rank: int = 0) -> np.random.Generator:
    """What the positions of one step are drawn from: its number decides, so a resumed run draws what the run would have
    drawn. Independent of torch's generators with the same seed, one of which draws the Matryoshka level. Each rank draws
    its own."""
    return np.random.default_rng([int(seed) % 2**64, step, *([rank] if rank else [])])


def draw_positions(n_tokens: int, share: float, draws: np.random.Generator) -> Tensor | None:
    """A random `share` of `n_tokens`, at least one, without replacement and in ascending order; None for all of them."""
    n_drawn = max(1, round(share * n_tokens))
    if n_drawn >= n_tokens:
        return None
    return torch.from_numpy(np.sort(draws.choice(n_tokens, n_drawn, replace=False, shuffle=False)))


def downstream_error_sum(micro: MicroBatch, spliced: SplicedPass, hook: str) -> Tensor:
    """Sum over the trained tokens of `||a_hat^(k) - a^(k)||^2` at one downstream hook."""
    return squared_error_sum(*_downstream(micro, spliced, hook))


def downstream_errors(micro: MicroBatch, spliced: SplicedPass, hook: str) -> Tensor:
    """`||a_hat^(k) - a^(k)||^2` of each trained token at one downstream hook, `[n_tokens]`, in fp32."""
    changed, clean = _downstream(micro, spliced, hook)
    return (changed.float() - clean.float()).pow(2).sum(1)


def _downstream(micro: MicroBatch, spliced: SplicedPass, hook: str) -> tuple[Tensor, Tensor]:
    clean = micro.clean.downstream[hook]
    device_mask = None if micro.mask is None else micro.mask.to(clean.device)
    return select_tokens(spliced.downstream[hook], device_mask), select_tokens(clean, device_mask)


def spliced_terms(
    model: SplicedModel,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    reconstructions: Sequence[tuple[str, float, Tensor]],
    head_index: int | None = None,
    draws: np.random.Generator | None = None,
) -> SplicedTerms:
    """KL and downstream terms of one step, and their gradients, one micro-batch and one reconstruction at a time.

    Args:
        micro_batches: the step's sequences.
        reconstructions: (suffix of the terms' names, weight, `[tokens of the step, d_in]` in the model's own space).
            Matryoshka has several; everything else one, with an empty suffix.
        draws: what the positions of `objective.kl_positions` are drawn from; needed where that is below 1.

    Each gradient is that of the mean over all the step's trained tokens, so micro-batches add up to one big batch. With
    `kl_positions`, all reconstructions are compared at the same positions.
    """
    n_step_tokens = sum(micro.n_tokens for micro in micro_batches)
    positions: list[Tensor | None] = [None] * len(micro_batches)
    if objective.kl_positions < 1:
        assert draws is not None
        positions = [draw_positions(micro.n_tokens, objective.kl_positions, draws) for micro in micro_batches]
    scale = gradient_scale(micro_batches[0].clean.activation.dtype, n_step_tokens)
    result = SplicedTerms(weighted=torch.zeros((), device=reconstructions[0][2].device))
    for suffix, weight, reconstruction in reconstructions:
        chunks = reconstruction.detach().split([micro.n_tokens for micro in micro_batches])
        gradients: list[Tensor] = []
        for micro, chunk, drawn in zip(micro_batches, chunks, positions, strict=True):
            leaf = chunk.clone().requires_grad_()
            terms = _micro_batch_terms(model, objective, micro, leaf, head_index, n_step_tokens, drawn)
            total = weight * sum(term_weight * term for term_weight, term in terms.values())
            assert isinstance(total, Tensor)
            gradients.append(torch.autograd.grad(total, leaf, torch.full_like(total, scale))[0] / scale)
            result.weighted += total.detach().to(result.weighted.device)
            for name, (_, term) in terms.items():
                value = term.detach().to(result.weighted.device)
                result.named[name + suffix] = result.named.get(name + suffix, 0) + value
        result.gradients.append(torch.cat(gradients))
    return result


def _micro_batch_terms(
    model: SplicedModel,
    objective: Objective,
    micro: MicroBatch,
    sae_out: Tensor,
    head_index: int | None,
    n_step_tokens: int,
    positions: Tensor | None,
) -> dict[str, tuple[float, Tensor]]:
    """name -> (weight, this micro-batch's part of the mean over the step).

    Args:
        positions: of the KL, among the trained tokens; None for all.
    """
    spliced = splice(model, micro, sae_out, head_index=head_index, hidden=objective.kl > 0)
    terms: dict[str, tuple[float, Tensor]] = {}
    if objective.kl > 0:
        kl = kl_sum(model, micro, spliced, positions=positions, top_k=objective.kl_top_k)
        if positions is not None:
            kl = kl * (micro.n_tokens / len(positions))
        terms["kl_loss"] = (objective.kl, kl / n_step_tokens)
    if objective.beta > 0:
        errors = [downstream_error_sum(micro, spliced, hook) for hook in model.downstream_hooks]
        error = torch.stack([value.to(errors[0].device) for value in errors]).sum()
        terms["downstream_mse_loss"] = (objective.beta, error / (model.position.layers_after * n_step_tokens))
    return terms
