"""When a run stops before its last token, the held-out KL no longer falling, and what it ends with."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor


class EarlyStop:
    """Counts evaluations in a row whose KL is not below the lowest so far, and keeps the weights of the lowest.

    Args:
        patience: how many of them stop the run; None for never, and then nothing is kept.
    """

    def __init__(self, patience: int | None):
        self.patience = patience
        self.lowest: float | None = None
        self.n_without_gain = 0
        self.best_weights: dict[str, Tensor] = {}

    def see(self, kl: float, sae: TrainingSAE[Any]) -> None:
        """Take note of one evaluation, in nats per token; one that is not a number is one without gain."""
        if self.patience is None:
            return
        if self.lowest is None or kl < self.lowest:
            self.lowest, self.n_without_gain = kl, 0
            self.best_weights = {name: value.detach().cpu().clone() for name, value in sae.state_dict().items()}
        else:
            self.n_without_gain += 1

    @property
    def reached(self) -> bool:
        return self.patience is not None and self.n_without_gain >= self.patience

    @torch.no_grad()
    def restore_best(self, sae: TrainingSAE[Any]) -> bool:
        """Put the weights of the lowest KL back; whether the SAE has other ones now."""
        now = sae.state_dict()
        if all(torch.equal(value, now[name].cpu()) for name, value in self.best_weights.items()):
            return False
        sae.load_state_dict(self.best_weights)
        return True

    def state(self) -> dict[str, Any]:
        """What `load` needs besides `best_weights`, JSON-ready."""
        return {"lowest": self.lowest, "n_without_gain": self.n_without_gain}

    def load(self, state: dict[str, Any], best_weights: dict[str, Tensor]) -> None:
        """Go on counting where `state` was taken."""
        self.lowest, self.n_without_gain = state["lowest"], state["n_without_gain"]
        self.best_weights = best_weights
