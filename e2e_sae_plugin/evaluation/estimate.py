"""A measured number with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.evaluation.sums import interval

BOOTSTRAP_ELEMENTS = 2**21
"""Values drawn at a time, 32 MiB with their indices; a single resample may be larger."""


@dataclass(frozen=True)
class Estimate:
    """A value and the interval around it, in the value's own unit. `str()` gives "0.1234 [0.1200, 0.1270]"."""

    value: float
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    def to_dict(self) -> dict[str, float]:
        """`{"value": ..., "low": ..., "high": ...}`, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: Mapping[str, float]) -> Estimate:
        """What `to_dict` gave.

        Raises:
            ValueError: an entry is missing, or there is one too many.
        """
        if set(entries) != {"value", "low", "high"}:
            raise ValueError(
                f"An Estimate is stored as value, low and high, got {sorted(entries)}. Give exactly these three."
            )
        return cls(**{name: float(entry) for name, entry in entries.items()})

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def rarest_seen(n_tokens: int, confidence: float = 0.95) -> float:
    """The density below which a feature can stay unseen: one that fires on no token of `n_tokens` is rarer than this.

    `1 - (1 - confidence)^(1 / n)`, about `3 / n` at 95%.

    Args:
        n_tokens: Tokens looked at, at least 1.
        confidence: Between 0 and 1.
    """
    return 1 - (1 - confidence) ** (1 / n_tokens)


def share_interval(n: int, n_tokens: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, from `n` of `n_tokens`."""
    z = 1.959964
    share = n / n_tokens
    middle = share + z * z / (2 * n_tokens)
    half = z * math.sqrt(share * (1 - share) / n_tokens + z * z / (4 * n_tokens**2))
    scale = 1 + z * z / n_tokens
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@shape_checked
def mean_with_interval(
    values: Float[Tensor, " n"], n_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate | None:
    """The mean of `values [n]`, in their unit, with a bootstrap interval over them (percentiles of resampled means).

    Of one value, the interval is that value: nothing shows how it would vary.

    Args:
        n_resamples: draws of `n` values with replacement, `BOOTSTRAP_ELEMENTS` values at a time.
        confidence: between 0 and 1.
        seed: of the draws.

    Returns:
        None where there are no values.

    Raises:
        ValueError: a value is not finite, `confidence` is not between 0 and 1, or `n_resamples` is below 1.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}.")
    values = values.detach().cpu().double()
    if not values.isfinite().all():
        n_bad = int((~values.isfinite()).sum())
        raise ValueError(
            f"{n_bad} of the {len(values)} values are NaN or infinite; expected finite ones. Leave them out."
        )
    if not len(values):
        return None
    generator = torch.Generator().manual_seed(seed)
    at_a_time = max(1, BOOTSTRAP_ELEMENTS // len(values))
    means = [
        values[torch.randint(len(values), (min(at_a_time, n_resamples - done), len(values)), generator=generator)].mean(
            1
        )
        for done in range(0, n_resamples, at_a_time)
    ]
    return Estimate(float(values.mean()), *interval(torch.cat(means), confidence))
