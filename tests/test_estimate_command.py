"""`e2e-sae estimate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import runner_config, tiny_hooked_transformer, training_sae

from e2e_sae_plugin import E2ESAERunnerConfig, Objective
from e2e_sae_plugin.cli import main
from e2e_sae_plugin.cost import estimate, measure
from e2e_sae_plugin.cost.estimate import estimate_run
from e2e_sae_plugin.cost.measure import Measurement, RunParts, StepTimes, matmul_speed, measure_steps
from e2e_sae_plugin.cost.report import duration, memory_size, report
from e2e_sae_plugin.splice import splice_into
from e2e_sae_plugin.step import SplicedStepTrainer


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A small run on the bundled model, with folders, and with Weights & Biases that nobody is logged in to."""
    return {
        "model_name": "e2e-sae-demo",
        "dataset_path": "e2e-sae-demo",
        "hook_name": "blocks.3.hook_resid_pre",
        "objective": "e2e",
        "context_size": 16,
        "training_tokens": 64_000,
        "train_batch_size_tokens": 64,
        "store_batch_size_prompts": 2,
        "lr": 1e-3,
        "sae": {"architecture": "standard", "d_in": 128, "d_sae": 256, "l1_coefficient": 0.01},
        "output_path": str(tmp_path / "output"),
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "logger": {"log_to_wandb": True},
    }


@pytest.fixture
def file(tmp_path: Path, content: dict[str, Any]) -> Path:
    return write(tmp_path, content)


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(autouse=True)
def small_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MATMUL_SIZE", {"cpu": 64})


def test_a_run_is_estimated_from_real_steps_and_nothing_is_written(file: Path, capsys: pytest.CaptureFixture[str]):
    figures = file.parent / "figures.json"
    assert main(["estimate", "--config", str(file), "--steps", "2", "--json", str(figures)]) == 0
    text = capsys.readouterr().out
    assert (
        "64,000 tokens of e2e-sae-demo, SAE of 128 x 256 (standard) at blocks.3.hook_resid_pre, objective e2e" in text
    )
    assert "steps of 64 tokens, 32 through the model at once" in text
    for words in ("clean pass: blocks", "SAE: encoder", "optimizer state", "Time: ", "tokens/s with the objective e2e"):
        assert words in text
    assert "it fits" in text
    assert {path.name for path in file.parent.iterdir()} == {"run.yaml", "figures.json"}
    found = json.loads(figures.read_text())
    assert len(found["measured"]["main"]["seconds"]) == 2
    median = sum(found["measured"]["main"]["seconds"]) / 2
    assert found["measured"]["training_seconds"] == pytest.approx(1000 * median)
    assert found["measured"]["tokens_per_second"] == pytest.approx(64 / median)
    assert found["run_flops"] == pytest.approx(64_000 * sum(found["flops_per_token"].values()))
    assert found["flops_per_token"]["SAE: encoder"] == 2 * 128 * 256
    assert found["peak_bytes"] == max(found["memory_phases_bytes"].values())
    assert found["fits"] is True


def test_flags_stand_for_a_file_as_in_train(content: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    flags = "--model_name e2e-sae-demo --hook_name blocks.3.hook_resid_pre --d_in 128 --d_sae 512 --context_size 16 "
    flags += "--train_batch_size_tokens 64 --training_tokens 640 --verbose False --no-measure"
    assert main(["estimate", *flags.split()]) == 0
    text = capsys.readouterr().out
    assert "SAE of 128 x 512 (standard)" in text
    assert "Time: not measured (--no-measure)." in text


def test_a_local_start_is_measured_too(
    tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    objectives: list[str] = []
    step = SplicedStepTrainer.step

    def noted(self: SplicedStepTrainer, batch: torch.Tensor) -> Any:
        objectives.append(self.objective.kind)
        return step(self, batch)

    monkeypatch.setattr(SplicedStepTrainer, "step", noted)
    content |= {"local_first": 0.25, "sae": {"architecture": "topk", "d_in": 128, "d_sae": 256, "k": 8}}
    path = write(tmp_path, content)
    assert main(["estimate", "--config", str(path), "--steps", "1", "--json", str(tmp_path / "x.json")]) == 0
    assert objectives == ["local"] * 2 + ["e2e"] * 2
    text = capsys.readouterr().out
    assert "in the local part, the first 25% of the run" in text
    assert "tokens/s with the objective local" in text
    found = json.loads((tmp_path / "x.json").read_text())
    main_seconds, local_seconds = (found["measured"][part]["seconds"][0] for part in ("main", "local"))
    assert found["measured"]["training_seconds"] == pytest.approx(750 * main_seconds + 250 * local_seconds)
    per_token = [sum(found[f"flops_per_token{part}"].values()) for part in ("", "_local")]
    assert found["run_flops"] == pytest.approx(64_000 * (0.75 * per_token[0] + 0.25 * per_token[1]))


def test_a_device_that_is_not_here_can_be_counted_but_not_measured(
    tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = write(tmp_path, content | {"device": "cuda:7"})
    assert main(["estimate", "--config", str(path)]) == 2
    assert "cuda:7" in capsys.readouterr().err
    assert main(["estimate", "--config", str(path), "--no-measure"]) == 0
    text = capsys.readouterr().out
    assert "how much memory cuda:7 has free is not known here" in text
    assert "Python and libraries" not in text


def test_what_does_not_fit_is_not_tried_and_told_how_to_fit(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(estimate, "available_memory", lambda _: 10_000)
    monkeypatch.setattr(estimate, "peak_memory", lambda *_: 0)
    monkeypatch.setattr(estimate, "measure_steps", lambda *_: pytest.fail("a step was tried"))
    assert main(["estimate", "--config", str(file)]) == 0
    text = capsys.readouterr().out
    assert "IT DOES NOT FIT" in text
    assert "not measured (no step was tried: by the estimate it does not fit)" in text
    assert "To make it fit" in text


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] can't allocate memory: you tried")],
)
def test_steps_that_run_out_of_memory_are_an_answer(
    error: Exception, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(estimate, "measure_steps", fail)
    assert main(["estimate", "--config", str(file)]) == 0
    text = capsys.readouterr().out
    assert "not measured (a step ran out of memory)" in text
    assert "To make it fit" in text


def test_other_errors_of_a_step_are_not_hidden(file: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(estimate, "measure_steps", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["estimate", "--config", str(file)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-measure", "--steps", "2"], "--steps has no effect with --no-measure"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--resume", "auto"], "--resume has no effect on an estimate"),
        (["--json", "nowhere/figures.json"], "--json: there is no folder"),
        (["--json", "."], "--json '.' is a folder. Name a file in it."),
        (["--kl", "2"], "takes no other flags; got --kl 2"),
    ],
)
def test_flags_that_contradict_each_other_exit_with_2(
    arguments: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["estimate", "--config", str(file), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sae": {"architecture": "standard", "d_in": 64, "d_sae": 256}}, "sae.d_in=64 does not match"),
        ({"hook_name": "blocks.30.hook_resid_pre"}, "blocks.30"),
        ({"context_size": 1024, "train_batch_size_tokens": 1024}, "context"),
        ({"learning_rate": 1}, "Unknown key 'learning_rate'"),
        ({"device": "cdua"}, "device='cdua' is no name of a device. Expected one that torch.device() takes"),
        ({"llm_device": "gpu:0"}, "llm_device='gpu:0' is no name of a device"),
    ],
)
def test_what_a_run_would_refuse_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    assert main(["estimate", "--config", str(write(tmp_path, content | settings)), "--no-measure"]) == 2
    assert message in capsys.readouterr().err


def test_help_and_nothing(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["estimate", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for words in ("--config FILE", "--no-measure", "--steps", "--json FILE"):
        assert words in text
    with pytest.raises(SystemExit) as exit_info:
        main(["estimate"])
    assert exit_info.value.code == 2
    assert "give --config FILE" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "estimate " in capsys.readouterr().out


def test_the_config_that_is_given_stays_as_it_is(file: Path):
    cfg = E2ESAERunnerConfig.load(file)
    before = cfg.to_dict()
    text = report(estimate_run(cfg, n_steps=0))
    assert cfg.to_dict() == before
    assert "Memory:" in text


def test_measured_steps_are_those_of_the_config():
    cfg = runner_config(objective=Objective.e2e_downstream(1.0))
    spliced = splice_into(tiny_hooked_transformer(), cfg.hook_name)
    spliced.check()
    measured = measure_steps(RunParts(cfg, spliced, training_sae(cfg)), 3)
    assert (measured.main.objective, measured.main.tokens_per_step, len(measured.main.seconds)) == ("e2e+ds", 32, 3)
    assert measured.local is None
    assert measured.peak_bytes is not None
    assert measured.peak_bytes > 1e8
    assert matmul_speed() > 0
    with pytest.raises(ValueError, match="n_steps must be at least 1, got 0"):
        measure_steps(RunParts(cfg, spliced, training_sae(cfg)), 0)


def test_time_by_hand():
    measured = Measurement(StepTimes("e2e", (2.0, 1.0, 9.0), 32), None, 1.0, None)
    assert measured.main.tokens_per_second == 16
    assert measured.training_seconds(runner_config(training_tokens=320)) == 20  # ten steps at the median
    assert measured.training_seconds(runner_config(training_tokens=330)) == 22  # the last one is whole


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (42, "42 s"),
        (185, "3 min 5 s"),
        (3600, "1 h"),
        (7800, "2 h 10 min"),
        (90000, "1 day 1 h"),
        (4 * 86400, "4 days"),
    ],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_a_dictionary_beyond_all_memory_is_counted_without_making_it(
    tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    content["sae"]["d_sae"] = 10**9
    assert main(["estimate", "--config", str(write(tmp_path, content)), "--no-measure"]) == 0
    text = capsys.readouterr().out
    assert "128 x 1,000,000,000" in text
    assert "IT DOES NOT FIT" in text


def test_what_is_approximated_of_the_kl_is_said_not_to_be_counted(
    tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    content["objective"] = {"kl": 1.0, "kl_positions": 0.25}
    assert main(["estimate", "--config", str(write(tmp_path, content)), "--no-measure"]) == 0
    assert "KL on 25 % of the positions, drawn at each step: not counted below" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0.0 MB"), (1_234_567, "1.2 MB"), (99_900_000, "99.9 MB"), (1e8, "0.10 GB"), (12_345_678_901, "12.35 GB")],
)
def test_sizes_of_small_models_are_not_nought(n_bytes: float, text: str):
    assert memory_size(n_bytes) == text
