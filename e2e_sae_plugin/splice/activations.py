"""Between the model's activations `[batch, pos, ...]` and the SAE's `[tokens, d_in]`: heads, positions, masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def trained_tokens(
    tokens: Tensor, seqpos_slice: Sequence[int | None] = (None,), excluded: Tensor | None = None
) -> Tensor | None:
    """Mask `[batch, pos]` of the tokens that are trained on; None where that is every token.

    Args:
        seqpos_slice: slice of positions, as in SAELens.
        excluded: token ids that are left out.
    """
    positions = slice(*seqpos_slice)
    if excluded is None and positions in (slice(None), slice(None, None, 1), slice(0, None)):
        return None
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, positions] = True
    if excluded is not None:
        mask &= ~torch.isin(tokens, excluded.to(tokens.device))
    return mask


def select_tokens(activation: Tensor, mask: Tensor | None) -> Tensor:
    """`[batch, pos, ...] -> [tokens, d]`: the trained tokens, trailing dimensions (heads) flattened."""
    return activation.flatten(2).flatten(0, 1) if mask is None else activation.flatten(2)[mask]


def select_sae_in(activation: Tensor, mask: Tensor | None, head_index: int | None) -> Tensor:
    """`[batch, pos, ...] -> [tokens, d_in]`: what the SAE reads, one head only where `head_index` is given."""
    return select_tokens(activation if head_index is None else activation[:, :, head_index], mask)


def insert_sae_out(activation: Tensor, sae_out: Tensor, mask: Tensor | None, head_index: int | None) -> Tensor:
    """The activation with `sae_out [tokens, d_in]` at the trained tokens (and head); the rest stays clean.

    Gradients flow to `sae_out` alone.
    """
    sae_out = sae_out.to(activation.device, activation.dtype)
    if head_index is not None:
        spliced_head = insert_sae_out(activation[:, :, head_index], sae_out, mask, None)
        return torch.cat(
            [activation[:, :, :head_index], spliced_head[:, :, None], activation[:, :, head_index + 1 :]], dim=2
        )
    if mask is None:
        return sae_out.reshape(activation.shape)
    flat = activation.flatten(2).clone()
    flat[mask] = sae_out
    return flat.reshape(activation.shape)
