"""Are there two kinds of features? Hartigan's dip test of a distribution of cosines, and where its two modes lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import isotonic_regression
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked

MAX_TESTED = 5_000
"""Values that the test uses at most; of more, it takes a random sample of this size."""
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Bimodality:
    """Hartigan's dip test against one mode, and the two-component Gaussian mixture that fits the values best."""

    dip: float
    """Largest distance of the empirical distribution function from the nearest unimodal one; between 1/(2n) and 1/4."""
    p_value: float
    """Share of uniform samples with a dip as large; small where the values have more than one mode."""
    modes: tuple[float, float]
    """Means of the mixture's components, lower first. They say something only where `is_bimodal`."""
    weights: tuple[float, float]
    """Shares of the components, in the order of `modes`; they add up to 1."""
    n: int
    """Values tested: at most `MAX_TESTED`."""

    @property
    def is_bimodal(self) -> bool:
        """`p_value < 0.05`: more than one mode, strictly, of which two are described."""
        return self.p_value < SIGNIFICANCE


@shape_checked
def bimodality(values: Float[Tensor, " n"], *, n_resamples: int = 500, seed: int = 0) -> Bimodality | None:
    """Test whether `values [n]` have one mode, as the paper's cross-type cosines do not (arXiv 2405.12241, figure 3).

    The p-value is by Monte Carlo against samples of the uniform distribution, for which the test of Hartigan and
    Hartigan (1985, Annals of Statistics 13, 70-84) is calibrated; it rejects other unimodal distributions more rarely.
    Of more than `MAX_TESTED` values, a sample without replacement, drawn by `seed`, is tested and fitted.

    Args:
        values: `[n]`, for example the cosines of `nearest_cosines`.
        n_resamples: uniform samples behind the p-value, whose smallest possible value is 1 / (`n_resamples` + 1).
        seed: of the uniform samples and of the sample of large `values`.

    Returns:
        None where there are no values.

    Raises:
        ValueError: a value is not finite, or `n_resamples` is below 1.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}.")
    found = _finite(values)
    if not len(found):
        return None
    if len(found) > MAX_TESTED:
        chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:MAX_TESTED]
        found = found[chosen.numpy()]
    dip = _dip(found)
    null = _uniform_dips(len(found), n_resamples, seed)
    as_large = int((null >= dip - 1e-12).sum())  # the smallest dip, 1/(2n), comes with rounding errors
    modes, weights = _two_components(found)
    return Bimodality(dip, (1 + as_large) / (1 + n_resamples), modes, weights, len(found))


@shape_checked
def dip_statistic(values: Float[Tensor, " n"] | Int[Tensor, " n"]) -> float:
    """Hartigan's dip of `values [n]`: how far their distribution function is from the nearest unimodal one.

    At least 1/(2n), by convention also where an atom would bring it to 0 (all values equal), and at most 1/4 for two values
    or more. Neither shifting, scaling nor mirroring the values changes it.

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    found = _finite(values)
    if not len(found):
        raise ValueError("The dip of no values is not defined: got an empty tensor, expected one value or more.")
    return _dip(found)


def _finite(values: Tensor) -> np.ndarray:
    found = values.detach().cpu().double().numpy()
    if not np.isfinite(found).all():
        n = int((~np.isfinite(found)).sum())
        raise ValueError(f"{n} of the {len(found)} values are NaN or infinite; expected finite ones. Leave them out.")
    return found


def _dip(values: np.ndarray) -> float:
    """The algorithm of Hartigan and Hartigan (1985), for distributions whose jumps may differ in height.

    It narrows down an interval `[low, high]` that holds the mode. To the left of it, the nearest unimodal function is
    half-way between the empirical one and its greatest convex minorant; to the right, its least concave majorant.
    `gap` is twice the distance that this costs so far.
    """
    spread = values.max() - values.min()
    if spread == 0 or len(values) < 2:
        return 1 / (2 * len(values))
    # Between 1 and 2, no two different numbers are so close that a slope overflows.
    x, counts = np.unique(1 + (values - values.min()) / spread, return_counts=True)
    after = np.cumsum(counts) / len(values)  # the empirical distribution function at each x ...
    before = np.concatenate([[0.0], after[:-1]])  # ... and its limit from the left
    gap = 1 / len(values)
    low, high = 0, len(x) - 1
    while low < high:
        part = slice(low, high + 1)
        convex = low + _convex_contacts(x[part], before[part])
        concave = low + _convex_contacts(x[part], -after[part])
        minorant = np.interp(x[part], x[convex], before[convex])
        majorant = np.interp(x[part], x[concave], after[concave])
        between = majorant - minorant
        # Both are straight between their points of contact, so that the widest place is at one of those.
        widest_convex = convex[between[convex - low].argmax()]
        widest_concave = concave[between[concave - low].argmax()]
        if between[widest_convex - low] > between[widest_concave - low]:
            widest, new_low = between[widest_convex - low], widest_convex
            new_high = concave[np.searchsorted(concave, new_low)]
        else:
            widest, new_high = between[widest_concave - low], widest_concave
            new_low = convex[np.searchsorted(convex, new_high, side="right") - 1]
        if widest <= gap or (new_low, new_high) == (low, high):
            break
        left = (after[part] - minorant)[: new_low - low]
        right = (majorant - before[part])[new_high - low + 1 :]
        gap = max(gap, left.max(initial=0.0), right.max(initial=0.0))
        low, high = new_low, new_high
    return float(gap / 2)


def _convex_contacts(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the greatest convex minorant of the points touches them, ends included.

    Its slopes are the isotonic regression of the slopes between neighbours, weighted by their distances.
    """
    steps = np.diff(x)
    return isotonic_regression(np.diff(y) / steps, weights=steps).blocks


@lru_cache(maxsize=32)
def _uniform_dips(n: int, n_resamples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.array([_dip(generator.random(n)) for _ in range(n_resamples)])


def _two_components(values: np.ndarray, n_steps: int = 200) -> tuple[tuple[float, float], tuple[float, float]]:
    """Means and weights of two Gaussians, by expectation maximisation from the split in two of least variance."""
    x = np.sort(values)
    if len(x) < 2 or x[0] == x[-1]:
        return (float(x[0]), float(x[0])), (0.5, 0.5)
    size = np.arange(1, len(x))
    sums = np.cumsum(x - x.mean())[:-1]
    split = int(size[(sums**2 / (size * (len(x) - size))).argmax()])
    second = (np.arange(len(x)) >= split).astype(float)
    floor = 1e-6 * x.var()  # keeps a component of equal values (copies of one feature) from collapsing
    means = weights = np.zeros(2)
    for _ in range(n_steps):
        shares = np.stack([1 - second, second])
        weights = shares.sum(1) / len(x)
        means_before, means = means, shares @ x / shares.sum(1)
        variances = np.maximum((shares * (x - means[:, None]) ** 2).sum(1) / shares.sum(1), floor)
        logs = np.log(weights / np.sqrt(variances))[:, None] - (x - means[:, None]) ** 2 / (2 * variances[:, None])
        second = 1 / (1 + np.exp(np.clip(logs[0] - logs[1], -30, 30)))
        if np.abs(means - means_before).max() < 1e-9 * (x[-1] - x[0]):
            break
    order = np.argsort(means)
    low, high = means[order].tolist()
    low_weight, high_weight = weights[order].tolist()
    return (low, high), (low_weight, high_weight)
