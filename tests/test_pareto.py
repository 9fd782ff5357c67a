"""Pareto fronts and ratios along curves, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from e2e_sae_plugin.evaluation.pareto import Curve, dominated, ratio_at_equal

X = (4.0, 8.0, 16.0, 32.0, 64.0)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def power_law(factor: float, exponent: float = -1.0, x: tuple[float, ...] = X, noise: Tensor | None = None) -> Curve:
    """`y = factor * x ** exponent`; with `noise [n_resamples]`, resamples whose y are off by that in logarithm."""
    xs = column(*x)
    ys = factor * xs**exponent
    if noise is None:
        return Curve(xs, ys)
    return Curve(xs.expand(-1, 1 + len(noise)), torch.cat([ys, ys * noise.double().exp()], 1))


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(1, 1)], [False]),
        ([(1, 3), (2, 2), (3, 1)], [False, False, False]),
        ([(1, 1), (2, 2)], [False, True]),
        ([(1, 1), (1, 2)], [False, True]),  # as sparse, and worse
        ([(1, 1), (2, 1)], [False, True]),
        ([(1, 1), (1, 1)], [False, False]),  # neither beats its equal
        ([(1, 3), (2, 4), (3, -1), (3, 0)], [False, True, False, True]),
    ],
)
def test_dominated(points: list[tuple[float, float]], expected: list[bool]):
    assert dominated(points) == expected


def test_a_curve_is_linear_between_its_points_in_both_logarithms():
    curve = Curve(column(1, 100, 10_000), column(1, 10, 10_000))
    at = curve.at(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10_000.0, 0.5, 20_000.0], dtype=torch.float64).log())
    assert at.shape == (7, 1)
    expected = [1, math.sqrt(10), 10, math.sqrt(10 * 10_000), 10_000]
    assert at[:5, 0].exp().tolist() == pytest.approx(expected)
    assert at[5:].isnan().all()
    assert curve.range == pytest.approx((0, math.log(10_000)))


def test_the_order_of_the_points_does_not_matter_and_resamples_are_sorted_by_themselves():
    # The resample's points come in the other order: in it, the first SAE has the larger x.
    x = torch.tensor([[4.0, 1.0], [1.0, 4.0]], dtype=torch.float64)
    y = torch.tensor([[2.0, 8.0], [8.0, 2.0]], dtype=torch.float64)
    at = Curve(x, y).at(torch.tensor([2.0], dtype=torch.float64).log())
    assert at.exp().tolist()[0] == pytest.approx([4.0, 4.0])


def test_the_ends_of_a_curve_are_on_it():
    for n in (1, 3, 1001):  # however torch takes the logarithm
        curve = Curve(torch.rand(7, n, dtype=torch.float64) + 0.1, torch.rand(7, n, dtype=torch.float64) + 0.1)
        assert curve.at(torch.tensor(curve.range, dtype=torch.float64))[:, 0].isfinite().all()


def test_the_ratio_of_two_power_laws_is_their_factor():
    found = ratio_at_equal([power_law(0.4)], [power_law(1.0)])
    assert found is not None
    assert found.estimate.value == pytest.approx(0.4)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((0.4, 0.4))
    assert found.by_seed == pytest.approx((0.4,))
    assert found.x_range == pytest.approx((4, 64))


def test_noise_that_both_share_cancels_and_other_noise_widens_the_interval():
    noise = 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    paired = ratio_at_equal([power_law(0.4, noise=noise)], [power_law(1.0, noise=noise)])
    alone = ratio_at_equal([power_law(0.4, noise=noise)], [power_law(1.0, noise=torch.zeros(400))])
    assert paired is not None
    assert alone is not None
    assert (paired.estimate.low, paired.estimate.high) == pytest.approx((0.4, 0.4))
    ends = (0.4 * noise.double().exp()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert [alone.estimate.low, alone.estimate.high] == pytest.approx(ends)
    assert alone.estimate.value == pytest.approx(0.4)


def test_only_the_common_range_counts():
    # Beyond x = 8 the first is twice as good; the second is not there.
    first = Curve(column(1, 8, 64), column(8, 1, 1e-3))
    found = ratio_at_equal([first], [power_law(1.0, x=(2.0, 4.0, 8.0))])
    assert found is not None
    assert found.estimate.value == pytest.approx(8.0)
    assert found.x_range == pytest.approx((2, 8))


def test_a_ratio_that_is_not_constant_is_averaged_in_logarithms():
    # From 1 to 1/16 over the range, evenly in log x.
    found = ratio_at_equal([power_law(4.0, -2.0)], [power_law(1.0, -1.0)])
    assert found is not None
    assert found.estimate.value == pytest.approx(1 / 4)


def test_seeds_are_paired_and_averaged():
    found = ratio_at_equal([power_law(0.4), power_law(0.1)], [power_law(1.0), power_law(1.0)])
    assert found is not None
    assert found.by_seed == pytest.approx((0.4, 0.1))
    assert found.estimate.value == pytest.approx(0.2)
    fewer = ratio_at_equal([power_law(0.4), power_law(0.1)], [power_law(2.0)])
    assert fewer is not None
    assert fewer.by_seed == pytest.approx((0.2, 0.05))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([], [power_law(1.0)]),
        ([power_law(1.0)], []),
        ([power_law(1.0, x=(4.0,))], [power_law(1.0)]),
        ([power_law(1.0, x=(1.0, 2.0))], [power_law(1.0)]),  # no overlap
        ([power_law(1.0, x=(1.0, 4.0))], [power_law(1.0)]),  # a single common x
        ([power_law(1.0, x=(9.0, 9.0))], [power_law(1.0)]),
        ([power_law(1.0), power_law(1.0, x=(100.0, 200.0))], [power_law(1.0)]),  # one seed out of reach
    ],
)
def test_what_cannot_be_told_is_none(first: list[Curve], second: list[Curve]):
    assert ratio_at_equal(first, second) is None


def test_curves_that_go_back_and_forth_have_a_ratio():
    xs = column(4, 8, 8, 16, 64)
    zigzag = Curve(xs, column(0.3, 0.1, 0.2, 0.15, 0.01))
    twice = Curve(xs, 2 * zigzag.y)
    found = ratio_at_equal([zigzag], [twice])
    assert found is not None
    assert found.estimate.value == pytest.approx(0.5)


def test_points_without_a_logarithm_are_left_out():
    first = Curve(column(0, *X, 128), column(3, *(0.4 / x for x in X), -0.001))  # a dead SAE, a perfect one
    found = ratio_at_equal([first], [power_law(1.0)])
    assert found is not None
    assert found.estimate.value == pytest.approx(0.4)
    assert found.x_range == pytest.approx((4, 64))
    assert ratio_at_equal([Curve(column(4, 8), column(0.1, 0.0))], [power_law(1.0)]) is None


def test_resamples_below_zero_widen_the_interval_and_nothing_is_nan():
    noise = torch.zeros(100)
    curve = power_law(0.4, noise=noise)
    curve.y[:, 1:11] = -0.01  # a tenth of the resamples: no increase at all
    found = ratio_at_equal([curve], [power_law(1.0, noise=noise)])
    assert found is not None
    assert found.estimate.value == pytest.approx(0.4)
    assert 0 <= found.estimate.low < 1e-6
    assert found.estimate.high == pytest.approx(0.4)


def test_resamples_that_do_not_reach_the_range_are_left_out():
    noise = torch.zeros(10)
    curve = power_law(0.4, noise=noise)
    x = curve.x.clone()  # expanded: give it memory of its own
    x[:, 1:3] += 1000
    found = ratio_at_equal([Curve(x, curve.y)], [power_law(1.0, noise=noise)])
    assert found is not None
    assert (found.estimate.low, found.estimate.value, found.estimate.high) == pytest.approx((0.4, 0.4, 0.4))
