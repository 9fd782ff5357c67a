"""Dictionaries whose geometry is known by hand, blocked code against naive code, and the dip test by its definition."""

from __future__ import annotations

import builtins
import itertools
import json
import logging
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import sum_bound
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from e2e_sae_plugin.evaluation import estimate as estimate_module
from e2e_sae_plugin.evaluation import geometry
from e2e_sae_plugin.evaluation.bimodality import MAX_TESTED, bimodality, dip_statistic
from e2e_sae_plugin.evaluation.estimate import Estimate, mean_with_interval
from e2e_sae_plugin.evaluation.geometry import (
    HISTOGRAM_EDGES,
    compare_dictionaries,
    match_features,
    nearest_cosines,
    unit_rows,
)
from e2e_sae_plugin.evaluation.sums import bootstrap_weights, interval
from e2e_sae_plugin.evaluation.umap import umap_coordinates


def dictionary(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def naive_cosines(first: Tensor, second: Tensor) -> Tensor:
    return F.normalize(first.double(), dim=1) @ F.normalize(second.double(), dim=1).T


class LargestProduct:
    """Stands for `torch.Tensor.__matmul__` and keeps the size of the largest result."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.elements, product = 0, Tensor.__matmul__

        def spy(left: Tensor, right: Tensor) -> Tensor:
            result = product(left, right)
            self.elements = max(self.elements, result.numel())
            return result

        monkeypatch.setattr(Tensor, "__matmul__", spy)


def test_nearest_cosines_of_hand_worked_directions():
    first = torch.tensor([[2.0, 0.0], [0.0, 0.5], [1.0, 1.0], [-3.0, 0.0]])
    second = torch.tensor([[3.0, 4.0], [10.0, 0.0]])
    found = nearest_cosines(first, second)
    assert found.cosine.tolist() == pytest.approx([1.0, 0.8, 1.4 / math.sqrt(2), -0.6])
    assert found.index.tolist() == [1, 0, 0, 0]
    within = nearest_cosines(first)
    assert within.cosine.tolist() == pytest.approx(
        [math.sqrt(0.5), math.sqrt(0.5), math.sqrt(0.5), 0.0], abs=sum_bound(3)
    )
    assert within.index[[0, 1, 3]].tolist() == [2, 2, 1]


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000, None])
def test_blocked_search_equals_the_whole_matrix(within: bool, chunk: int | None, monkeypatch: pytest.MonkeyPatch):
    first, second = dictionary(37), None if within else dictionary(23, seed=1)
    cosines = naive_cosines(first, first if second is None else second)
    if within:
        cosines.fill_diagonal_(-math.inf)
    largest = LargestProduct(monkeypatch)
    found = nearest_cosines(first, second, chunk=chunk)
    expected, index = cosines.max(1)
    torch.testing.assert_close(found.cosine, expected.float())
    assert torch.equal(found.index, index)
    assert 0 < largest.elements <= (chunk or geometry.BLOCK_ELEMENTS)


def test_the_default_block_is_cut_in_both_dimensions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(geometry, "BLOCK_ELEMENTS", 1_000)
    largest = LargestProduct(monkeypatch)
    first = dictionary(2_000, d=2)
    nearest_cosines(first)
    assert largest.elements <= 1_000
    monkeypatch.setattr(geometry, "DENSE_ELEMENTS", 1_000)
    match_features(first, dictionary(2_100, d=2, seed=1))
    assert largest.elements <= 1_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_fp32(dtype: torch.dtype):
    first = dictionary(9).to(dtype)
    found = nearest_cosines(first)
    cosines = naive_cosines(first, first).fill_diagonal_(-math.inf)
    assert found.cosine.dtype == torch.float32
    torch.testing.assert_close(found.cosine, cosines.max(1).values.float())


@settings(max_examples=40)
@given(
    n=st.integers(2, 12),
    seed=st.integers(0, 1000),
    scale=st.floats(-30, 30),
)
def test_neither_scale_nor_order_of_rows_matters(n: int, seed: int, scale: float):
    first, second = dictionary(n, seed=seed), dictionary(5, seed=seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    factors = 10.0 ** (scale * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)))
    plain = nearest_cosines(first, second)
    changed = nearest_cosines((first * factors)[order], second)
    torch.testing.assert_close(changed.cosine, plain.cosine[order])
    assert torch.equal(changed.index, plain.index[order])
    assert (plain.cosine.abs() <= 1).all()
    shuffled = nearest_cosines(first[order]).cosine
    torch.testing.assert_close(shuffled, nearest_cosines(first).cosine[order])
    matched = match_features((first * factors)[order], second)
    assert float(matched.cosine.sum()) == pytest.approx(float(match_features(first, second).cosine.sum()), abs=1e-4)


def test_zero_rows_have_cosine_zero_and_nothing_is_nan():
    first = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert nearest_cosines(first).cosine.tolist() == [0.0, 0.0, 0.0]
    assert nearest_cosines(first, torch.zeros(2, 2)).cosine.tolist() == [0.0, 0.0, 0.0]
    assert match_features(first, torch.zeros(2, 2)).cosine.tolist() == [0.0, 0.0]
    assert unit_rows(first).tolist() == first.tolist()


@pytest.mark.parametrize(("n", "m"), [(0, None), (1, None), (0, 4), (3, 0), (0, 0)])
def test_nothing_to_compare_is_empty_with_a_warning(n: int, m: int | None, caplog: pytest.LogCaptureFixture):
    first, second = dictionary(n), None if m is None else dictionary(m, seed=1)
    with caplog.at_level(logging.WARNING):
        found = compare_dictionaries(first, second)
    assert f"{n} alive features" in caplog.text
    assert found.n == 0
    assert (found.mean, found.median, found.share_near, sum(found.histogram)) == (None, None, None, 0)
    assert found.to_dict() == json.loads(json.dumps(found.to_dict()))
    nearest = nearest_cosines(first, second)
    assert nearest.cosine.shape == nearest.index.shape == (0,)
    assert second is None or match_features(first, second).cosine.shape == (0,)


def test_summary_of_hand_worked_directions():
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-1.0, 0.0]])
    second = torch.tensor([[3.0, 4.0], [5.0, 0.0]])
    found = compare_dictionaries(first, second)
    cosines = [1.0, 0.8, 1.4 / math.sqrt(2), -0.6]
    assert found.cosines.tolist() == pytest.approx(cosines)
    assert found.mean is not None
    assert found.mean.value == pytest.approx(sum(cosines) / 4)
    assert found.mean == mean_with_interval(found.cosines)
    assert found.median == pytest.approx((0.8 + 1.4 / math.sqrt(2)) / 2)
    assert found.share_near == 0.5
    assert found.histogram == tuple(np.histogram(found.cosines.double(), HISTOGRAM_EDGES)[0].tolist())
    assert sum(found.histogram) == 4
    assert len(found.histogram) == 50
    assert found.to_dict()["mean"] == found.mean.to_dict()
    assert "cosines" not in repr(found)


def test_within_and_across_are_different_questions():
    copies = torch.cat([dictionary(10, d=20), 3 * dictionary(10, d=20)])
    assert compare_dictionaries(copies).share_near == 1.0
    assert compare_dictionaries(copies, dictionary(10, d=20, seed=5)).share_near == 0.0


@pytest.mark.parametrize("prepare", [Tensor.clone, Tensor.double, torch.nn.Parameter])
def test_a_seed_is_not_compared_with_itself(prepare: Callable[[Tensor], Tensor]):
    with pytest.raises(ValueError, match="cross-seed comparison of one seed"):
        compare_dictionaries(dictionary(8), prepare(dictionary(8)))


@pytest.mark.parametrize("of", [nearest_cosines, compare_dictionaries, match_features])
def test_dictionaries_that_cannot_be_compared_are_refused(of: Callable[..., Any]):
    with pytest.raises(ValueError, match="6 and 5 dimensions"):
        of(dictionary(4), dictionary(4, d=5))
    broken = dictionary(4, seed=1)
    broken[2, 3] = float("nan")
    with pytest.raises(ValueError, match="1 of the dictionary's 4 rows have NaN"):
        of(dictionary(4), broken)


def test_a_block_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        nearest_cosines(dictionary(4), chunk=0)


def test_bootstrap_interval_equals_explicit_resampling(monkeypatch: pytest.MonkeyPatch):
    values = dictionary(50, d=1)[:, 0]
    found = mean_with_interval(values, n_resamples=200, confidence=0.8, seed=3)
    means = bootstrap_weights(50, 200, seed=3) @ values.double() / 50
    assert found is not None
    assert (found.low, found.high) == pytest.approx(interval(means, 0.8), rel=sum_bound(50))
    assert found.value == pytest.approx(float(values.mean()), rel=sum_bound(50))
    assert found.low < found.value < found.high
    for elements in (1, 777):  # memory is bounded without a change of the draws
        monkeypatch.setattr(estimate_module, "BOOTSTRAP_ELEMENTS", elements)
        assert mean_with_interval(values, n_resamples=200, confidence=0.8, seed=3) == found
    assert mean_with_interval(values, n_resamples=200, confidence=0.8, seed=4) != found


def test_bootstrap_interval_covers_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        found = mean_with_interval(dictionary(60, d=1, seed=seed)[:, 0], n_resamples=300, confidence=0.9)
        assert found is not None
        covered += found.low <= 0 <= found.high
    assert 165 <= covered <= 195  # 180 expected, standard deviation 4.2


def test_estimates_of_nothing_and_of_one_value():
    assert mean_with_interval(torch.zeros(0)) is None
    assert mean_with_interval(torch.tensor([0.25])) == Estimate(0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="1 of the 2 values"):
        mean_with_interval(torch.tensor([0.25, float("inf")]))
    with pytest.raises(ValueError, match="confidence"):
        mean_with_interval(torch.zeros(2), confidence=1.0)
    with pytest.raises(ValueError, match="n_resamples"):
        mean_with_interval(torch.zeros(2), n_resamples=0)


def test_estimates_are_stored_and_written():
    estimate = Estimate(0.12342, 0.12, 0.127)
    assert str(estimate) == "0.1234 [0.1200, 0.1270]"
    assert Estimate.from_dict(json.loads(json.dumps(estimate.to_dict()))) == estimate
    with pytest.raises(ValueError, match="value, low and high"):
        Estimate.from_dict({"value": 1.0, "low": 0.0})


def test_matching_takes_the_best_total_and_not_each_best():
    # By hand: both rows of `first` are nearest to row 0 of `second`; the total is largest with row 1 of `first` there.
    first, second = torch.tensor([[1.0, 0.2], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = match_features(first, second)
    assert (found.first_index.tolist(), found.second_index.tolist()) == ([0, 1], [1, 0])
    assert found.cosine.tolist() == pytest.approx([0.2 / math.sqrt(1.04), 1.0])


@pytest.mark.parametrize(("n", "m"), [(30, 30), (20, 45), (45, 20)])
def test_matching_finds_hidden_pairs_exactly_and_in_rounds(n: int, m: int, monkeypatch: pytest.MonkeyPatch):
    first, second = dictionary(n, d=16), dictionary(m, d=16, seed=1)
    shared = min(n, m) // 2
    places = torch.randperm(m, generator=torch.Generator().manual_seed(2))[:shared]
    second[places] = 7 * first[:shared]
    exact = match_features(first, second)
    rows, columns = linear_sum_assignment(naive_cosines(first, second).numpy(), maximize=True)
    assert exact.first_index.tolist() == rows.tolist()
    assert exact.second_index.tolist() == columns.tolist()
    monkeypatch.setattr(geometry, "DENSE_ELEMENTS", 10)
    monkeypatch.setattr(geometry, "N_CANDIDATES", 4)
    in_rounds = match_features(first, second)
    for found in (exact, in_rounds):
        assert torch.equal(found.second_index[found.first_index < shared], places)
        assert len(found.cosine) == len(set(found.second_index.tolist())) == min(n, m)
        expected = naive_cosines(first, second)[found.first_index, found.second_index].float()
        torch.testing.assert_close(found.cosine, expected)
    assert 0.97 * float(exact.cosine.sum()) <= float(in_rounds.cosine.sum()) <= float(exact.cosine.sum()) + 1e-5


def test_matching_with_every_candidate_is_exact_and_in_one_round(monkeypatch: pytest.MonkeyPatch):
    first, second = dictionary(12, d=3), dictionary(12, d=3, seed=1)
    exact = match_features(first, second)
    monkeypatch.setattr(geometry, "DENSE_ELEMENTS", 10)
    monkeypatch.setattr(geometry, "MAX_ROUNDS", 1)
    found = match_features(first, second)
    assert float(found.cosine.sum()) == pytest.approx(float(exact.cosine.sum()), abs=1e-4)


def test_features_that_all_want_the_same_partners_are_left_out_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(geometry, "DENSE_ELEMENTS", 10)
    monkeypatch.setattr(geometry, "N_CANDIDATES", 1)
    monkeypatch.setattr(geometry, "MAX_ROUNDS", 3)
    with caplog.at_level(logging.WARNING):
        found = match_features(torch.ones(8, 3), dictionary(9, d=3))
    assert len(found.cosine) == 3
    assert "5 of 8 features are left without a partner" in caplog.text


def dip_by_definition(values: np.ndarray) -> float:
    """The smallest distance of a unimodal distribution function, by one linear programme for each place of the mode.

    The unknowns are the function at each value, twice at the mode (it may jump there), and the distance.
    """
    x, counts = np.unique(values, return_counts=True)
    after = np.cumsum(counts) / len(values)
    before = np.concatenate([[0.0], after[:-1]])
    n, best = len(x), 1.0
    for mode in range(n):
        left, right = list(range(mode + 1)), [n, *range(mode + 1, n)]
        limits: list[tuple[dict[int, Any], Any]] = [({mode: 1, n: -1}, 0.0)]
        for i in range(n):
            low, high = (i, i) if i != mode else (mode, n)
            limits += [({low: 1, n + 1: -1}, before[i]), ({high: -1, n + 1: -1}, -after[i])]
        limits += [({mode: -1, n + 1: -1}, -before[mode]), ({n: 1, n + 1: -1}, after[mode])]
        for unknowns, at, sign in ((left, x[: mode + 1], 1), (right, x[mode:], -1)):
            limits += [({a: 1, b: -1}, 0.0) for a, b in itertools.pairwise(unknowns)]
            for k in range(len(unknowns) - 2):
                one, two = sign / (at[k + 1] - at[k]), sign / (at[k + 2] - at[k + 1])
                limits.append(({unknowns[k]: -one, unknowns[k + 1]: one + two, unknowns[k + 2]: -two}, 0.0))
        matrix = np.zeros((len(limits), n + 2))
        for row, (entries, _) in enumerate(limits):
            for column, entry in entries.items():
                matrix[row, column] = entry
        cost = np.eye(n + 2)[-1]
        solved = linprog(cost, A_ub=matrix, b_ub=[limit for _, limit in limits], bounds=(0, 1))
        best = min(best, solved.fun)
    return max(best, 1 / (2 * len(values)))


DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uniform": lambda rng, n: rng.random(n),
    "normal": lambda rng, n: rng.normal(size=n),
    "ties": lambda rng, n: rng.integers(0, 5, n).astype(float),
    "ties at uneven distances": lambda rng, n: rng.integers(0, 9, n) ** 2.0,
    "two heaps": lambda rng, n: rng.normal(size=n) + 5 * (rng.random(n) < 0.4),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_dip_equals_its_definition(draw: str):
    rng = np.random.default_rng(0)
    for n in [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 24]:
        values = DRAWS[draw](rng, n)
        assert dip_statistic(torch.from_numpy(values)) == pytest.approx(dip_by_definition(values), abs=1e-7), values


@pytest.mark.parametrize(
    ("values", "dip"),
    [
        ([0.3], 1 / 2),
        ([0.3, 0.3, 0.3], 1 / 6),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1 / 10),  # even spacing: half a step, the least there is
        ([0.0, 0.0, 1.0, 1.0], 1 / 4),  # two equal atoms: the most there is
        ([0.0, 0.0, 0.0, 1.0], 1 / 8),  # an atom for a mode: half of the other jump
        ([0.0, 0.0, 0.0, 0.5, 1.0, 1.0], 1 / 6),  # the mode at 0: half of the two values at 1
    ],
)
def test_dip_of_hand_worked_values(values: list[float], dip: float):
    assert dip_statistic(torch.tensor(values)) == pytest.approx(dip)
    assert dip_statistic(-3 * torch.tensor(values) + 7) == pytest.approx(dip, abs=1e-6)


def test_dip_keeps_within_its_bounds_and_needs_values():
    for seed in range(20):
        values = torch.rand(30, generator=torch.Generator().manual_seed(seed))
        assert 1 / 60 <= dip_statistic(values) <= 1 / 4
    with pytest.raises(ValueError, match="no values"):
        dip_statistic(torch.zeros(0))
    with pytest.raises(ValueError, match="1 of the 2 values"):
        dip_statistic(torch.tensor([0.0, float("nan")]))


def test_uniform_values_are_called_bimodal_one_time_in_twenty():
    found = [bimodality(torch.rand(80, generator=torch.Generator().manual_seed(seed))) for seed in range(300)]
    assert 4 <= sum(one.is_bimodal for one in found if one is not None) <= 26  # 15 expected, standard deviation 3.8
    normal = [bimodality(dictionary(80, d=1, seed=seed)[:, 0]) for seed in range(60)]
    assert sum(one.is_bimodal for one in normal if one is not None) <= 3  # one clear mode


def mixture(n: int, share: float = 0.3) -> Tensor:
    heaps = torch.where(torch.arange(n) < share * n, 0.9, 0.35)
    return heaps + 0.05 * dictionary(n, d=1)[:, 0]


def test_two_heaps_are_found_where_they_are():
    found = bimodality(mixture(1_000))
    assert found is not None
    assert found.is_bimodal
    assert found.p_value == pytest.approx(1 / 501)
    assert found.modes == pytest.approx((0.35, 0.9), abs=0.01)
    assert found.weights == pytest.approx((0.7, 0.3), abs=0.01)
    assert found.n == 1_000
    assert found == bimodality(mixture(1_000))


def test_large_samples_are_thinned_out():
    found = bimodality(mixture(3 * MAX_TESTED, share=0.5), n_resamples=20)
    assert found is not None
    assert found.n == MAX_TESTED
    assert found.modes == pytest.approx((0.35, 0.9), abs=0.01)
    assert found.p_value == pytest.approx(1 / 21)


def test_bimodality_of_few_or_equal_values():
    assert bimodality(torch.zeros(0)) is None
    for values in ([0.5], [0.1, 0.9], [0.5] * 40):
        found = bimodality(torch.tensor(values))
        assert found is not None
        assert found.p_value == 1
        assert found.modes == pytest.approx((min(values), max(values)))
        assert sum(found.weights) == pytest.approx(1)
    with pytest.raises(ValueError, match="n_resamples"):
        bimodality(torch.zeros(3), n_resamples=0)


def test_umap_gets_all_directions_together_at_unit_norm(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    class FirstTwo:
        """Maps each direction to its first two coordinates."""

        def __init__(self, **settings: Any) -> None:
            asked.update(settings)

        def fit_transform(self, rows: np.ndarray) -> np.ndarray:
            asked["norms"] = np.linalg.norm(rows, axis=1)
            return rows[:, :2].astype(np.float64)

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=FirstTwo))
    given = {"one": 3 * dictionary(7), "none": torch.zeros(0, 6), "other": dictionary(9, seed=1).double()}
    found = umap_coordinates(given, seed=4, n_neighbors=5)
    assert list(found) == list(given)
    for name, rows in given.items():
        torch.testing.assert_close(found[name], F.normalize(rows.float(), dim=1)[:, :2])
    assert asked.pop("norms") == pytest.approx(np.ones(16))
    assert asked == {
        "n_components": 2, "metric": "cosine", "n_neighbors": 5, "min_dist": 0.1, "random_state": 4, "n_jobs": 1,
    }  # fmt: skip


@pytest.mark.slow  # UMAP compiles itself first
def test_umap_keeps_heaps_of_directions_apart():
    pytest.importorskip("umap")
    heaps = [10 * torch.eye(3)[i] + dictionary(40, d=3, seed=i) for i in (0, 1)]
    given = {"one": heaps[0], "other": 5 * heaps[1], "none": torch.zeros(0, 3)}
    found = umap_coordinates(given, n_neighbors=8)
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "one": (40, 2),
        "other": (40, 2),
        "none": (0, 2),
    }
    centres = found["one"].mean(0), found["other"].mean(0)
    spread = max(float((found[name] - centre).norm(dim=1).max()) for name, centre in zip(found, centres, strict=False))
    assert float((centres[0] - centres[1]).norm()) > spread
    again = umap_coordinates({**given, "one": 2 * heaps[0]}, n_neighbors=8)
    assert all(torch.equal(found[name], again[name]) for name in given)


def test_umap_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "umap":
            raise ImportError("No module named 'umap'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "umap", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'e2e-sae-plugin\[umap\]'"):
        umap_coordinates({"one": dictionary(20)})


@pytest.mark.parametrize(
    ("dictionaries", "message"),
    [
        ({"one": dictionary(5), "other": dictionary(10)}, "15 directions in all"),
        ({}, "0 directions in all"),
        ({"one": dictionary(20), "other": dictionary(20, d=5)}, "differ in d_in"),
        ({"one": dictionary(20)[0]}, r"shape \(6,\)"),
        ({"one": dictionary(20) / 0}, "NaN or infinite"),
    ],
)
def test_umap_refuses_what_it_cannot_map(dictionaries: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        umap_coordinates(dictionaries)
