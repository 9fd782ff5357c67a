"""When a run stops before its last token: the held-out KL no longer falls."""

from __future__ import annotations

from typing import Any


class EarlyStop:
    """Counts evaluations in a row whose KL is not below the lowest so far.

    Args:
        patience: how many of them stop the run; None for never.
    """

    def __init__(self, patience: int | None):
        self.patience = patience
        self.lowest: float | None = None
        self.n_without_gain = 0

    def see(self, kl: float) -> None:
        """Take note of one evaluation, in nats per token; one that is not a number is one without gain."""
        if self.lowest is None or kl < self.lowest:
            self.lowest, self.n_without_gain = kl, 0
        else:
            self.n_without_gain += 1

    @property
    def reached(self) -> bool:
        return self.patience is not None and self.n_without_gain >= self.patience

    def state(self) -> dict[str, Any]:
        """What `load` needs, JSON-ready."""
        return {"lowest": self.lowest, "n_without_gain": self.n_without_gain}

    def load(self, state: dict[str, Any]) -> None:
        """Go on counting where `state` was taken."""
        self.lowest, self.n_without_gain = state["lowest"], state["n_without_gain"]
