"""The loss terms as pure functions of tensors (Braun et al. 2024, arXiv 2405.12241, section 2).

Every function sums over features or vocabulary and returns one value per token, or their sum over the tokens given;
which tokens count and what the mean divides by is the caller's (`trainer.py`), so that micro-batches add up exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked


@shape_checked
def kl_per_token(
    clean_logits: Float[Tensor, "tokens vocabulary"], spliced_logits: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """`D_KL(y || y_hat) = sum_v y (log y - log y_hat)` in nats: clean model first, computed in at least fp32."""
    log_y = clean_logits.to(torch.promote_types(clean_logits.dtype, torch.float32)).log_softmax(-1)
    log_y_hat = spliced_logits.to(torch.promote_types(spliced_logits.dtype, torch.float32)).log_softmax(-1)
    return F.kl_div(log_y_hat, log_y, log_target=True, reduction="none").sum(-1)


@shape_checked
def squared_error_sum(spliced: Float[Tensor, "tokens d"], clean: Float[Tensor, "tokens d"]) -> Float[Tensor, ""]:
    """Sum over tokens of `||a_hat^(k) - a^(k)||^2` at one downstream point; the clean side gets no gradient."""
    return (spliced.float() - clean.detach().float()).pow(2).sum()
