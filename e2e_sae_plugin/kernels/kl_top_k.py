"""KL over the clean model's `k` likeliest tokens: the spliced side is unembedded at those rows of the head alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.kernels.head import LinearHead, vocabulary_tiles
from e2e_sae_plugin.kernels.kl import chunk_tokens, even_chunk
from e2e_sae_plugin.precision import accumulation_dtype, at_least_fp32, matmul

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
        weight, bias = head.factors()
        # Rows are gathered, which a transposed weight would read one element per cache line at a time.
        head = replace(head, weight=weight.contiguous(), bias=bias)
        gradient = torch.zeros_like(spliced_hidden) if ctx.needs_input_grad[0] else None
        device = spliced_hidden.device
        total = torch.zeros((), dtype=accumulation_dtype(device), device=device)
        chunk = max(1, even_chunk(len(spliced_hidden), chunk_tokens(len(weight))))
        part = max(1, GATHERED_ELEMENTS // (k * weight.shape[1]))
        # The same memory for each chunk.
        logits = weight.new_empty(min(chunk, len(spliced_hidden)), len(weight), dtype=at_least_fp32(weight.dtype))
        with torch.autocast(weight.device.type, enabled=False):
            for first in range(0, len(spliced_hidden), chunk):
                tokens = slice(first, first + chunk)
                top, indices = _top_logits(clean_hidden[tokens].to(weight), head, k, logits)
                spliced = spliced_hidden[tokens].to(weight)
                for start in range(0, len(spliced), part):
                    rows = slice(start, start + part)
                    value, d_hidden = _kl_at(top[rows], indices[rows], spliced[rows], head)
                    total += value.to(total.device)
                    if gradient is not None:
                        gradient[tokens][rows] = d_hidden.to(gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        wide = gradient.to(at_least_fp32(gradient.dtype))
        return (wide * grad_outputs[0]).to(gradient.dtype), None, None, None


def _top_logits(hidden: Tensor, head: LinearHead, k: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """The `k` largest logits of each token, in at least fp32, and which they are, both `[tokens, k]`."""
    products = out[: len(hidden)]
    for rows in vocabulary_tiles(head.weight):
        products[:, rows] = matmul(hidden, head.weight[rows].T)
    if head.bias is not None:
        products += head.bias
    values, indices = products.topk(k, dim=1, sorted=False)  # scale and soft cap keep their order
    return head.shape(values), indices


def _kl_at(clean_logits: Tensor, indices: Tensor, hidden: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
    """KL sum over the tokens `indices [tokens, k]` of the vocabulary, and its gradient `(p_hat - p) W_U` for `hidden`."""
    rows = head.weight[indices].to(clean_logits.dtype)
    products = torch.bmm(rows, hidden.to(rows.dtype)[:, :, None])[:, :, 0]
    if head.bias is not None:
        products += head.bias[indices]
    logits = head.shape(products)
    log_p, log_p_hat = clean_logits.log_softmax(1), logits.log_softmax(1)
    p = log_p.exp()
    # Tokens in fp32, then their total in fp64, as for the exact KL.
    value = (p * (log_p - log_p_hat)).sum(1).sum(dtype=accumulation_dtype(p.device))
    d_products = (log_p_hat.exp() - p) * head.slope(logits)
    return value, torch.bmm(d_products[:, None], rows)[:, 0]
