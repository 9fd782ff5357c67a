"""KL over the clean model's `k` likeliest tokens: the spliced side is unembedded at those rows of the head alone."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.kernels.kl import LinearHead, chunk_tokens, even_chunk

# Elements of the head's rows that are gathered at once, `[tokens, k, d_model]`: 8 MiB in fp32.
GATHERED_ELEMENTS = 2**21


@shape_checked
def top_k_kl_sum(
    clean_hidden: Float[Tensor, "tokens d_model"],
    spliced_hidden: Float[Tensor, "tokens d_model"],
    head: LinearHead,
    k: int,
) -> Float[Tensor, ""]:
    """Sum over tokens of `D_KL(p || p_hat)` in nats: `y` and `y_hat` renormalised over the `k` likeliest tokens of `y`.

    An approximation of `fused_kl_sum`, and equal to it where `k` is the vocabulary: what the spliced model makes of all
    other tokens has no part in it. The clean logits are computed in full, a chunk of tokens at a time; of the spliced ones
    `k` per token, and their gradient in the same pass. Gathering the rows pays for `k` up to some hundreds. `clean_hidden`
    gets no gradient.

    Args:
        clean_hidden: final hidden states of the clean model, after the final norm.
        spliced_hidden: those of the model with the SAE spliced in.
        head: the model's unembedding, which has to be linear.
        k: from 1 to the vocabulary.

    Raises:
        ValueError: `k` is out of range.
    """
    if not 1 <= k <= len(head.weight):
        raise ValueError(f"k must be from 1 to the vocabulary of {len(head.weight)} tokens, got {k!r}.")
    total: Tensor = _TopKKLSum.apply(spliced_hidden, clean_hidden, head, k)  # pyright: ignore[reportAssignmentType]
    return total


class _TopKKLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spliced_hidden: Tensor, clean_hidden: Tensor, head: LinearHead, k: int) -> Tensor:
        weight, bias, device_type = head.weight, head.bias, head.weight.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
        # Rows are gathered, which a transposed weight would read one element per cache line at a time.
        weight, bias = weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)
        gradient = torch.zeros_like(spliced_hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=spliced_hidden.device)
        chunk = max(1, even_chunk(len(spliced_hidden), chunk_tokens(len(weight))))
        logits = weight.new_empty(min(chunk, len(spliced_hidden)), len(weight))  # the same memory for each chunk
        part = max(1, GATHERED_ELEMENTS // (k * weight.shape[1]))
        with torch.autocast(device_type, enabled=False):
            for first in range(0, len(spliced_hidden), chunk):
                tokens = slice(first, first + chunk)
                top, indices = _top_logits(clean_hidden[tokens].to(weight), weight, bias, k, logits)
                spliced = spliced_hidden[tokens].to(weight)
                for start in range(0, len(spliced), part):
                    rows = slice(start, start + part)
                    value, d_hidden = _kl_at(top[rows], indices[rows], spliced[rows], weight, bias)
                    total += value.to(total.device)
                    if gradient is not None:
                        gradient[tokens][rows] = d_hidden.to(gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None


def _top_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """The `k` largest logits of each token, in at least fp32, and which they are, both `[tokens, k]`."""
    logits = torch.mm(hidden, weight.T, out=out[: len(hidden)])
    if bias is not None:
        logits += bias
    values, indices = logits.topk(k, dim=1, sorted=False)
    return values.to(torch.promote_types(weight.dtype, torch.float32)), indices


def _kl_at(
    clean_logits: Tensor, indices: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """KL sum over the tokens `indices [tokens, k]` of the vocabulary, and its gradient `(p_hat - p) W_U` for `hidden`."""
    rows = weight[indices]
    logits = torch.bmm(rows, hidden[:, :, None])[:, :, 0].to(clean_logits.dtype)
    if bias is not None:
        logits += bias[indices]
    log_p, log_p_hat = clean_logits.log_softmax(1), logits.log_softmax(1)
    p = log_p.exp()
    # Tokens in fp32, then their total in fp64, as for the exact KL.
    value = (p * (log_p - log_p_hat)).sum(1).sum(dtype=torch.float64)
    d_logits = (log_p_hat.exp() - p).to(weight.dtype)
    return value, torch.bmm(d_logits[:, None], rows)[:, 0]
