"""KL of the spliced model from final hidden states: unembedding, softmax and gradient fused over chunks of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked

# Elements of one chunk's logits, of which two fp32 tensors are held: 32 MiB each. Larger chunks are no faster on a CPU,
# half of it is slower by a third (measured with 50,257 tokens of vocabulary, so with 128 and with 64 tokens).
CHUNK_LOGIT_ELEMENTS = 2**23

# Rows of a linear head whose logits are dealt with at once on a CPU: with a chunk's 128 tokens three tensors of 0.5 MB,
# which stay in its cache, and products a tenth faster than with twice the rows. On other devices a tile is the
# whole vocabulary.
TILE_VOCABULARY = 1024

Unembed = Callable[[Tensor], Tensor]
"""`[tokens, d_model]` (the final hidden state, after the final norm) -> `[tokens, vocabulary]`."""


@dataclass(frozen=True)
class LinearHead:
    """An unembedding known to be linear, whose chunks of logits are then written into the same memory each time.

    Fresh tensors of this size are mapped in page by page, and TransformerLens's own unembedding copies its whole weight
    at every call (18 % of a step of GPT-2's shape on a CPU).
    """

    weight: Float[Tensor, "vocabulary d_model"]
    """Any strides: a transposed view costs nothing."""
    bias: Float[Tensor, " vocabulary"] | None = None

    def __call__(self, hidden: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens vocabulary"]:
        return F.linear(hidden, self.weight, self.bias)


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
        total = torch.zeros((), dtype=torch.float64, device=spliced_hidden.device)
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
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None


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
    weight, bias, device_type = head.weight, head.bias, head.weight.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    buffers: _Buffers | None = None
    with torch.autocast(device_type, enabled=False):
        for clean, spliced in pairs:
            if buffers is None or buffers.clean.shape[1] != len(clean):
                buffers = _Buffers.like(weight, len(clean))
            yield _chunk_of_linear(clean.to(weight), spliced.to(weight), weight, bias, buffers, needs_grad)


@dataclass(frozen=True)
class _Buffers:
    """Memory for one chunk, `[vocabulary, tokens]` in whatever order, and for one tile of it."""

    clean: Tensor
    spliced: Tensor
    tile: Tensor

    @classmethod
    def like(cls, weight: Tensor, n_tokens: int) -> _Buffers:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        columns = weight.device.type == "cpu"
        n_rows = min(len(weight), TILE_VOCABULARY) if columns else len(weight)
        shapes = [(len(weight), n_tokens), (len(weight), n_tokens), (n_rows, n_tokens)]
        if columns:
            return cls(*(weight.new_empty(shape, dtype=dtype) for shape in shapes))
        return cls(*(weight.new_empty(shape[::-1], dtype=dtype).T for shape in shapes))


def _chunk_of_linear(
    clean: Tensor, spliced: Tensor, weight: Tensor, bias: Tensor | None, buffers: _Buffers, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """KL sum and gradient of one chunk. With logits a and b: `KL = sum_v y_v (a_v - b_v) - log Z_a + log Z_b`."""
    n_rows = len(buffers.tile)
    tiles = [slice(first, min(first + n_rows, len(weight))) for first in range(0, len(weight), n_rows)]
    parts = [_tile(clean, spliced, weight, bias, buffers, rows) for rows in tiles]
    top_a, top_b, sum_a, sum_b, weighted = (torch.stack(values) for values in zip(*parts, strict=True))
    max_a, max_b = top_a.amax(0), top_b.amax(0)
    # Each tile's sums are relative to its own maximum. `[tiles, tokens]`, so fp64 costs nothing.
    scale_a, scale_b = (top_a - max_a).double().exp_(), (top_b - max_b).double().exp_()
    z_a, z_b = (sum_a * scale_a).sum(0), (sum_b * scale_b).sum(0)
    mean_difference = (weighted * scale_a).sum(0) / z_a
    total = (mean_difference - (max_a.double() - max_b) - z_a.log() + z_b.log()).sum()
    if not needs_grad:
        return total, None
    share_a, share_b = (scale_a / z_a).to(sum_a.dtype), (scale_b / z_b).to(sum_a.dtype)
    gradient = torch.zeros_like(spliced)
    for rows, from_a, from_b in zip(tiles, share_a, share_b, strict=True):
        d_logits = buffers.spliced[rows].mul_(from_b).sub_(buffers.clean[rows].mul_(from_a))  # y_hat - y
        gradient.addmm_(d_logits.to(weight.dtype).T, weight[rows])
    return total, gradient


def _tile(
    clean: Tensor, spliced: Tensor, weight: Tensor, bias: Tensor | None, buffers: _Buffers, rows: slice
) -> tuple[Tensor, ...]:
    """Maxima of both sides' logits a and b, sums of their exponentials, and `sum exp(a) (a - b)`, each `[tokens]`.

    Leaves the exponentials in the buffers.
    """
    a, b = buffers.clean[rows], buffers.spliced[rows]
    _unembed_into(a, clean, weight[rows], None if bias is None else bias[rows])
    _unembed_into(b, spliced, weight[rows], None if bias is None else bias[rows])
    top_a, top_b = a.amax(0), b.amax(0)
    difference = torch.sub(a, b, out=buffers.tile[: len(a)])
    sum_a = a.sub_(top_a).exp_().sum(0)
    weighted = difference.mul_(a).sum(0)
    return top_a, top_b, sum_a, b.sub_(top_b).exp_().sum(0), weighted


def _unembed_into(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if out.dtype == weight.dtype:
        torch.mm(weight, hidden.T, out=out)
    else:
        out.copy_(weight @ hidden.T)
    if bias is not None:
        out += bias[:, None]


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
    total = (weighted / z_clean - z_clean.log() + z_spliced.log()).sum(dtype=torch.float64)
    return total, spliced.div_(z_spliced).sub_(y.div_(z_clean))
