"""How far a fine-tune has moved an SAE's features: cosines of their directions before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

QUANTILES = {"median": 0.5, "5 %": 0.05, "1 %": 0.01}


@dataclass(frozen=True)
class Movement:
    """One cosine per feature."""

    decoder: Tensor
    """`[d_sae]`: of the rows of `W_dec`."""
    encoder: Tensor | None
    """`[d_sae]`: of the columns of `W_enc`; None where the decoder is the encoder (matching pursuit)."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, lower tails and minimum, by direction."""
        directions = {"decoder": self.decoder} | ({} if self.encoder is None else {"encoder": self.encoder})
        return {
            name: {label: float(cosines.quantile(q)) for label, q in QUANTILES.items()}
            | {"minimum": float(cosines.min())}
            for name, cosines in directions.items()
        }


@torch.no_grad()
def movement(before: SAE[Any], after: SAE[Any]) -> Movement:
    """Compare two SAEs feature by feature. A direction that is zero in both has not moved.

    Raises:
        ValueError: they differ in shape.
    """
    if before.W_dec.shape != after.W_dec.shape:
        raise ValueError(f"The SAEs have decoders of {tuple(before.W_dec.shape)} and {tuple(after.W_dec.shape)}.")
    encoder = None
    if "W_enc" in dict(before.named_parameters()):
        encoder = _cosines(before.W_enc.T, after.W_enc.T)
    return Movement(_cosines(before.W_dec, after.W_dec), encoder)


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    first, second = first.detach().cpu().double(), second.detach().cpu().double()
    norms = first.norm(dim=1), second.norm(dim=1)
    cosines = (first * second).sum(1) / (norms[0] * norms[1]).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where((norms[0] == 0) & (norms[1] == 0), torch.ones_like(cosines), cosines.clamp(-1, 1))
