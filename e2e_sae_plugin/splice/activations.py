"""Between the model's activations `[batch, pos, ...]` and the SAE's `[tokens, d_in]`: heads, positions, masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked


@shape_checked
def trained_tokens(
    tokens: Int[Tensor, "batch pos"],
    seqpos_slice: Sequence[int | None] = (None,),
    excluded: Int[Tensor, " ids"] | None = None,
) -> Bool[Tensor, "batch pos"] | None:
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


@shape_checked
def select_tokens(
    activation: Float[Tensor, "batch pos *d"] | Int[Tensor, "batch pos *d"], mask: Bool[Tensor, "batch pos"] | None
) -> Float[Tensor, "tokens flat"] | Int[Tensor, "tokens flat"]:
    """`[batch, pos, ...] -> [tokens, d]`: the trained tokens, trailing dimensions (heads) flattened."""
    return activation.flatten(2).flatten(0, 1) if mask is None else activation.flatten(2)[mask]


@shape_checked
def select_sae_in(
    activation: Float[Tensor, "batch pos *d"], mask: Bool[Tensor, "batch pos"] | None, head_index: int | None
) -> Float[Tensor, "tokens d_in"]:
    """`[batch, pos, ...] -> [tokens, d_in]`: what the SAE reads, one head only where `head_index` is given."""
    return select_tokens(activation if head_index is None else activation[:, :, head_index], mask)


@shape_checked
def insert_sae_out(
    activation: Float[Tensor, "batch pos *d"],
    sae_out: Float[Tensor, "tokens d_in"],
    mask: Bool[Tensor, "batch pos"] | None,
    head_index: int | None,
) -> Float[Tensor, "batch pos *d"]:
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
