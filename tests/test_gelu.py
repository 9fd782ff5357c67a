"""GELU by a sigmoid: torch's own formula, its slope, and whose memory it writes to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rounding import sum_bound

from e2e_sae_plugin.kernels import gelu
from e2e_sae_plugin.kernels.gelu import gelu_tanh


def values(*shape: int) -> torch.Tensor:
    x = 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, -0.0, 30.0, -30.0, 1e4, -1e4])
    x.view(-1)[: len(special)] = special[: x.numel()]
    return x


@pytest.mark.parametrize("tile", [1, 7, 64, 2**18])
def test_values_and_slopes_are_those_of_the_formula(tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gelu, "TILE_ELEMENTS", tile)
    x, seed = values(3, 5, 7), values(3, 5, 7)
    exact = x.double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(expected, exact, seed.double())
    leaf = x.clone().requires_grad_()
    got = gelu_tanh(leaf)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaf, seed)[0].double(), slope, rtol=1e-5, atol=sum_bound(20, 16.0)
    )  # of some 20 operations, on values of 4 standard deviations
    assert torch.equal(leaf, x)
    assert torch.equal(gelu_tanh(x), got)


def test_the_input_is_overwritten_only_where_it_may_be_and_no_gradient_is_asked_for():
    x = values(4, 8)
    kept = x.clone()
    expected = gelu_tanh(x)
    assert torch.equal(x, kept)
    leaf = x.clone().requires_grad_()
    gelu_tanh(leaf, may_overwrite=True)
    assert torch.equal(leaf, kept)
    with torch.no_grad():
        got = gelu_tanh(leaf, may_overwrite=True)
    assert got.data_ptr() == leaf.data_ptr()
    assert torch.equal(leaf, expected)
    assert gelu_tanh(x, may_overwrite=True).data_ptr() == x.data_ptr()
    assert torch.equal(x, expected)


@pytest.mark.parametrize("x", [values(4, 8).bfloat16(), values(4, 8).double(), values(4, 8).T, values(0)[:0]], ids=str)
def test_what_the_kernel_does_not_know_is_left_to_torch(x: torch.Tensor):
    torch.testing.assert_close(gelu_tanh(x.clone(), may_overwrite=True), F.gelu(x, approximate="tanh"))


def test_backward_twice_is_refused_rather_than_wrong():
    x = values(4, 8).requires_grad_()
    (first,) = torch.autograd.grad(gelu_tanh(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()
