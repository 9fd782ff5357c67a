"""The loss terms as pure functions of tensors (Braun et al. 2024, arXiv 2405.12241, section 2).

Every function sums over features or vocabulary and returns one value per token, or their sum over the tokens given;
which tokens count and what the mean divides by is the caller's (`trainer.py`), so that micro-batches add up exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked

# Elements of one chunk's logits: 2**23 fp32 values are 32 MiB, large enough for full matmul speed, small enough that
# the handful of temporaries per chunk does not matter beside the model.
CHUNK_LOGIT_ELEMENTS = 2**23

Unembed = Callable[[Tensor], Tensor]
"""`[tokens, d_model]` (the final hidden state, after the final norm) -> `[tokens, vocabulary]`."""


@shape_checked
def kl_per_token(
    clean_logits: Float[Tensor, "tokens vocabulary"], spliced_logits: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """`D_KL(y || y_hat) = sum_v y (log y - log y_hat)` in nats: clean model first, computed in at least fp32."""
    log_y = clean_logits.to(torch.promote_types(clean_logits.dtype, torch.float32)).log_softmax(-1)
    log_y_hat = spliced_logits.to(torch.promote_types(spliced_logits.dtype, torch.float32)).log_softmax(-1)
    return F.kl_div(log_y_hat, log_y, log_target=True, reduction="none").sum(-1)


@shape_checked
def fused_kl_sum(
    clean_hidden: Float[Tensor, "tokens d_model"],
    spliced_hidden: Float[Tensor, "tokens d_model"],
    unembed: Unembed,
    vocabulary: int,
) -> Float[Tensor, ""]:
    """Sum over tokens of `D_KL(y || y_hat)`, from final hidden states, without ever holding all the logits.

    Unembeds chunks of tokens and computes the gradient of `spliced_hidden` in the same pass; `clean_hidden` gets none.

    Args:
        clean_hidden: final hidden states of the clean model, after the final norm.
        spliced_hidden: those of the model with the SAE spliced in.
        unembed: the model's map from hidden states to logits.
        vocabulary: number of logits per token, which sizes the chunks.
    """
    total: Tensor = _FusedKLSum.apply(spliced_hidden, clean_hidden, unembed, vocabulary)  # pyright: ignore[reportAssignmentType]
    return total


class _FusedKLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spliced_hidden: Tensor, clean_hidden: Tensor, unembed: Unembed, vocabulary: int) -> Tensor:
        chunk = max(1, CHUNK_LOGIT_ELEMENTS // vocabulary)
        needs_grad = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float64, device=spliced_hidden.device)
        gradients: list[Tensor] = []
        for clean, spliced in zip(clean_hidden.split(chunk), spliced_hidden.split(chunk), strict=True):
            chunk_sum, gradient = _kl_chunk(clean, spliced, unembed, needs_grad)
            total += chunk_sum
            gradients.append(gradient)
        if needs_grad:
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(spliced_hidden))
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None


def _kl_chunk(clean: Tensor, spliced: Tensor, unembed: Unembed, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """KL sum of one chunk and its gradient with respect to `spliced`: `dKL/dlogits = y_hat - y`, through `unembed`."""
    log_y = unembed(clean.detach()).float().log_softmax(-1)
    leaf = spliced.detach().requires_grad_(needs_grad)
    with torch.set_grad_enabled(needs_grad):
        logits = unembed(leaf)
    log_y_hat = logits.detach().float().log_softmax(-1)
    y = log_y.exp()
    # In place from here on: these are the largest tensors of a step.
    chunk_sum = log_y.sub_(log_y_hat).mul_(y).sum(-1).sum(dtype=torch.float64)
    if not needs_grad:
        return chunk_sum, leaf
    logits_gradient = log_y_hat.exp_().sub_(y).to(logits.dtype)
    (gradient,) = torch.autograd.grad(logits, leaf, logits_gradient)
    return chunk_sum, gradient


@shape_checked
def squared_error_sum(spliced: Float[Tensor, "tokens d"], clean: Float[Tensor, "tokens d"]) -> Float[Tensor, ""]:
    """Sum over tokens of `||a_hat^(k) - a^(k)||^2` at one downstream point; the clean side gets no gradient."""
    return (spliced.float() - clean.detach().float()).pow(2).sum()
