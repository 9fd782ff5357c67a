"""Free memory of the C library is given back before large tensors, and nothing breaks where it cannot be."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from helpers import build_trainer, runner_config, token_batch

from e2e_sae_plugin import Objective
from e2e_sae_plugin.kernels import heap


class Trims:
    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, pad: int) -> int:
        self.calls.append(pad)
        return 1


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> Trims:
    counted = Trims()
    monkeypatch.setattr(heap, "_malloc_trim", lambda: counted)
    return counted


def test_only_large_tensors_are_worth_it(trims: Trims):
    heap.give_back(heap.WORTH_BYTES - 1)
    assert trims.calls == []
    heap.give_back(heap.WORTH_BYTES)
    assert trims.calls == [0]


@pytest.mark.parametrize(("objective", "n_calls"), [(Objective.e2e(), 1), (Objective.local(), 0)])
def test_a_step_gives_back_what_the_models_passes_left(
    objective: Objective, n_calls: int, trims: Trims, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(heap, "WORTH_BYTES", 4 * 2 * 16 * 32)  # the size of the SAE's weights, less its biases
    build_trainer(runner_config(objective=objective)).step(token_batch())
    assert len(trims.calls) == n_calls


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_another_c_library_is_left_alone(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def no_library(_: Any) -> Any:
        raise error

    heap._malloc_trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    heap.give_back(heap.WORTH_BYTES)
    assert heap._malloc_trim() is None
    heap._malloc_trim.cache_clear()
