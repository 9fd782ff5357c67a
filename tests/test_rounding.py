"""The bounds of `rounding` hold for sums in any order, and are not so wide that anything passes."""

from __future__ import annotations

import pytest
import torch
from rounding import product_bound, quotient_bound, sum_bound


@pytest.mark.parametrize("n_terms", [2, 16, 300, 10_000])
def test_sums_in_other_orders_are_within_the_bound_and_not_far_below_it(n_terms: int):
    terms = torch.randn(n_terms, generator=torch.Generator().manual_seed(0))
    exact = float(terms.double().sum())
    one_by_one = [terms[torch.randperm(n_terms)].cumsum(0)[-1] for _ in range(20)]
    worst = max(abs(float(each) - exact) for each in (*one_by_one, terms.sum(), terms.flip(0).sum()))
    bound = sum_bound(n_terms, float(terms.abs().sum()))
    assert worst <= bound < 1e-3 * float(terms.abs().sum())


def test_products_and_quotients():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(5, 64, generator=generator), torch.randn(64, 7, generator=generator)
    error = float(((left @ right).double() - left.double() @ right.double()).abs().max())
    assert 0 < error <= product_bound(left, right) < 1e-3
    exact, error = 0.3 / 0.05, 1e-4
    worst = max(abs((0.3 + a) / (0.05 + b) - exact) for a in (-error, error) for b in (-error, error))
    assert worst == pytest.approx(quotient_bound(0.3, 0.05, error))
