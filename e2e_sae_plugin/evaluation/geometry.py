"""The geometry of dictionaries: how close each feature's direction is to its nearest neighbour, and which is which.

Dictionaries are the rows of `W_dec [d_sae, d_in]` of alive features; only their directions count.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.estimate import mean_with_interval as mean_with_interval

logger = logging.getLogger(__name__)

BLOCK_ELEMENTS = 2**22
"""Cosines held at a time: 16 MiB in fp32, whatever the size of the dictionaries."""
HISTOGRAM_EDGES = torch.linspace(-1, 1, 51, dtype=torch.float64)
"""`[51]`: the edges of 50 bins, each with its lower edge, the last with both."""
NEAR = 0.9
"""A neighbour above this cosine counts as the same direction."""
DENSE_ELEMENTS = 2**24
"""Pairs up to which the matching is exact: 4,096 features of each, whose cosines take 192 MiB with scipy's copy."""
N_CANDIDATES = 16
"""Beyond that, the nearest features that each one may be matched to in a round."""
MAX_ROUNDS = 8


@dataclass(frozen=True)
class NearestNeighbours:
    """Each row's nearest neighbour; both empty where there is none to find."""

    cosine: Tensor
    """`[n]`, fp32, in [-1, 1]."""
    index: Tensor
    """`[n]`, int64: the neighbour's row; one of them where several are equally near."""


@dataclass(frozen=True)
class CosineSummary:
    """The nearest-neighbour cosines of one dictionary, within it or towards another one."""

    cosines: Tensor = field(repr=False, compare=False)
    """`[n]`, fp32, on the CPU: one per feature of the first dictionary."""
    mean: Estimate | None
    """With a bootstrap interval over features; None where there are no cosines, as for the next two."""
    median: float | None
    share_near: float | None
    """Share of features whose nearest neighbour has a cosine above `NEAR`."""
    histogram: tuple[int, ...]
    """Features by bin of `HISTOGRAM_EDGES`."""

    @classmethod
    def of(cls, cosines: Tensor, *, n_resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> CosineSummary:
        """Of cosines `[n]` that are there already, for instance those of several comparisons together."""
        exact = cosines.cpu().double()
        return cls(
            cosines,
            mean_with_interval(cosines, n_resamples, confidence, seed),
            float(exact.quantile(0.5)) if len(exact) else None,
            float((exact > NEAR).double().mean()) if len(exact) else None,
            tuple(int(count) for count in torch.histogram(exact, HISTOGRAM_EDGES).hist.tolist()),
        )

    @property
    def n(self) -> int:
        """Features compared."""
        return len(self.cosines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single cosines, for JSON."""
        return {
            "n": self.n,
            "mean": None if self.mean is None else self.mean.to_dict(),
            "median": self.median,
            "share_near": self.share_near,
            "histogram": list(self.histogram),
        }


@dataclass(frozen=True)
class Matching:
    """Pairs of features, in the order of the first dictionary; at most min(n, m) of them, no feature twice."""

    first_index: Tensor
    """`[pairs]`, int64, on the CPU: rows of the first dictionary, ascending."""
    second_index: Tensor
    """`[pairs]`, int64: their partners' rows in the second one."""
    cosine: Tensor
    """`[pairs]`, fp32."""


@torch.no_grad()
@shape_checked
def nearest_cosines(
    first: Float[Tensor, "n d_in"], second: Float[Tensor, "m d_other"] | None = None, *, chunk: int | None = None
) -> NearestNeighbours:
    """For each row of `first`, the largest cosine similarity to a row of `second`, or to another row of `first`.

    Computed in fp32 on the device of `first`. A zero row has cosine 0 with every row.

    Args:
        first: `[n, d_in]`.
        second: `[m, d_in]`; None for `first` itself, each row left out of its own search.
        chunk: cosines held at a time, `BLOCK_ELEMENTS` by default. The blocks are cut in both dimensions, so that
            memory beyond normalised copies of the dictionaries does not grow with them.

    Returns:
        Empty where there is no row to search: `second` is empty, or `first` has a single row and no `second`.

    Raises:
        ValueError: the dictionaries differ in `d_in`, an entry is not finite, or `chunk` is below 1.
    """
    first_units, second_units = _units_of(first, second)
    if len(second_units) < (2 if second is None else 1):
        return NearestNeighbours(first_units.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=first.device))
    cosines, index = _nearest(first_units, second_units, 1, chunk, within=second is None)
    return NearestNeighbours(cosines[:, 0], index[:, 0])


@shape_checked
def compare_dictionaries(
    first: Float[Tensor, "n d_in"],
    second: Float[Tensor, "m d_other"] | None = None,
    *,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    chunk: int | None = None,
) -> CosineSummary:
    """Summarise the nearest-neighbour cosines of `first`: figure 3 of Braun et al. 2024 (arXiv 2405.12241).

    The paper's three comparisons: within one SAE (`second` None; high cosines are features that split), across seeds
    (the same recipe twice; high cosines are features found again) and across types (end-to-end against local). The
    last two are not symmetric: every feature of `first` has a neighbour, some of `second` are nobody's.

    Args:
        first: `[n, d_in]`, decoder directions of alive features.
        second: `[m, d_in]`, likewise.
        n_resamples: of the mean's interval, with `confidence` and `seed`; see `mean_with_interval`.
        chunk: see `nearest_cosines`.

    Returns:
        An empty summary, after a warning in the log, where there is nothing to compare.

    Raises:
        ValueError: `first` and `second` are equal, differ in `d_in` or are not finite, or a setting is out of range.
    """
    if second is not None and len(first) and first.shape == second.shape and torch.equal(first, second.to(first)):
        raise ValueError(
            f"This is a cross-seed comparison of one seed: both dictionaries are the same {tuple(first.shape)} numbers. "
            "Give two different SAEs, or no second one for neighbours within the SAE."
        )
    cosines = nearest_cosines(first, second, chunk=chunk).cosine.cpu()
    summary = CosineSummary.of(cosines, n_resamples=n_resamples, confidence=confidence, seed=seed)
    if not summary.n:
        sizes = f"{len(first)} alive features" + ("" if second is None else f" against {len(second)}")
        logger.warning("There is nothing to compare: %s. The summary of their cosines is empty.", sizes)
    return summary


@torch.no_grad()
@shape_checked
def match_features(first: Float[Tensor, "n d_in"], second: Float[Tensor, "m d_other"]) -> Matching:
    """Pair up the rows of two dictionaries one-to-one, with the largest total cosine.

    Up to `DENSE_ELEMENTS` pairs, the matching is the best there is and holds min(n, m) pairs. Larger dictionaries are
    matched in rounds, in memory that grows with `N_CANDIDATES * (n + m)`: each feature of the smaller dictionary may
    take one of its nearest features that are still free, or wait for the next round, which counts as the cosine of
    the farthest of these. That is close to the best matching, not proven equal to it. Where the same few features are
    nearest to very many, some are still without a partner after `MAX_ROUNDS`; they are left out, with a warning in
    the log.

    Args:
        first: `[n, d_in]`, decoder directions of alive features; a zero row has cosine 0 with every row.
        second: `[m, d_in]`, likewise.

    Returns:
        No pairs where a dictionary is empty.

    Raises:
        ValueError: the dictionaries differ in `d_in`, or an entry is not finite.
    """
    units = _units_of(first, second)
    swapped = len(first) > len(second)
    few, many = (units[1], units[0]) if swapped else units
    few_left, many_left = torch.arange(len(few)), torch.arange(len(many))
    pairs = [torch.zeros(0, 2, dtype=torch.int64)]
    for _ in range(MAX_ROUNDS):
        if not len(few_left):
            break
        found = _match_round(few[few_left.to(few.device)], many[many_left.to(many.device)])
        pairs.append(torch.stack([few_left[found[:, 0]], many_left[found[:, 1]]], 1))
        few_left, many_left = _without(few_left, found[:, 0]), _without(many_left, found[:, 1])
    if len(few_left):
        logger.warning(
            "%d of %d features are left without a partner after %d rounds of matching: their nearest features are "
            "those of many others.", len(few_left), len(few), MAX_ROUNDS,
        )  # fmt: skip
    matched = torch.cat(pairs).flip(1) if swapped else torch.cat(pairs)
    matched = matched[matched[:, 0].argsort()]
    at = matched.to(units[0].device)
    # In parts: the rows of all pairs together would be another copy of both dictionaries.
    cosines = [(units[0][part[:, 0]] * units[1][part[:, 1]]).sum(1).cpu() for part in at.split(4096)]
    return Matching(matched[:, 0], matched[:, 1], torch.cat(cosines).clamp(-1, 1))


@torch.no_grad()
@shape_checked
def unit_rows(rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    """Rows of norm 1 in fp32; zero rows stay zero.

    Raises:
        ValueError: an entry is not finite.
    """
    rows = rows.detach() if rows.dtype == torch.float64 else rows.detach().float()
    if not rows.isfinite().all():
        n_bad = int((~rows.isfinite()).any(1).sum())
        raise ValueError(
            f"{n_bad} of the dictionary's {len(rows)} rows have NaN or infinite entries; expected finite ones. "
            "Leave these features out, or find out why their training diverged."
        )
    if not rows.numel():
        return rows.float()
    # By the largest entry first: the square of a small entry would underflow in fp32.
    largest = rows.abs().amax(1, keepdim=True)
    scaled = (rows / torch.where(largest > 0, largest, 1)).float()
    return scaled / scaled.norm(dim=1, keepdim=True).clamp(min=1)


def _units_of(first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
    if second is not None and first.shape[1] != second.shape[1]:
        raise ValueError(
            f"The dictionaries have directions of {first.shape[1]} and {second.shape[1]} dimensions; expected the same "
            "d_in. Compare SAEs of one place in one model."
        )
    units = unit_rows(first)
    return units, units if second is None else unit_rows(second).to(units.device)


def _nearest(
    first: Tensor, second: Tensor, k: int, chunk: int | None = None, *, within: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines and indices `[n, k]` of the `k` rows of `second` nearest to each row, all of norm 1 or 0, nearest first.

    `within` leaves out the row of the same index. Blocks are about square: matrix products are fastest so.
    """
    chunk = BLOCK_ELEMENTS if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 cosine at a time, got {chunk}. Leave it out for {BLOCK_ELEMENTS}.")
    height = max(1, min(len(first), math.isqrt(chunk)))
    width = chunk // height
    best = first.new_zeros(len(first), k)
    index = torch.zeros(len(first), k, dtype=torch.int64, device=first.device)
    for row in range(0, len(first), height):
        units = first[row : row + height]
        top, where = best[row : row + height, :0], index[row : row + height, :0]
        for column in range(0, len(second), width):
            cosines = units @ second[column : column + width].T
            if within:
                own = torch.arange(row, row + len(units), device=first.device) - column
                inside = (own >= 0) & (own < cosines.shape[1])
                cosines[inside.nonzero()[:, 0], own[inside]] = -math.inf
            found, at = cosines.max(1, keepdim=True) if k == 1 else cosines.topk(min(k, cosines.shape[1]))
            top, order = (merged := torch.cat([top, found], 1)).topk(min(k, merged.shape[1]))
            where = torch.cat([where, at + column], 1).gather(1, order)
        best[row : row + height], index[row : row + height] = top.clamp(-1, 1), where
    return best, index


def _match_round(few: Tensor, many: Tensor) -> Tensor:
    """`[pairs, 2]`: exact where the cosines fit, else among nearest candidates; at least one pair."""
    if len(few) * len(many) <= DENSE_ELEMENTS:
        rows, columns = linear_sum_assignment((few @ many.T).cpu().numpy(), maximize=True)
        return torch.from_numpy(np.stack([rows, columns], 1))
    cosines, candidates = _nearest(few, many, min(N_CANDIDATES, len(many)))
    weights = 2 + cosines.cpu().double().numpy()  # scipy takes a weight of 0 for no edge
    n, k = weights.shape
    # One more column for each row, for waiting: a little worse than its last candidate, so that not all rows wait.
    waiting = weights[:, -1:] - 1e-6
    columns = np.concatenate([candidates.cpu().numpy(), len(many) + np.arange(n)[:, None]], 1)
    starts = np.arange(n + 1) * (k + 1)
    graph = csr_array(
        (np.concatenate([weights, waiting], 1).ravel(), columns.ravel(), starts), shape=(n, len(many) + n)
    )
    rows, chosen = min_weight_full_bipartite_matching(graph, maximize=True)
    taken = chosen < len(many)
    return torch.from_numpy(np.stack([rows[taken], chosen[taken]], 1).astype(np.int64))


def _without(left: Tensor, taken: Tensor) -> Tensor:
    keep = torch.ones(len(left), dtype=torch.bool)
    keep[taken] = False
    return left[keep]
