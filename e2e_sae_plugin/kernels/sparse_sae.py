"""An SAE whose tokens activate few of its features: dense in the encoder's product alone, and that a chunk at a time.

`x [tokens, d_in]` -> pre-activations of a chunk of tokens, in memory that all chunks share -> the features that are active
(one of the three selections below) -> `SparseSAE`, the reconstruction and every gradient from those alone. `[tokens, d_sae]`
is never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from e2e_sae_plugin.kernels.sparse import (
    ActiveFeatures,
    FeatureOrder,
    column_sums,
    decode,
    value_gradient,
    weighted_sums,
    weighted_sums_transposed,
)

CHUNK_ELEMENTS = 2**24
"""Pre-activations held at once: 64 MiB in fp32. Smaller chunks multiply more slowly, larger ones hardly faster."""

GROUP = 32
"""Neighbouring features that are looked at together: most groups' maxima rule them out, in one fast pass."""

SPARSE_DENSITY = 0.03
"""Share of active features below which SAEs are computed sparsely.

At this share a forward and backward pass takes 0.7 of the dense one's time at d_sae 6,144 and 46,080, and at 5 % of 6,144
0.9 (2,048 tokens, d_in 768, 2 threads, fp32). Above that the lists of indices grow larger than what they save.
"""


@dataclass(frozen=True)
class Encoder:
    """What pre-activations are made of."""

    W_enc: Tensor
    """`[d_in, d_sae]`."""
    b_enc: Tensor
    """`[d_sae]`."""
    scale: Tensor | None = None
    """`[d_sae]` factors on the pre-activations: decoder norms, by which features are then selected."""

    def chunks(self, x: Tensor, widest: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first token, pre-activations `[chunk, d_sae]`) of `x [tokens, d_in]`; each overwrites the one before it.

        Args:
            widest: the d_sae that the chunks' size goes by, where it is not this encoder's own.
        """
        d_sae = self.W_enc.shape[1]
        size = min(len(x), max(64, CHUNK_ELEMENTS // (widest or d_sae) // 64 * 64))
        buffer = x.new_empty(size, d_sae)
        for start in range(0, len(x), max(size, 1)):
            part = buffer[: len(x) - start]
            torch.addmm(self.b_enc, x[start : start + size], self.W_enc, out=part)
            if self.scale is not None:
                part *= self.scale
            yield start, part


def entries(pre: Tensor, ruled_out: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Flat indices, ascending, and values of what of `pre [tokens, d_sae]` is not `ruled_out`.

    Args:
        ruled_out: a comparison with a bound from above, elementwise, so that a group with a maximum below it is ruled out.
    """
    if pre.shape[1] % GROUP:
        flat = (~ruled_out(pre)).flatten().nonzero()[:, 0]
        return flat, pre.flatten()[flat]
    groups = pre.view(-1, GROUP)
    kept = (~ruled_out(groups.amax(1))).nonzero()[:, 0]
    candidates = groups.index_select(0, kept)
    hits = (~ruled_out(candidates)).flatten().nonzero()[:, 0]
    return kept[hits // GROUP] * GROUP + hits % GROUP, candidates.flatten()[hits]


def largest_in_rows(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `pre [tokens, d_sae]` and their columns, ascending: `[tokens, k]` each.

    The k largest are in the k groups with the largest maxima, which are a fraction of the row; ties apart, it is
    `torch.topk`.
    """
    n_tokens, d_sae = pre.shape
    n_groups = d_sae // GROUP
    if d_sae % GROUP or 4 * k > n_groups:
        values, features = pre.topk(k, sorted=False)
    else:
        groups = pre.view(n_tokens, n_groups, GROUP).amax(2).topk(k, sorted=False).indices
        starts = torch.arange(0, n_tokens * n_groups, n_groups, device=pre.device)
        candidates = pre.view(-1, GROUP).index_select(0, (groups + starts[:, None]).flatten())
        values, places = candidates.view(n_tokens, k * GROUP).topk(k, sorted=False)
        features = groups.gather(1, places // GROUP) * GROUP + places % GROUP
    features, order = features.sort(1)
    return values.gather(1, order), features


def select_topk(x: Tensor, encoder: Encoder, k: int) -> ActiveFeatures:
    """The k largest pre-activations of each token, negative ones too."""
    parts = [largest_in_rows(pre, k) for _, pre in encoder.chunks(x)]
    values, features = (torch.cat(part).flatten() for part in zip(*parts, strict=True))
    tokens = torch.arange(len(x), device=x.device).repeat_interleave(k)
    offsets = torch.arange(0, k * len(x) + 1, k, device=x.device) if k else tokens.new_zeros(len(x) + 1)
    return ActiveFeatures(values, features, tokens, offsets, encoder.W_enc.shape[1])


def select_batch_topk(x: Tensor, encoder: Encoder, n_active: int) -> ActiveFeatures:
    """The `n_active` largest positive pre-activations of all tokens together; fewer, where fewer are positive.

    Keeps the largest so far: what is below the smallest of them is out, and most of a chunk is.
    """
    d_sae = encoder.W_enc.shape[1]
    values, flat = x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
    for start, pre in encoder.chunks(x):
        bound = 0.0
        if len(values) == n_active > 0:
            bound = _lowest(values)
        elif d_sae % GROUP == 0 and 0 < n_active <= pre.numel() // GROUP:
            # So many groups have a maximum of at least this, so the smallest that is selected is no smaller.
            bound = _lowest(pre.view(-1, GROUP).amax(1).topk(n_active, sorted=False).values)
        new_flat, new_values = entries(pre, (lambda v, b=bound: v < b) if bound > 0 else (lambda v: v <= 0))
        values, flat = torch.cat([values, new_values]), torch.cat([flat, new_flat + start * d_sae])
        if len(values) > n_active:
            values, kept = values.topk(n_active, sorted=False)
            flat = flat[kept]
    flat, order = flat.sort()
    return ActiveFeatures.of(values[order], flat % d_sae, flat // d_sae, len(x), d_sae)


def _lowest(values: Tensor) -> float:
    """The smallest; a NaN counts as the largest, as in `topk`."""
    return float(values.nan_to_num(nan=torch.inf).min())


def select_positive(x: Tensor, encoder: Encoder) -> ActiveFeatures | Tensor:
    """All positive pre-activations, if they are few. The first chunk decides.

    Returns:
        Where they are not few, the pre-activations `[tokens so far, d_sae]` that can be used instead.
    """
    d_sae = encoder.W_enc.shape[1]
    flats: list[Tensor] = []
    values: list[Tensor] = []
    for start, pre in encoder.chunks(x):
        # NaN counts as active, so that it is passed on, and weights that are NaN are dense.
        if start == 0 and int(torch.count_nonzero(pre <= 0)) <= (1 - SPARSE_DENSITY) * pre.numel():
            return pre
        flat, positive = entries(pre, lambda v: v <= 0)
        flats.append(flat + start * d_sae)
        values.append(positive)
        if sum(map(len, values)) > 2 * SPARSE_DENSITY * len(x) * d_sae:  # the first chunk was not like the others
            return pre[:0]
    flat = torch.cat(flats)
    return ActiveFeatures.of(torch.cat(values), flat % d_sae, flat // d_sae, len(x), d_sae)


@dataclass(frozen=True)
class DeadFeatures:
    """Activations of dead features, for an auxiliary loss, where so large a share of them is used that they are dense."""

    acts: Tensor
    """`[tokens, n_dead]`, 0 where not selected."""
    selected: Tensor | None
    """`[tokens, n_dead]`, or None if all are."""
    features: Tensor
    """`[n_dead]`: which they are."""


def dead_columns(encoder: Encoder, dead: Tensor) -> Encoder:
    """The encoder of the features `dead [n_dead]` alone."""
    scale = None if encoder.scale is None else encoder.scale[dead]
    return Encoder(encoder.W_enc[:, dead], encoder.b_enc[dead], scale)


def among_all(active: ActiveFeatures, columns: Encoder, dead: Tensor, n_features: int) -> ActiveFeatures:
    """Features that were selected by `columns`, the encoder of `dead` alone, by their numbers among all `n_features`, and
    without its scale."""
    values = active.values if columns.scale is None else active.values / columns.scale[active.features]
    return ActiveFeatures(values, dead[active.features], active.tokens, active.offsets, n_features)


def select_dead(x: Tensor, encoder: Encoder, dead: Tensor, k: int) -> ActiveFeatures | DeadFeatures:
    """The k largest pre-activations of each token among the features `dead [n_dead]`, negative ones too.

    Only their columns are computed. The values are pre-activations without `encoder.scale`.
    """
    columns = dead_columns(encoder, dead)
    scale = columns.scale
    if k < SPARSE_DENSITY * len(dead):
        return among_all(select_topk(x, columns, k), columns, dead, encoder.W_enc.shape[1])
    pre = torch.addmm(columns.b_enc, x, columns.W_enc)
    if k == len(dead):
        return DeadFeatures(pre, None, dead)
    largest = (pre if scale is None else pre * scale).topk(k, sorted=False).indices
    selected = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, largest, True)
    return DeadFeatures(pre.mul_(selected), selected, dead)


class SparseSAE(torch.autograd.Function):
    """`sae_out [tokens, d_in]` of active features, `sum_i acts_i ||W_dec_i||` of each token if `with_l1`, and the
    reconstruction by dead features (no b_dec), if any; no SAE has both of the latter.

    Arguments: `W_enc, b_enc, W_dec, b_dec` of the usual shapes; `x [tokens, d_in]`, a constant from which b_dec has been
    subtracted if `b_dec_on_input`; the active features, whose values are `max(x W_enc + b_enc, 0)`; the dead ones, without
    the maximum; `b_dec_on_input`; `with_l1`; `adds_b_dec`, whether `sae_out` has it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        W_enc: Tensor,
        b_enc: Tensor,  # noqa: ARG004 (its gradient is asked for)
        W_dec: Tensor,
        b_dec: Tensor,
        x: Tensor,
        active: ActiveFeatures,
        dead: ActiveFeatures | DeadFeatures | None,
        b_dec_on_input: bool,
        with_l1: bool,
        adds_b_dec: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        norms = W_dec.norm(dim=1) if with_l1 else None
        ctx.save_for_backward(W_enc, W_dec, x, norms)
        ctx.active, ctx.dead, ctx.b_dec_on_input, ctx.adds_b_dec = active, dead, b_dec_on_input, adds_b_dec
        ctx.set_materialize_grads(False)
        sae_out = decode(active, W_dec)
        if adds_b_dec:
            sae_out.add_(b_dec)
        weighted = None if norms is None else decode(active, norms[:, None])[:, 0]
        if isinstance(dead, DeadFeatures):
            return sae_out, weighted, dead.acts @ W_dec[dead.features]
        return sae_out, weighted, None if dead is None else decode(dead, W_dec)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's type)
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d_out, d_weighted, d_dead = grad_outputs
        W_enc, W_dec, x, norms = ctx.saved_tensors
        active: ActiveFeatures = ctx.active
        dead: ActiveFeatures | DeadFeatures | None = ctx.dead
        d_out = x.new_zeros(len(x), W_dec.shape[1]) if d_out is None else d_out.contiguous()
        d_pre = value_gradient(active, W_dec, d_out)
        if d_weighted is not None:
            d_pre = torch.addcmul(d_pre, d_weighted[active.tokens], norms[active.features])
        d_pre = d_pre * (active.values > 0)
        if d_dead is not None and isinstance(dead, ActiveFeatures):
            # As if the dead features were those of further tokens with the same x.
            d_pre = torch.cat([d_pre, value_gradient(dead, W_dec, d_dead.contiguous())])
            values, features = (
                torch.cat(pair) for pair in ((active.values, dead.values), (active.features, dead.features))
            )
            tokens, rows = torch.cat([active.tokens, dead.tokens]), torch.cat([active.tokens, dead.tokens + len(x)])
            d_rows = torch.cat([d_out, d_dead])
        else:
            values, features, tokens, rows, d_rows = active.values, active.features, active.tokens, active.tokens, d_out
        by_feature = FeatureOrder.of(features, active.n_features)
        order, offsets = by_feature.order, by_feature.offsets
        d_W_enc = d_W_dec = None
        if ctx.needs_input_grad[0]:
            d_W_enc = weighted_sums_transposed(d_pre[order], tokens[order], offsets, x)
        if ctx.needs_input_grad[2]:
            d_W_dec = weighted_sums(values[order], rows[order], offsets, d_rows)
        d_b_enc = column_sums(d_pre, by_feature)
        d_b_dec = d_out.sum(0) if ctx.adds_b_dec else d_out.new_zeros(d_out.shape[1])
        if d_weighted is not None and d_W_dec is not None:
            weights = column_sums(d_weighted[active.tokens] * active.values, by_feature)
            # A decoder row of zero length has no direction: gradient 0 there, as in torch's norm.
            d_W_dec.addcmul_(torch.where(norms > 0, weights / norms, 0)[:, None], W_dec)
        if d_dead is not None and isinstance(dead, DeadFeatures):
            d_acts = d_dead @ W_dec[dead.features].T
            if dead.selected is not None:
                d_acts *= dead.selected
            if d_W_dec is not None:
                d_W_dec.index_add_(0, dead.features, dead.acts.T @ d_dead)
            if d_W_enc is not None:
                d_W_enc.index_add_(1, dead.features, x.T @ d_acts)
            d_b_enc.index_add_(0, dead.features, d_acts.sum(0))
        if ctx.b_dec_on_input:  # x = ... - b_dec: only the sum over tokens is needed, not one row per token
            d_b_dec = d_b_dec - W_enc @ d_b_enc
        return d_W_enc, d_b_enc, d_W_dec, d_b_dec, None, None, None, None, None, None
