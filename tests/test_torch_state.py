"""Runs and evaluations do not depend on what a notebook has set globally, and a run that trains nothing stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_trainer, parameters_of, runner_config, tiny_hooked_transformer, token_batch, token_dataset

from e2e_sae_plugin import E2ESAETrainingRunner, Objective, evaluate
from e2e_sae_plugin.evaluation import feature_importance
from e2e_sae_plugin.torch_state import own_torch_state


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


NOTEBOOKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients off": lambda: torch.set_grad_enabled(False),
    "inference mode": torch.inference_mode,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


DATASET = token_dataset()


def run(folder: Path, model: Any, **settings: Any) -> Any:
    config = runner_config("topk", training_tokens=32 * 4, n_eval_batches=1, output_path=str(folder), **settings)
    return E2ESAETrainingRunner(config, override_model=model, override_dataset=DATASET).run()


@pytest.mark.parametrize("objective", [Objective.local(), Objective.e2e_downstream(0.01)], ids=lambda o: o.kind)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_run_is_the_same_whatever_is_set_globally(name: str, objective: Objective, tmp_path: Path):
    model, tokens = tiny_hooked_transformer(), token_batch()
    expected = run(tmp_path / "plain", model, objective=objective)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    with NOTEBOOKS[name]():
        found = run(tmp_path / "notebook", model, objective=objective)
        measured = evaluate(found, model, tokens, n_resamples=5)
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (dtype, grad)
    for parameter, value in parameters_of(expected).items():
        assert parameters_of(found)[parameter].equal(value), parameter
    assert measured.value("kl") == evaluate(expected, model, tokens, n_resamples=5).value("kl")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_step_and_importance_too(name: str):
    config, batch = runner_config("standard"), token_batch()
    expected = build_trainer(config)
    loss = expected.step(batch).loss
    importance = feature_importance(expected.sae, expected.spliced_model, batch, n_samples=1)
    trainer = build_trainer(config)
    with NOTEBOOKS[name]():
        assert trainer.step(batch).loss.equal(loss)
        found = feature_importance(trainer.sae, trainer.spliced_model, batch, n_samples=1)
    assert found.kl.equal(importance.kl)
    for parameter, value in parameters_of(expected.sae).items():
        assert parameters_of(trainer.sae)[parameter].equal(value), parameter


def test_what_was_set_is_set_again_after_an_error():
    with torch.no_grad(), default_dtype(torch.float64):
        seen: list[Any] = []

        @own_torch_state()
        def failing() -> None:
            seen.extend([torch.is_grad_enabled(), torch.get_default_dtype()])
            raise KeyError

        with pytest.raises(KeyError):
            failing()
        assert seen == [True, torch.float32]
        assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64


@pytest.mark.parametrize("objective", [Objective.local(), Objective.e2e()], ids=lambda o: o.kind)
def test_a_run_whose_first_steps_change_nothing_stops(
    objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_, **__: None)
    config = runner_config("topk", objective=objective, output_path=str(tmp_path / "out"))
    runner = E2ESAETrainingRunner(config, override_model=tiny_hooked_transformer(), override_dataset=token_dataset())
    with pytest.raises(ValueError, match=r"The first 10 steps have changed none .*W_dec"):
        runner.run()
    assert not (tmp_path / "out" / "cfg.json").exists()


def test_a_shorter_run_that_changes_nothing_stops_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_, **__: None)
    runner = E2ESAETrainingRunner(
        runner_config("topk", training_tokens=96),
        override_model=tiny_hooked_transformer(),
        override_dataset=token_dataset(),
    )
    with pytest.raises(ValueError, match="The first 3 steps have changed none"):
        runner.run()
