"""A sweep that was interrupted, killed or extended ends with the weights of one that was not, to the bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from fault_runs import PROCESSES, join
from helpers import tiny_hooked_transformer, token_dataset
from marks import slow_except
from test_sweep import KINDS, STEPS, assert_all_trained, assert_same_sae, assert_same_sweep, break_at, sweep, table

from e2e_sae_plugin import RunInterrupted
from e2e_sae_plugin.checkpoint import DamagedCheckpointError
from e2e_sae_plugin.checkpoint.run_folder import RunFolder
from e2e_sae_plugin.step import SplicedStepTrainer
from e2e_sae_plugin.token_stream import TokenStream
from e2e_sae_plugin.trainer import E2ESAETrainer

EVERY_ROUND: dict[str, Any] = {"checkpoint_every_minutes": 1e-9}
# One kind reads two batches before its first step, so that readers are at different places.
UNEVEN = {**KINDS, "e2e": {**KINDS["e2e"], "b_dec_init_method": "mean"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of `UNEVEN` that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    sweep(folder, UNEVEN).run()
    return folder


def at_step(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    act: Callable[[], object],
    name: str = "e2e-0.01",
    method: str = "step",
) -> None:
    """Run `act` before the step of that number (from 0) of one of the SAEs."""
    original = getattr(SplicedStepTrainer, method)

    def acting(self: SplicedStepTrainer, *args: Any) -> Any:
        if self.n_training_steps == number and Path(str(self.runner_cfg.output_path)).name.startswith(name):
            act()
        return original(self, *args)

    monkeypatch.setattr(SplicedStepTrainer, method, acting)


def interrupt(
    folder: Path, step: int, kinds: Any = None, number: int = signal.SIGTERM, name: str = "e2e-0.01", **options: Any
) -> RunInterrupted:
    """Run a sweep that a signal stops in that step (from 0) of one SAE; "e2e" is two steps behind the others."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        at_step(monkeypatch, step, lambda: signal.raise_signal(number), name)
        with pytest.raises(RunInterrupted) as stopped:
            sweep(folder, UNEVEN if kinds is None else kinds, **options).run()
    assert stopped.value.code == 128 + number
    return stopped.value


def trained_steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Filled with the steps that each SAE makes from now on."""
    found: dict[str, list[int]] = {}
    original = SplicedStepTrainer.step

    def note(self: SplicedStepTrainer, batch: Any) -> Any:
        found.setdefault(Path(str(self.runner_cfg.output_path)).name, []).append(self.n_training_steps)
        return original(self, batch)

    monkeypatch.setattr(SplicedStepTrainer, "step", note)
    return found


def sweep_checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    return [path for path, _ in RunFolder(folder / "sweep-checkpoints/sweep", 2).checkpoints()]


# Signals.


@pytest.mark.parametrize(
    ("step", "number"),
    slow_except([(0, signal.SIGTERM), (3, signal.SIGINT), (STEPS - 1, signal.SIGTERM)], (3, signal.SIGINT)),
)
def test_a_signal_finishes_the_round_and_saves_and_the_sweep_goes_on(
    step: int,
    number: int,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        stopped = interrupt(tmp_path, step, number=number, name="local")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    left = 1 if step == STEPS - 1 else 3  # the two that estimate nothing are through before the third
    assert f"The sweep was stopped with {left} SAEs to train. Saved {stopped.checkpoint}. Run the sweep" in caplog.text
    assert stopped.checkpoint == sweep_checkpoints(tmp_path)[0]
    caplog.clear()
    steps = trained_steps(monkeypatch)
    with caplog.at_level(logging.INFO, logger="e2e_sae_plugin"):
        assert_all_trained(sweep(tmp_path, UNEVEN).run())
    anew = " for 2 SAEs; the others start at the beginning" if step == 0 else ""  # the third had only estimated
    assert f"Going on from {stopped.checkpoint}{anew}." in caplog.text
    assert "begins anew" not in caplog.text
    assert steps.get("local-0.01-seed42", []) == list(range(step + 1, STEPS))
    assert_same_sweep(tmp_path, whole, 3)


@pytest.mark.slow
def test_a_signal_during_the_estimates_leaves_nothing_half_made(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    at_step(monkeypatch, 0, lambda: signal.raise_signal(signal.SIGTERM), method="raw_sae_in")
    steps = trained_steps(monkeypatch)
    with pytest.raises(RunInterrupted) as stopped, caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        sweep(tmp_path, {"e2e": UNEVEN["e2e"], **UNEVEN}).run()
    assert "The sweep was stopped before its first step." in caplog.text
    assert (stopped.value.code, stopped.value.checkpoint, steps) == (143, None, {})
    monkeypatch.undo()
    assert not sweep_checkpoints(tmp_path)
    assert_all_trained(sweep(tmp_path, UNEVEN).run())
    assert_same_sweep(tmp_path, whole, 3)


@pytest.mark.slow
def test_a_signal_at_the_very_end_still_stops_what_follows(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    original = E2ESAETrainer.end

    def signalled(self: E2ESAETrainer) -> Any:
        if "e2e-0.01" in str(self.runner_cfg.output_path):
            signal.raise_signal(signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(E2ESAETrainer, "end", signalled)
    with pytest.raises(RunInterrupted) as stopped, caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        sweep(tmp_path, UNEVEN).run()
    assert "The sweep had ended when the signal came" in caplog.text
    assert (stopped.value.code, stopped.value.checkpoint) == (143, None)
    assert_same_sweep(tmp_path, whole, 3)


def test_without_a_checkpoint_path_a_signal_says_that_nothing_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        assert interrupt(tmp_path, 2, checkpoint_path=None).checkpoint is None
    assert "Nothing could be saved" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


@pytest.mark.slow
def test_interrupted_again_and_again(tmp_path: Path, whole: Path):
    for step in (1, 2, 4):
        interrupt(tmp_path, step, name="e2e+ds")
    assert_all_trained(sweep(tmp_path, UNEVEN).run())
    assert_same_sweep(tmp_path, whole, 3)


# Killed.


def killed(folder: Path, n_writes: int) -> None:
    """A sweep that is killed between the SAEs' checkpoints and the sweep's own. Runs in a process of its own."""
    torch.set_num_threads(1)
    write, done = RunFolder.write, []

    def kill(self: RunFolder, *args: Any) -> Path:
        if self.path.name == "sweep":
            done.append(1)
            if len(done) == n_writes:
                os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *args)

    setattr(RunFolder, "write", kill)  # noqa: B010
    sweep(folder, UNEVEN, **EVERY_ROUND).run()


def test_a_sweep_that_was_killed_goes_on_from_its_last_whole_checkpoint(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    process = PROCESSES.Process(target=killed, args=(tmp_path, 5))
    process.start()
    join(process)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in sweep_checkpoints(tmp_path)] == ["4", "3"]
    steps = trained_steps(monkeypatch)
    assert_all_trained(sweep(tmp_path, UNEVEN).run())
    assert steps["local-0.01-seed42"] == [4, 5]
    assert_same_sweep(tmp_path, whole, 3)


class Killed(BaseException):
    """As good as a kill where nothing has to clean up."""


@pytest.mark.slow
def test_killed_twice_in_the_writing_of_a_checkpoint(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch):
    """The checkpoint that both starts go on from stays, whatever the SAEs have written since."""
    write = RunFolder.write

    def kill(number: str) -> Callable[..., Path]:
        def killing(self: RunFolder, name: str, *args: Any) -> Path:
            if (self.path.name, name) == ("sweep", number):
                raise Killed
            return write(self, name, *args)

        return killing

    for number, every in (("4", 1e-9), ("4", 1e-9), ("5", None), ("4", 1e-9)):
        monkeypatch.setattr(RunFolder, "write", kill(number))
        monkeypatch.setattr(RunFolder, "clean", lambda _: None)
        if every is None:  # stopped at another step than before, and killed while saving
            at_step(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM), "local")
        with pytest.raises(Killed):
            sweep(tmp_path, UNEVEN, checkpoint_every_minutes=every).run()
        monkeypatch.undo()
        assert [path.name for path in sweep_checkpoints(tmp_path)] == ["3", "2"]
    steps = trained_steps(monkeypatch)
    assert_all_trained(sweep(tmp_path, UNEVEN, **EVERY_ROUND).run())
    assert steps["local-0.01-seed42"] == [3, 4, 5]
    assert_same_sweep(tmp_path, whole, 3)


def test_two_checkpoints_are_kept_of_the_sweep_and_what_they_name_of_the_saes(tmp_path: Path):
    interrupt(tmp_path, 4, **EVERY_ROUND)
    assert [path.name for path in sweep_checkpoints(tmp_path)] == ["7", "6"]
    named = [json.loads((path / "sweep_state.json").read_text()) for path in sweep_checkpoints(tmp_path)]
    for name in ("local-0.01-seed42", "e2e-0.01-seed42", "e2e+ds-0.02-seed42"):
        there = {path.name for path in (tmp_path / "sweep-checkpoints" / name).iterdir() if path.is_dir()}
        assert there >= {state["members"][name]["checkpoint"] for state in named if name in state["members"]}
        assert len(there) <= 2
    assert named[0]["members"]["e2e-0.01-seed42"] == {"checkpoint": str(32 * 5), "place": 7}


# Damaged.


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "what", slow_except(["state", "stream", "an SAE's weights", "an SAE's folder"], "an SAE's weights")
)
def test_a_damaged_checkpoint_is_passed_over(what: str, tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture):
    interrupt(tmp_path, 1, **EVERY_ROUND)
    newest, before = sweep_checkpoints(tmp_path)
    member = tmp_path / "sweep-checkpoints/local-0.01-seed42"
    last = json.loads((newest / "sweep_state.json").read_text())["members"]["local-0.01-seed42"]["checkpoint"]
    if what == "an SAE's folder":
        shutil.rmtree(member / last)
    else:
        files = {
            "state": newest / "sweep_state.json",
            "stream": newest / "stream.safetensors",
            "an SAE's weights": member / last / "sae_weights.safetensors",
        }
        truncate(files[what])
    with caplog.at_level(logging.INFO, logger="e2e_sae_plugin"):
        assert_all_trained(sweep(tmp_path, UNEVEN).run())
    assert f"Passed over: {newest}: " in caplog.text
    assert f"Going on from {before}." in caplog.text
    assert_same_sweep(tmp_path, whole, 3)


def test_damaged_checkpoints_alone_are_not_started_anew_over(tmp_path: Path):
    interrupt(tmp_path, 1, **EVERY_ROUND)
    for path in sweep_checkpoints(tmp_path):
        truncate(path / "sweep_state.json")
    with pytest.raises(DamagedCheckpointError, match="damaged checkpoints alone, and does not start anew over them"):
        sweep(tmp_path, UNEVEN).run()


def test_the_checkpoints_of_a_finished_sae_are_no_longer_needed(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    interrupt(tmp_path, STEPS - 2, **EVERY_ROUND)  # the others are through
    shutil.rmtree(tmp_path / "sweep-checkpoints/local-0.01-seed42")
    finished = tmp_path / "sweep/local-0.01-seed42/cfg.json"
    assert finished.exists()
    before = finished.stat().st_mtime_ns
    steps = trained_steps(monkeypatch)
    assert_all_trained(sweep(tmp_path, UNEVEN).run())
    assert steps == {"e2e-0.01-seed42": [5]}
    assert finished.stat().st_mtime_ns == before
    assert_same_sweep(tmp_path, whole, 3)


# Another grid.


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """`UNEVEN` with another sparsity, and the folder of its undisturbed sweep."""
    kinds = {**UNEVEN, "e2e": {**UNEVEN["e2e"], "sparsities": [0.01, 0.04]}}
    folder = tmp_path_factory.mktemp("wider")
    sweep(folder, kinds).run()
    return kinds, folder


def test_a_grid_that_grows_in_the_middle_has_those_ahead_wait(
    tmp_path: Path,
    wider: tuple[dict[str, Any], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    interrupt(tmp_path, 1)
    kinds, expected = wider
    with caplog.at_level(logging.INFO, logger="e2e_sae_plugin"):
        interrupt(tmp_path, 1, kinds, name="e2e-0.04")  # before it has caught up
    assert "for 3 SAEs; the others start at the beginning" in caplog.text
    steps = trained_steps(monkeypatch)
    assert_all_trained(sweep(tmp_path, kinds).run())
    assert steps["e2e-0.04-seed42"] == [2, 3, 4, 5]
    assert steps["e2e-0.01-seed42"] == [2, 3, 4, 5]
    assert_same_sweep(tmp_path, expected, 4)


@pytest.mark.slow
def test_a_signal_before_the_new_ones_have_begun_keeps_what_the_others_have(
    tmp_path: Path, wider: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
):
    first = interrupt(tmp_path, 1)
    kinds, expected = wider
    at_step(monkeypatch, 0, lambda: signal.raise_signal(signal.SIGINT), name="e2e-0.04", method="raw_sae_in")
    with pytest.raises(RunInterrupted) as stopped:
        sweep(tmp_path, kinds).run()
    monkeypatch.undo()
    assert stopped.value.checkpoint == first.checkpoint
    assert_all_trained(sweep(tmp_path, kinds).run())
    assert_same_sweep(tmp_path, expected, 4)


def test_a_grid_that_shrinks_leaves_out_what_is_not_wanted(tmp_path: Path, whole: Path):
    interrupt(tmp_path, 1)
    kinds = {name: kind for name, kind in UNEVEN.items() if name != "local"}
    assert list(sweep(tmp_path, kinds).run()) == ["e2e-0.01-seed42", "e2e+ds-0.02-seed42"]
    for path in (whole / "sweep").glob("e2e*"):
        assert_same_sae(tmp_path / "sweep" / path.name, path)
    assert not (tmp_path / "sweep/local-0.01-seed42/cfg.json").exists()


# Not the same.


@pytest.mark.parametrize("grows", slow_except([False, True], False))
def test_other_data_are_refused(grows: bool, tmp_path: Path, wider: tuple[dict[str, Any], Path]):
    interrupt(tmp_path, 1)
    kinds = wider[0] if grows else UNEVEN
    same_head = token_dataset()["tokens"][:8] + token_dataset(200, seed=1)["tokens"][100:]
    with pytest.raises(ValueError, match="The dataset is not the one that the checkpoint was made with"):
        sweep(tmp_path, kinds, data=Dataset.from_dict({"tokens": same_head})).run()
    with pytest.raises(ValueError, match="held-out sequences at the head of the dataset are not those"):
        sweep(tmp_path, kinds, data=token_dataset(seed=1)).run()
    assert_all_trained(sweep(tmp_path, kinds).run())


def test_another_config_or_model_is_refused_by_name(tmp_path: Path, whole: Path):
    interrupt(tmp_path, 1)
    kinds = {**UNEVEN, "e2e": {**UNEVEN["e2e"], "lr": 0.5}}
    with pytest.raises(ValueError, match=r"of e2e-0\.01-seed42 holds another run(.|\n)*lr: 0\.003 -> 0\.5"):
        sweep(tmp_path, kinds).run()
    with pytest.raises(ValueError, match=r"training_tokens: 192 -> 320"):
        sweep(tmp_path, UNEVEN, training_tokens=320).run()
    other = tiny_hooked_transformer()
    with torch.no_grad():
        other.W_E.mul_(1.1)
    with pytest.raises(ValueError, match="the language model has other weights"):
        sweep(tmp_path, UNEVEN, model=other).run()
    shutil.move(tmp_path / "sweep", tmp_path / "moved")  # the checkpoints know too
    with pytest.raises(ValueError, match=r"of another run than this config's:\n  lr: 0\.003 -> 0\.5"):
        sweep(tmp_path, kinds).run()
    shutil.rmtree(tmp_path / "sweep")
    assert_all_trained(sweep(tmp_path, UNEVEN).run())
    for path in (whole / "sweep").glob("*/sae_weights.safetensors"):
        assert (tmp_path / "sweep" / path.parent.name / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_overwriting_starts_anew(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch):
    interrupt(tmp_path, 1)
    steps = trained_steps(monkeypatch)
    sweep(tmp_path, UNEVEN, overwrite_output=True).run()
    assert steps["e2e-0.01-seed42"] == list(range(STEPS))
    assert (tmp_path / "sweep/sweep.csv").read_text() == (whole / "sweep/sweep.csv").read_text()


# Failures.


@pytest.mark.slow
def test_one_that_has_failed_does_not_hold_the_others_up(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch):
    break_at(monkeypatch, "local-0.01-seed42", 1, RuntimeError("out of memory"))
    interrupt(tmp_path, 1)
    monkeypatch.undo()
    assert table(tmp_path)["local-0.01-seed42"]["status"] == "failed"
    steps = trained_steps(monkeypatch)
    saes = sweep(tmp_path, UNEVEN).run()
    assert [name for name, sae in saes.items() if sae is None] == ["local-0.01-seed42"]
    assert steps == {"e2e-0.01-seed42": [2, 3, 4, 5], "e2e+ds-0.02-seed42": [4, 5]}
    assert_all_trained(sweep(tmp_path, UNEVEN).run())
    assert steps["local-0.01-seed42"] == list(range(STEPS))
    assert_same_sweep(tmp_path, whole, 3)


# Streams.


@pytest.mark.parametrize("kind", slow_except(["plain", "mapped"], "plain"))
def test_a_stream_is_not_read_again_up_to_its_place(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Though every SAE's store has looked at its first row, and `datasets` keeps one state for all."""

    def stream() -> Any:
        rows = token_dataset(64).to_iterable_dataset(num_shards=4)
        return rows if kind == "plain" else rows.map(lambda row: {"tokens": row["tokens"][::-1]})

    sweep(tmp_path / "whole", UNEVEN, data=stream()).run()
    interrupt(tmp_path, 1, data=stream())
    jumps: list[bool] = []
    goes_on_from = TokenStream._goes_on_from

    def note(self: TokenStream, place: Any, state: Any) -> bool:
        jumps.append(goes_on_from(self, place, state))
        return jumps[-1]

    monkeypatch.setattr(TokenStream, "_goes_on_from", note)
    assert_all_trained(sweep(tmp_path, UNEVEN, data=stream()).run())
    assert jumps == [True]  # at the first attempt, which does not read from the beginning
    assert_same_sweep(tmp_path, tmp_path / "whole", 3)


# Parts.


def test_parts_go_on_each_by_itself(tmp_path: Path, whole: Path):
    interrupt(tmp_path, 3, name="local", part=(1, 2))
    interrupt(tmp_path, 2, part=(2, 2))
    folders = sorted(path.name for path in (tmp_path / "sweep-checkpoints").glob("sweep*"))
    assert folders == ["sweep-1-of-2", "sweep-2-of-2"]
    assert list(sweep(tmp_path, UNEVEN, part=(2, 2)).run()) == ["e2e-0.01-seed42"]
    assert table(tmp_path)["local-0.01-seed42"]["status"] == "not finished"
    assert list(sweep(tmp_path, UNEVEN, part=(1, 2)).run()) == ["local-0.01-seed42", "e2e+ds-0.02-seed42"]
    assert_same_sweep(tmp_path, whole, 3)


@pytest.mark.slow
def test_another_division_into_parts_starts_anew_and_says_so(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    interrupt(tmp_path, 3, name="local", part=(1, 2))
    sweep(tmp_path, UNEVEN, part=(2, 2)).run()
    steps = trained_steps(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        assert_all_trained(sweep(tmp_path, UNEVEN).run())
    assert "sweep-1-of-2/4 was written by another part of the sweep" in caplog.text.replace("\\", "/")
    assert steps == {"local-0.01-seed42": list(range(STEPS)), "e2e+ds-0.02-seed42": list(range(STEPS))}
    assert_same_sweep(tmp_path, whole, 3)


@pytest.mark.parametrize("part", [(1, 1), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_two_processes_do_not_train_the_same_saes(
    part: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(ValueError, match="Another run is writing into") as error:
            sweep(tmp_path, UNEVEN, part=part).run()
        refused.append(str(error.value))

    at_step(monkeypatch, 2, second, name="local")
    assert_all_trained(sweep(tmp_path, UNEVEN, part=part).run())
    assert len(refused) == 1
    assert not list(tmp_path.rglob(".run.lock"))
