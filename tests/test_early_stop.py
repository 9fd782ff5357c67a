"""A run stops when its held-out KL has stopped falling, and not because it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runner_config, tiny_hooked_transformer, token_dataset
from sae_lens import LoggingConfig

from e2e_sae_plugin import E2ESAETrainingRunner, Objective
from e2e_sae_plugin.early_stop import EarlyStop

EVERY_STEP = LoggingConfig(log_to_wandb=False, wandb_log_frequency=1, eval_every_n_wandb_logs=1)


def run(folder: Path, name: str, **settings: Any) -> Any:
    """A learning rate at which the KL soon rises."""
    defaults: dict[str, Any] = {"n_eval_batches": 1, "training_tokens": 32 * 30, "lr": 0.3, "logger": EVERY_STEP}
    config = runner_config(**{**defaults, **settings}, output_path=str(folder / name))
    runner = E2ESAETrainingRunner(config, override_dataset=token_dataset(), override_model=tiny_hooked_transformer())
    runner.run()
    return runner


def held_out_kls(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics/held_out_kl"] for line in lines if "metrics/held_out_kl" in line]


def test_evaluations_without_gain_are_counted_in_a_row():
    stop = EarlyStop(2)
    seen = []
    for kl in (3.0, 2.0, 2.5, 1.9, float("nan"), 1.9):
        stop.see(kl)
        seen.append((stop.n_without_gain, stop.reached))
    assert seen == [(0, False), (0, False), (1, False), (0, False), (1, False), (2, True)]
    assert not EarlyStop(None).reached
    again = EarlyStop(2)
    again.load(stop.state())
    assert (again.reached, again.lowest) == (True, 1.9)


def test_a_run_stops_where_the_kl_has_stopped_falling(tmp_path: Path):
    run(tmp_path, "free")
    free = held_out_kls(tmp_path / "free")
    stops = EarlyStop(3)
    n_steps = next(i + 1 for i, kl in enumerate(free) if stops.see(kl) or stops.reached)
    assert n_steps < 20
    run(tmp_path, "patient", patience_evaluations=3)
    assert held_out_kls(tmp_path / "patient")[:n_steps] == free[:n_steps]
    assert len(held_out_kls(tmp_path / "patient")) == n_steps + 1  # and the one at the end


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
        "topk", sae={"normalize_activations": "layer_norm"}, objective=objective, dead_feature_window=1
    )
    runner = E2ESAETrainingRunner(config, override_dataset=token_dataset(), override_model=tiny_hooked_transformer())
    assert torch.isfinite(runner.run().W_dec).all()
    with pytest.raises(ValueError, match="layer_norm"):
        runner_config("topk", sae={"normalize_activations": "layer_norm"}, objective=Objective.finetune())
