"""KL of the spliced model from final hidden states: unembedding, softmax and gradient fused over chunks of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.kernels.head import LinearHead, Unembed, vocabulary_tiles
from e2e_sae_plugin.precision import accumulation_dtype, at_least_fp32, matmul, ready_for_products

# Elements of one chunk's logits, of which two fp32 tensors are held: 32 MiB each. Larger chunks are no faster on a CPU,
# half of it is slower by a third (measured with 50,257 tokens of vocabulary, so with 128 and with 64 tokens).
CHUNK_LOGIT_ELEMENTS = 2**23


@shape_checked
def fused_kl_sum(
    clean_hidden: Float[Tensor, "tokens d_model"],
    spliced_hidden: Float[Tensor, "tokens d_model"],
    unembed: Unembed,
    vocabulary: int,
) -> Float[Tensor, ""]:
    """Sum over tokens of `D_KL(y || y_hat)` in nats, without ever holding all the logits.

    Computes the gradient of `spliced_hidden`, `(y_hat - y) W_U`, in the same pass; `clean_hidden` gets none. The KL term
    of Braun et al. 2024 (arXiv 2405.12241), section 2.2.

    Args:
        clean_hidden: final hidden states of the clean model, after the final norm.
        spliced_hidden: those of the model with the SAE spliced in.
        unembed: the model's map from hidden states to logits; a `LinearHead` is faster.
        vocabulary: number of logits per token, which sizes the chunks.
    """
    total: Tensor = _FusedKLSum.apply(spliced_hidden, clean_hidden, unembed, vocabulary)  # pyright: ignore[reportAssignmentType]
    return total


class _FusedKLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spliced_hidden: Tensor, clean_hidden: Tensor, unembed: Unembed, vocabulary: int) -> Tensor:
        chunk = even_chunk(len(spliced_hidden), chunk_tokens(vocabulary))
        needs_grad = ctx.needs_input_grad[0]
        device = spliced_hidden.device
        total = torch.zeros((), dtype=accumulation_dtype(device), device=device)
        gradients: list[Tensor] = []
        pairs = zip(clean_hidden.detach().split(chunk), spliced_hidden.detach().split(chunk), strict=True)
        kl_chunks = _linear_chunks if isinstance(unembed, LinearHead) else _opaque_chunks
        for chunk_sum, gradient in kl_chunks(pairs, unembed, needs_grad):  # pyright: ignore[reportArgumentType]
            total += chunk_sum.to(total.device)
            if gradient is not None:
                gradients.append(gradient.to(spliced_hidden))
        if needs_grad:
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(spliced_hidden))
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        wide = gradient.to(at_least_fp32(gradient.dtype))
        return (wide * grad_outputs[0]).to(gradient.dtype), None, None, None


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits are held at once; a multiple of 64, which matrix products prefer, where that many fit."""
    tokens = max(1, CHUNK_LOGIT_ELEMENTS // vocabulary)
    return tokens - tokens % 64 if tokens > 64 else tokens


def even_chunk(n_tokens: int, most: int) -> int:
    """Size of as few even parts of `n_tokens` as `most` allows: a small last part costs nearly as much as a whole one."""
    n_chunks = max(1, math.ceil(n_tokens / most))
    even = math.ceil(n_tokens / n_chunks)
    return min(most, math.ceil(even / 16) * 16)


Pairs = Iterator[tuple[Tensor, Tensor]]
"""(clean, spliced) hidden states of one chunk after the other."""


def _opaque_chunks(pairs: Pairs, unembed: Unembed, needs_grad: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """KL sum of each chunk and its gradient with respect to the spliced side, through whatever `unembed` computes."""
    for clean, spliced in pairs:
        clean_logits = unembed(clean).float()
        leaf = spliced.detach().requires_grad_(needs_grad)
        with torch.set_grad_enabled(needs_grad):
            logits = unembed(leaf)
        # Copies: an unembedding may hand out memory that is not ours to write to.
        chunk_sum, d_logits = _kl_and_gradient(clean_logits.clone(), logits.detach().float().clone())
        gradient = torch.autograd.grad(logits, leaf, d_logits.to(logits.dtype))[0] if needs_grad else None
        yield chunk_sum, gradient


def _linear_chunks(pairs: Pairs, head: LinearHead, needs_grad: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The same for a linear head, in tiles of the vocabulary and in buffers that all chunks share.

    A tile's logits are exponentiated, less their own maxima, while they are in the processor's cache; the next and last
    time that they are touched is when the whole vocabulary's sums are known and the tile's gradient goes back through the
    head. So the logits, the largest tensors of a step, are written and read once each, not a dozen times.

    On a CPU they are held as `[vocabulary, tokens]`: its matrix products are a quarter faster with the vocabulary as rows
    (measured with MKL), and nothing else here minds.
    """
    weight, bias = head.factors()
    buffers: _Buffers | None = None
    with torch.autocast(weight.device.type, enabled=False):
        for clean, spliced in pairs:
            if buffers is None or buffers.clean.shape[1] != len(clean):
                buffers = _Buffers.like(weight, len(clean), needs_slope=needs_grad and not head.is_plain)
            factors = replace(head, weight=weight, bias=bias)
            yield _chunk_of_linear(clean.to(weight), spliced.to(weight), factors, buffers, needs_grad)


@dataclass(frozen=True)
class _Buffers:
    """Memory for one chunk, `[vocabulary, tokens]` in whatever order, and for one tile of it."""

    clean: Tensor
    spliced: Tensor
    tile: Tensor
    slope: Tensor | None
    """The derivative of the spliced logits by the products of the head, `[vocabulary, tokens]`; None where it is 1."""

    @classmethod
    def like(cls, weight: Tensor, n_tokens: int, needs_slope: bool) -> _Buffers:
        tallest = max(rows.stop - rows.start for rows in vocabulary_tiles(weight))
        clean, spliced = (_buffer(weight, len(weight), n_tokens) for _ in range(2))
        slope = _buffer(weight, len(weight), n_tokens) if needs_slope else None
        return cls(clean, spliced, _buffer(weight, tallest, n_tokens), slope)


def _buffer(weight: Tensor, n_rows: int, n_tokens: int) -> Tensor:
    dtype = at_least_fp32(weight.dtype)
    if weight.device.type == "cpu":
        return weight.new_empty((n_rows, n_tokens), dtype=dtype)
    return weight.new_empty((n_tokens, n_rows), dtype=dtype).T


def _chunk_of_linear(
    clean: Tensor, spliced: Tensor, head: LinearHead, buffers: _Buffers, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """KL sum and gradient of one chunk. With logits a and b: `KL = sum_v y_v (a_v - b_v) - log Z_a + log Z_b`."""
    weight, wide = head.weight, accumulation_dtype(head.weight.device)
    tiles = vocabulary_tiles(weight)
    parts = [_tile(clean, spliced, head, buffers, rows) for rows in tiles]
    top_a, top_b, sum_a, sum_b, weighted = (torch.stack(values) for values in zip(*parts, strict=True))
    max_a, max_b = top_a.amax(0), top_b.amax(0)
    # Each tile's sums are relative to its own maximum. `[tiles, tokens]`, so fp64 costs nothing.
    scale_a, scale_b = (top_a - max_a).to(wide).exp_(), (top_b - max_b).to(wide).exp_()
    z_a, z_b = (sum_a * scale_a).sum(0), (sum_b * scale_b).sum(0)
    mean_difference = (weighted * scale_a).sum(0) / z_a
    total = (mean_difference - (max_a.to(wide) - max_b) - z_a.log() + z_b.log()).sum()
    if not needs_grad:
        return total, None
    share_a, share_b = (scale_a / z_a).to(sum_a.dtype), (scale_b / z_b).to(sum_a.dtype)
    gradient = torch.zeros_like(spliced, dtype=sum_a.dtype)
    for rows, from_a, from_b in zip(tiles, share_a, share_b, strict=True):
        d_logits = buffers.spliced[rows].mul_(from_b).sub_(buffers.clean[rows].mul_(from_a))  # y_hat - y
        if buffers.slope is not None:
            d_logits.mul_(buffers.slope[rows])
        if weight.dtype == gradient.dtype:
            gradient.addmm_(d_logits.T, weight[rows])
        else:
            gradient += matmul(d_logits.T, weight[rows])
    return total, gradient


def _tile(clean: Tensor, spliced: Tensor, head: LinearHead, buffers: _Buffers, rows: slice) -> tuple[Tensor, ...]:
    """Maxima of both sides' logits a and b, sums of their exponentials, and `sum exp(a) (a - b)`, each `[tokens]`.

    Leaves the exponentials in the buffers.
    """
    a, b = buffers.clean[rows], buffers.spliced[rows]
    weight = ready_for_products(head.weight[rows])
    for out, hidden in ((a, clean), (b, spliced)):
        matmul(weight, hidden.T, out=out)
        if head.bias is not None:
            out += head.bias[rows, None]
        if not head.is_plain:
            out.copy_(head.shape(out))
    if buffers.slope is not None:
        buffers.slope[rows] = head.slope(b)
    top_a, top_b = a.amax(0), b.amax(0)
    difference = torch.sub(a, b, out=buffers.tile[: len(a)])
    sum_a = a.sub_(top_a).exp_().sum(0)
    weighted = difference.mul_(a).sum(0)
    return top_a, top_b, sum_a, b.sub_(top_b).exp_().sum(0), weighted


def _kl_and_gradient(clean: Tensor, spliced: Tensor) -> tuple[Tensor, Tensor]:
    """`sum y (log y - log y_hat)` of logits `[tokens, vocabulary]` in at least fp32, which are overwritten, and its gradient
    for the spliced ones, `y_hat - y`.

    With logits a and b less their maxima, `KL = sum exp(a) (a - b) / Z_a - log Z_a + log Z_b`. Two `log_softmax` would take
    more passes over memory.
    """
    clean.sub_(clean.amax(1, keepdim=True))
    y = clean.exp()
    z_clean = y.sum(1, keepdim=True)
    spliced.sub_(spliced.amax(1, keepdim=True))
    weighted = clean.sub_(spliced).mul_(y).sum(1, keepdim=True)
    z_spliced = spliced.exp_().sum(1, keepdim=True)
    # Tokens in fp32, then their total in fp64: converting every logit would double the traffic.
    wide = accumulation_dtype(clean.device)
    total = (weighted / z_clean - z_clean.log() + z_spliced.log()).sum(dtype=wide)
    return total, spliced.div_(z_spliced).sub_(y.div_(z_clean))
