"""KL of the spliced model from final hidden states: unembedding, softmax and gradient fused over chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked

# Elements of one chunk's logits, of which three fp32 tensors are held: 64 MiB each. Larger chunks are no faster on a CPU
# (measured with 50,257 tokens of vocabulary).
CHUNK_LOGIT_ELEMENTS = 2**24

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
        chunk = chunk_tokens(vocabulary)
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
        chunk_sum, d_logits = _kl_and_gradient(
            clean_logits.clone(), logits.detach().float().clone(), torch.empty_like(clean_logits), dim=-1
        )
        gradient = torch.autograd.grad(logits, leaf, d_logits.to(logits.dtype))[0] if needs_grad else None
        yield chunk_sum, gradient


def _linear_chunks(pairs: Pairs, head: LinearHead, needs_grad: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The same for a linear head, in buffers that all chunks share.

    On a CPU the logits are held as `[vocabulary, tokens]`: its matrix products are a quarter faster with the vocabulary
    as rows (measured with MKL), and nothing else here minds.
    """
    weight, bias, device_type = head.weight, head.bias, head.weight.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    columns = device_type == "cpu"
    buffers: list[Tensor] = []
    with torch.autocast(device_type, enabled=False):
        for clean, spliced in pairs:
            shape = (len(weight), len(clean)) if columns else (len(clean), len(weight))
            if not buffers or buffers[0].shape != shape:
                buffers = [weight.new_empty(shape, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(3)]
            for out, hidden in zip(buffers, (clean, spliced), strict=False):
                _unembed_into(out, hidden.to(weight), weight, bias, columns)
            chunk_sum, d_logits = _kl_and_gradient(*buffers, dim=0 if columns else 1)
            if needs_grad:
                d_logits = d_logits.to(dtype)
                yield chunk_sum, (d_logits.T if columns else d_logits) @ weight
            else:
                yield chunk_sum, None


def _unembed_into(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: bool) -> None:
    left, right = (weight, hidden.T) if columns else (hidden, weight.T)
    if out.dtype == weight.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
    if bias is not None:
        out += bias[:, None] if columns else bias


def _kl_and_gradient(clean: Tensor, spliced: Tensor, y: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`sum y (log y - log y_hat)` of logits in at least fp32, and its gradient for the spliced logits, `y_hat - y`.

    With logits a and b less their maxima, `KL = sum exp(a) (a - b) / Z_a - log Z_a + log Z_b`. Everything happens in the
    memory of the two logits and of `y`, a third tensor to write to: these are the largest of a step. Two `log_softmax`
    take more passes over them, and torch is slow at it along the first dimension.
    """
    clean.sub_(clean.amax(dim, keepdim=True))
    z_clean = torch.exp(clean, out=y).sum(dim, keepdim=True)
    spliced.sub_(spliced.amax(dim, keepdim=True))
    weighted = clean.sub_(spliced).mul_(y).sum(dim, keepdim=True)
    z_spliced = spliced.exp_().sum(dim, keepdim=True)
    # Tokens in fp32, then their total in fp64: converting every logit would double the traffic.
    total = (weighted / z_clean - z_clean.log() + z_spliced.log()).sum(dtype=torch.float64)
    return total, spliced.div_(z_spliced).sub_(y.div_(z_clean))
