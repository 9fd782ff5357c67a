"""What float32 rounding allows: how far numbers may be apart that two programs, or two CPUs, sum up in different orders.

Tolerances are made of these where they would otherwise say what one CPU gave. They are for one sum after another: pass the
number of terms of all of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def sum_bound(n_terms: int, magnitude: float = 1.0) -> float:
    """How far apart two float32 sums of the same terms may be.

    A sum is off by at most n u M to first order, u = EPS / 2, and with a probability of 1 - 2 n exp(-t^2 / 2) by at most
    t sqrt(n) u M (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019). The bound is twice the
    smaller of the two, with t = 8.

    Args:
        n_terms: n.
        magnitude: M, the sum of the terms' absolute values; 1 gives a bound relative to it.
    """
    return min(n_terms, 8 * math.sqrt(n_terms)) * EPS * magnitude


def product_bound(left: Tensor, right: Tensor) -> float:
    """`sum_bound` of every element of `left @ right`."""
    return sum_bound(left.shape[-1], float((left.detach().abs() @ right.detach().abs()).max()))


def quotient_bound(numerator: float, denominator: float, error: float) -> float:
    """How far apart quotients may be whose two sides are off by up to `error` each, such as shares of a small difference."""
    return error * (1 + abs(numerator / denominator)) / (abs(denominator) - error)


def assert_equal_sums(ours: Tensor, theirs: Tensor, n_terms: int, what: str = "") -> None:
    """Fail where two tensors are further apart than sums of `n_terms` terms in another order.

    The scale is the largest element: a small one may be a sum of large terms that cancel each other.
    """
    error = sum_bound(n_terms, float(theirs.detach().abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=error, msg=lambda text: f"{what}: {text}")
