"""A run stops when its held-out KL has stopped falling, and not because it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runner_config, tiny_hooked_transformer, token_dataset, training_sae
from sae_lens import LoggingConfig

from e2e_sae_plugin import E2ESAETrainingRunner, Objective
from e2e_sae_plugin.early_stop import EarlyStop

EVERY_STEP = LoggingConfig(log_to_wandb=False, wandb_log_frequency=1, eval_every_n_wandb_logs=1)


STEPS = 30


def run(folder: Path, name: str, **settings: Any) -> Any:
    """A learning rate at which the KL soon rises."""
    defaults: dict[str, Any] = {"n_eval_batches": 1, "training_tokens": 32 * STEPS, "lr": 0.3, "logger": EVERY_STEP}
    config = runner_config(**{**defaults, **settings}, output_path=str(folder / name))
    given: dict[str, Any] = {"override_dataset": token_dataset(), "override_model": tiny_hooked_transformer()}
    runner = E2ESAETrainingRunner(config, **given, override_sae=training_sae(config))
    runner.run()
    return runner


def runner_trainer(runner: Any) -> Any:
    """What `_evaluate` needs of a trainer."""
    return runner._build_trainer()


def held_out_kls(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics/held_out_kl"] for line in lines if "metrics/held_out_kl" in line]


def test_evaluations_without_gain_are_counted_in_a_row():
    stop, sae = EarlyStop(2), training_sae(runner_config())
    seen = []
    for kl in (3.0, 2.0, 2.5, 1.9, float("nan"), 1.9):
        with torch.no_grad():
            sae.b_dec.fill_(kl)
        stop.see(kl, sae)
        seen.append((stop.n_without_gain, stop.reached))
    assert seen == [(0, False), (0, False), (1, False), (0, False), (1, False), (2, True)]
    again = EarlyStop(2)
    again.load(stop.state(), stop.best_weights)
    assert (again.reached, again.lowest) == (True, 1.9)
    with torch.no_grad():
        sae.b_dec.fill_(7)
    assert again.restore_best(sae)
    assert sae.b_dec.tolist() == pytest.approx([1.9] * 16)
    assert not again.restore_best(sae)
    never = EarlyStop(None)
    never.see(1.0, sae)
    assert (never.reached, never.best_weights) == (False, {})


def test_a_run_stops_where_the_kl_has_stopped_falling(tmp_path: Path):
    run(tmp_path, "free")
    free = held_out_kls(tmp_path / "free")
    runner = run(tmp_path, "patient", patience_evaluations=3)
    start, *patient = held_out_kls(tmp_path / "patient")  # the start's is the first
    best = min(patient)
    assert best < start
    n_steps = patient.index(best) + 1 + 3
    assert n_steps < STEPS
    assert patient[:n_steps] == free[:n_steps]
    assert patient[n_steps:] == [best]  # at the end comes one of the best weights, which are what is saved
    assert runner._evaluate(runner_trainer(runner))["metrics/held_out_kl"] == pytest.approx(best, rel=1e-5)


def test_a_run_that_only_harms_ends_with_the_weights_that_it_began_with(tmp_path: Path):
    before = training_sae(runner_config()).state_dict()
    runner = run(tmp_path, "harmed", patience_evaluations=3, lr=30.0)
    assert min(held_out_kls(tmp_path / "harmed")) == held_out_kls(tmp_path / "harmed")[0]
    assert all(torch.equal(before[name], value) for name, value in runner.sae.state_dict().items())


def test_what_the_local_part_of_a_run_evaluates_does_not_count(tmp_path: Path):
    settings = {"patience_evaluations": 3, "local_first": 0.5, "objective": Objective.finetune()}
    run(tmp_path, "mixed", architecture="topk", **settings)
    assert len(held_out_kls(tmp_path / "mixed")) > 15


def test_the_count_goes_on_after_a_resume(tmp_path: Path):
    settings: dict[str, Any] = {
        "patience_evaluations": 3, "checkpoint_path": str(tmp_path / "c"), "checkpoint_every_minutes": 1e-9,
        "keep_checkpoints": 1000,
    }  # fmt: skip
    run(tmp_path, "whole", **settings)
    whole = held_out_kls(tmp_path / "whole")
    folders = sorted(
        (path for path in (tmp_path / "c").rglob("[0-9]*") if (path / "cfg.json").exists()), key=lambda p: int(p.name)
    )
    for folder in (folders[-3], folders[-1]):
        run(tmp_path, folder.name, resume_from_checkpoint=str(folder), **settings)
        assert held_out_kls(tmp_path / folder.name) == whole
        weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("whole", folder.name)]
        assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience_evaluations": 3}, "has 0 evaluations"),
        ({"patience_evaluations": 2, "n_eval_batches": 1}, "run of 10 steps has 2 evaluations"),
        ({"patience_evaluations": 0, "n_eval_batches": 1}, "patience_evaluations must be at least 1, got 0"),
    ],
)
def test_a_patience_without_effect_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        runner_config(**settings)


def test_topk_with_layer_norm_trains_without_its_auxiliary_loss():
    objective = Objective.finetune(auxiliary=0.0)
    config = runner_config(
        "topk", sae={"normalize_activations": "layer_norm"}, objective=objective, dead_feature_window=1,
        local_first=0.0,
    )  # fmt: skip
    runner = E2ESAETrainingRunner(config, override_dataset=token_dataset(), override_model=tiny_hooked_transformer())
    assert torch.isfinite(runner.run().W_dec).all()
    with pytest.raises(ValueError, match="layer_norm"):
        runner_config("topk", sae={"normalize_activations": "layer_norm"}, objective=Objective.finetune())
