"""Signals and failures: the step is finished or taken back, a checkpoint is written, the status is the conventional one."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import parameters_of, runner_config, tiny_hooked_transformer, token_dataset
from safetensors.torch import load_file

from e2e_sae_plugin import E2ESAETrainingRunner, RunInterrupted
from e2e_sae_plugin.checkpoint import verify_checkpoint
from e2e_sae_plugin.interruption import stop_on_signals
from e2e_sae_plugin.step import SplicedStepTrainer
from e2e_sae_plugin.trainer import E2ESAETrainer

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def build(tmp_path: Path, **settings: Any) -> E2ESAETrainingRunner:
    defaults: dict[str, Any] = {
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "output_path": str(tmp_path / "out"),
        "lr": 1e-2,
    }
    config = runner_config(**{**defaults, **settings})
    return E2ESAETrainingRunner(config, override_dataset=token_dataset(), override_model=tiny_hooked_transformer())


def at_step(
    monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object], method: str = "sae_forward"
) -> None:
    """Run `act` inside the step of that number, counted from 0."""
    original = getattr(SplicedStepTrainer, method)

    def acting(self: SplicedStepTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.n_training_steps == number:
            act()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SplicedStepTrainer, method, acting)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_the_step_finish_and_leaves_a_checkpoint(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):  # fmt: skip
    before = handlers()
    whole = build(tmp_path / "whole").run()
    at_step(monkeypatch, 3, lambda: signal.raise_signal(number))
    runner = build(tmp_path)
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"), pytest.raises(RunInterrupted) as stopped:
        runner.run()
    monkeypatch.undo()
    assert stopped.value.code == 128 + number == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    checkpoint = stopped.value.checkpoint
    assert checkpoint is not None
    assert verify_checkpoint(checkpoint)["n_training_steps"] == 4
    assert f"{number.name} at step 4. Saved a checkpoint." in caplog.text
    assert f"set resume_from_checkpoint={str(checkpoint)!r}" in caplog.text
    assert f"{number.name}: stopping after this step. A second signal stops at once." in capfd.readouterr().err
    assert handlers() == before
    resumed = build(tmp_path, resume_from_checkpoint=str(checkpoint)).run()
    assert all(value.equal(parameters_of(whole)[name]) for name, value in parameters_of(resumed).items())


def test_a_second_sigint_stops_at_once_and_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = handlers()
    at_step(monkeypatch, 3, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    runner = build(tmp_path, checkpoint_every_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert runner.run_folder is not None
    assert [manifest["n_training_steps"] for _, manifest in runner.run_folder.checkpoints()] == [3, 2]
    assert handlers() == before


def test_a_second_signal_during_the_write_of_a_checkpoint_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = E2ESAETrainer.save_trainer_state

    def interrupted(self: E2ESAETrainer, path: Path) -> None:
        save(self, path)
        if self.n_training_steps == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(E2ESAETrainer, "save_trainer_state", interrupted)
    runner = build(tmp_path, checkpoint_every_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert runner.run_folder is not None
    assert [path.name for path in sorted(runner.run_folder.path.iterdir())] == ["32", "64"]
    assert [verify_checkpoint(path)["n_training_steps"] for path in sorted(runner.run_folder.path.iterdir())] == [1, 2]


def test_a_second_sigterm_has_the_systems_own_effect():
    with stop_on_signals() as request:
        signal.raise_signal(signal.SIGTERM)
        assert request.signal_number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_is_touched_outside_the_main_thread(tmp_path: Path):
    before, seen, runner = handlers(), [], build(tmp_path)
    thread = threading.Thread(target=lambda: seen.append(runner.run()))
    thread.start()
    thread.join()
    assert seen == [runner.sae]
    assert handlers() == before


def test_a_signal_at_the_very_end_still_stops_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    original = E2ESAETrainer.set_final_sae_metadata

    def signalled(self: E2ESAETrainer) -> None:
        signal.raise_signal(signal.SIGTERM)
        original(self)

    monkeypatch.setattr(E2ESAETrainer, "set_final_sae_metadata", signalled)
    with pytest.raises(RunInterrupted) as stopped:
        build(tmp_path).run()
    assert (stopped.value.code, stopped.value.checkpoint) == (143, None)
    assert "The run was finished and saved when the signal came" in caplog.text
    assert (tmp_path / "out/sae_weights.safetensors").exists()


def test_without_a_checkpoint_path_a_signal_says_that_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"), pytest.raises(RunInterrupted) as stopped:
        build(tmp_path, checkpoint_path=None).run()
    assert stopped.value.checkpoint is None
    assert "SIGTERM at step 2. There is no checkpoint: checkpoint_path is None." in caplog.text


def test_a_signal_before_the_first_step_stops_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = E2ESAETrainer.raw_sae_in

    def signalled(self: E2ESAETrainer, *args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(E2ESAETrainer, "raw_sae_in", signalled)
    with pytest.raises(RunInterrupted) as stopped:
        build(tmp_path, b_dec_init_method="mean").run()
    assert stopped.value.checkpoint is None
    assert not (tmp_path / "checkpoints").exists()


def test_an_interrupt_is_a_keyboard_interrupt_to_those_who_catch_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as stopped:
        build(tmp_path).run()
    assert isinstance(stopped.value, RunInterrupted)
    assert stopped.value.code == 130


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As under `nohup`, and in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
        build(tmp_path).run()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_runner_runs_once(tmp_path: Path):
    runner = build(tmp_path)
    runner.run()
    with pytest.raises(RuntimeError, match="This runner has run already"):
        runner.run()


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = build(tmp_path), build(tmp_path, checkpoint_path=str(tmp_path / "others"))
    errors: list[str] = []

    def start_second() -> None:
        with pytest.raises(ValueError, match="Another run is writing into") as refused:
            second.run()
        errors.append(str(refused.value))

    original = SplicedStepTrainer.sae_forward
    done = iter([start_second])

    def in_the_first_step(self: SplicedStepTrainer, *args: Any, **kwargs: Any) -> Any:
        for act in done:
            act()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SplicedStepTrainer, "sae_forward", in_the_first_step)
    first.run()
    assert str(tmp_path / "out") in errors[0]
    assert not (tmp_path / "out/.run.lock").exists()


# Failures.


@pytest.mark.parametrize("method", ["sae_forward", "_clip_gradients", "_count_firing"])
@pytest.mark.parametrize("architecture", ["standard", "batchtopk"])
def test_a_step_that_fails_is_taken_back_and_comes_again(
    method: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail() -> None:
        raise RuntimeError("out of memory")

    whole = build(tmp_path / "whole", architecture=architecture).run()
    at_step(monkeypatch, 3, fail, method)
    runner = build(tmp_path, architecture=architecture)
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"), pytest.raises(RuntimeError, match="out of memory"):
        runner.run()
    monkeypatch.undo()
    assert "RuntimeError at step 3. Saved a checkpoint." in caplog.text
    assert runner.run_folder is not None
    ((checkpoint, manifest),) = runner.run_folder.checkpoints()
    assert manifest["n_training_steps"] == 3
    resumed = build(tmp_path, architecture=architecture, resume_from_checkpoint=str(checkpoint)).run()
    assert all(value.equal(parameters_of(whole)[name]) for name, value in parameters_of(resumed).items())


def test_a_failing_optimizer_leaves_the_last_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    runner = build(tmp_path, checkpoint_every_minutes=1e-9)
    build_trainer = runner._build_trainer

    def failing_trainer() -> E2ESAETrainer:
        trainer = build_trainer()

        def fail(*_: object) -> None:
            if trainer.n_training_steps == 2:
                raise RuntimeError("half-way")

        trainer.optimizer.register_step_pre_hook(fail)
        return trainer

    monkeypatch.setattr(runner, "_build_trainer", failing_trainer)
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"), pytest.raises(RuntimeError, match="half-way"):
        runner.run()
    assert runner.run_folder is not None
    assert [manifest["n_training_steps"] for _, manifest in runner.run_folder.checkpoints()] == [2, 1]
    assert "Its weights are incomplete and were not saved" in caplog.text


def test_an_evaluation_that_fails_keeps_the_step_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runner = build(tmp_path, n_eval_batches=1)
    monkeypatch.setattr(runner, "_evaluate", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.run()
    assert runner.run_folder is not None
    ((checkpoint, manifest),) = runner.run_folder.checkpoints()
    assert (manifest["n_training_steps"], manifest["n_training_samples"]) == (5, 160)
    assert load_file(checkpoint / "sae_weights.safetensors")["W_dec"].equal(parameters_of(runner.sae)["W_dec"])
