"""What of an SAE stays as it is while it trains: frozen parameters, and the norms of its decoder's rows."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor


def freeze(sae: TrainingSAE[Any], names: tuple[str, ...]) -> None:
    """Have these parameters get no gradient.

    Raises:
        ValueError: the SAE has no parameter of such a name, or nothing would be left to train.
    """
    parameters = dict(sae.named_parameters())
    for name in names:
        if name not in parameters:
            raise ValueError(
                f"frozen_parameters names {name!r}, but a {sae.cfg.architecture()!r} SAE has the parameters "
                f"{sorted(parameters)}."
            )
    if set(names) == set(parameters):
        raise ValueError(f"frozen_parameters names every parameter, {sorted(parameters)}: nothing is left to train.")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in names)


class DecoderNorms:
    """Holds the norm of every row of `W_dec [d_sae, d_in]` (Karvonen 2025, arXiv 2503.17272; method of Bricken et al. 2023).

    Args:
        sae: its rows' norms now are the ones that are held.
    """

    def __init__(self, sae: TrainingSAE[Any]):
        self.sae = sae
        self.norms: Tensor = sae.W_dec.detach().norm(dim=1, keepdim=True)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Leave out the part of the gradient along each row, which could only change its norm."""
        gradient, rows = self.sae.W_dec.grad, self.sae.W_dec
        if gradient is not None:
            squared = rows.square().sum(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
            gradient -= (gradient * rows).sum(1, keepdim=True) / squared * rows

    @torch.no_grad()
    def restore(self) -> None:
        """Scale the rows back, after an update."""
        rows = self.sae.W_dec
        rows *= self.norms / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
