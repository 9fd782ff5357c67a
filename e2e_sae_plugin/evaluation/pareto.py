"""Who is better at equal sparsity: Pareto fronts, and ratios interpolated along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.sums import interval

GRID = 9
"""Points of the common range at which two curves are compared."""


def dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points another one beats: not above it in either coordinate, and below it in one. Less is better in both."""
    return [
        any(x2 <= x and y2 <= y and (x2 < x or y2 < y) for j, (x2, y2) in enumerate(points) if j != i)
        for i, (x, y) in enumerate(points)
    ]


@dataclass(frozen=True)
class Curve:
    """One seed's SAEs of one kind, in any order: what they reach against what it costs.

    Args:
        x: `[points, 1 + n_resamples]`: the values themselves, then those of bootstrap resamples, where there are any.
        y: the same.
    """

    x: Tensor
    y: Tensor

    def at(self, x: Tensor) -> Tensor:
        """Interpolated `log y` at `log x` (`[grid]`), linear between neighbouring points in both logarithms;
        `[grid, 1 + n_resamples]`, nan outside of the curve."""
        log_x, log_y = _log(self.x), _log(self.y)
        order = log_x.argsort(0)
        log_x, log_y = log_x.gather(0, order), log_y.gather(0, order)
        result = torch.full((len(x), log_x.shape[1]), float("nan"), dtype=torch.float64)
        for i in range(len(log_x) - 1):
            inside = (x[:, None] >= log_x[i]) & (x[:, None] <= log_x[i + 1])
            width = (log_x[i + 1] - log_x[i]).clamp_min(1e-12)
            value = log_y[i] + (x[:, None] - log_x[i]) / width * (log_y[i + 1] - log_y[i])
            result = torch.where(inside, value, result)
        return result

    @property
    def range(self) -> tuple[float, float]:
        """Of `log x`, at the values themselves."""
        log_x = _log(self.x)[:, 0]
        return float(log_x.min()), float(log_x.max())

    def positive(self) -> Curve:
        """Without the points that have no logarithm: of a dead SAE, or of one that costs the model nothing measurable."""
        kept = (self.x[:, 0] > 0) & (self.y[:, 0] > 0)
        return Curve(self.x[kept], self.y[kept])


def _log(values: Tensor) -> Tensor:
    """Of positive values; a resample of them that is not counts as next to nothing, which widens the interval."""
    return values.double().clamp_min(1e-12).log()


@dataclass(frozen=True)
class Ratio:
    """How one kind's `y` compares with another's at equal `x`."""

    estimate: Estimate
    """Geometric mean of the ratio over the common range and over seeds, with the interval of the bootstrap."""
    by_seed: tuple[float, ...]
    """The same for each seed by itself."""
    x_range: tuple[float, float]
    """Where the curves overlap for every seed."""


def ratio_at_equal(first: Sequence[Curve], second: Sequence[Curve]) -> Ratio | None:
    """`y` of `first` over `y` of `second` at equal `x`, over the range that all their curves cover.

    Args:
        first: a curve per seed.
        second: the curves to compare with; the n-th with the n-th of `first`, or with the last where there are fewer.

    Returns:
        None where the curves have no common range, or a curve has fewer than two points. Points that are not above 0 in
        both coordinates have no logarithm and are left out.
    """
    first, second = [each.positive() for each in first], [each.positive() for each in second]
    curves = [*first, *second]
    if not first or not second or any(len(curve.x) < 2 for curve in curves):
        return None
    low, high = max(curve.range[0] for curve in curves), min(curve.range[1] for curve in curves)
    if not low < high:
        return None
    grid = torch.linspace(low, high, GRID, dtype=torch.float64)
    logs: list[Tensor] = []
    for index, curve in enumerate(first):
        difference = curve.at(grid) - second[min(index, len(second) - 1)].at(grid)
        logs.append(difference.nanmean(0))  # a resample may not reach the ends of the range
    together = torch.stack(logs).mean(0).exp()
    resampled = together[1:][torch.isfinite(together[1:])]
    value = float(together[0])
    ends = interval(resampled) if len(resampled) else (value, value)
    low, high = (float(torch.tensor(end).exp()) for end in (low, high))
    return Ratio(Estimate(value, *ends), tuple(float(log[0].exp()) for log in logs), (low, high))
