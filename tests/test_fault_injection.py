"""Runs on the bundled model that are killed, starved of disk and interrupted: each ends where the one left alone ends.

A few faults in every test run; `pytest -m exhaustive` has many more (`make faults`, part of `make check`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_runs import STEPS, Fault, Outcome, end_state, finish, moments, prepare, run, run_until_signal, start
from marks import slow_except

from e2e_sae_plugin.checkpoint import DamagedCheckpointError, verify_checkpoint

FINISHED = 0
STATUSES = {signal.SIGINT: {130}, signal.SIGTERM: {143}, signal.SIGKILL: {-9}}


@dataclass
class Reference:
    data: Path
    end: dict[str, object]
    seconds: float
    """From the start of training to the end of the process."""
    operations: int


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The run that nothing happens to."""
    data = tmp_path_factory.mktemp("data")
    prepare(data)
    folder = tmp_path_factory.mktemp("reference")
    began = time.monotonic()
    process = start(data, folder)
    while not (folder / "started").exists() and process.is_alive():
        time.sleep(0.005)
    started = time.monotonic()
    outcome = finish(process, folder, began)
    assert outcome.status == FINISHED, outcome.log[-3000:]
    return Reference(data, end_state(folder), time.monotonic() - started, int((folder / "operations").read_text()))


def assert_whole(folder: Path) -> None:
    """No reader finds a part of anything: what has a name is whole."""
    for checkpoint in (folder / "checkpoints").glob("*/[!.]*"):
        verify_checkpoint(checkpoint)
    if (folder / "out/cfg.json").exists():
        assert (folder / "out/sae_weights.safetensors").exists()


def assert_ends_as_the_reference(folder: Path, reference: Reference, outcome: Outcome | None = None) -> None:
    outcome = outcome or run(reference.data, folder)
    assert outcome.status == FINISHED, outcome.log[-3000:]
    for name, value in end_state(folder).items():
        assert value == reference.end[name], f"{name} differs"
    left = [path.name for pattern in ("checkpoints/*/.*", "out/.*") for path in folder.glob(pattern)]
    assert left == []


# Killed at file operations: in the middle of writing a checkpoint or the final SAE.


def kill_at_operation(folder: Path, reference: Reference, operation: int, torn: bool) -> None:
    outcome = run(reference.data, folder, Fault(operation, torn))
    assert outcome.status == -signal.SIGKILL, outcome.log[-3000:]
    assert_whole(folder)
    assert_ends_as_the_reference(folder, reference)


@pytest.mark.parametrize("share", slow_except([0.03, 0.52, 0.97, 0.999], 0.52))
def test_a_kill_during_a_write_loses_nothing(share: float, tmp_path: Path, reference: Reference):
    kill_at_operation(tmp_path, reference, max(int(share * reference.operations), 1), torn=share > 0.5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("index", range(24))
def test_a_kill_at_any_file_operation_loses_nothing(index: int, tmp_path: Path, reference: Reference):
    kill_at_operation(tmp_path, reference, 1 + index * reference.operations // 24, torn=index % 2 == 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("index", range(12))
def test_a_kill_at_any_operation_of_the_final_save_loses_nothing(index: int, tmp_path: Path, reference: Reference):
    kill_at_operation(tmp_path, reference, reference.operations - index, torn=index % 2 == 0)


# Killed and interrupted by the clock.


def interrupt_at(folder: Path, reference: Reference, number: signal.Signals, moment: float) -> None:
    outcome = run_until_signal(reference.data, folder, [number], moment)
    assert outcome.status in STATUSES[number] | {FINISHED}, outcome.log[-3000:]
    assert_whole(folder)
    if outcome.status in (130, 143) and "Saved a checkpoint" in outcome.log:
        steps = int(outcome.log.split(f"{number.name} at step ")[1].split(".")[0])
        named = outcome.log.split("set resume_from_checkpoint='")[1].split("'")[0]
        assert verify_checkpoint(Path(named))["n_training_steps"] == steps
    assert_ends_as_the_reference(folder, reference)


@pytest.mark.parametrize("number", slow_except([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_run_that_is_stopped_and_resumed_is_the_same_run(
    number: signal.Signals, tmp_path: Path, reference: Reference
):
    interrupt_at(tmp_path, reference, number, moments(int(number), 1, reference.seconds)[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("index", range(30))
def test_a_run_stopped_at_a_random_moment_is_the_same_run(index: int, tmp_path: Path, reference: Reference):
    number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[index % 3]
    interrupt_at(tmp_path, reference, number, moments(7, 30, reference.seconds)[index])


@pytest.mark.exhaustive
@pytest.mark.parametrize("index", range(4))
def test_a_run_killed_again_and_again_is_the_same_run(index: int, tmp_path: Path, reference: Reference):
    for moment in moments(100 + index, 4, reference.seconds / 3):
        outcome = run_until_signal(reference.data, tmp_path, [signal.SIGKILL], moment)
        assert outcome.status in (-9, FINISHED)
        assert_whole(tmp_path)
    assert_ends_as_the_reference(tmp_path, reference)


@pytest.mark.exhaustive
@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_the_last_checkpoint(
    index: int, number: signal.Signals, tmp_path: Path, reference: Reference
):
    moment = moments(50 + index, 1, reference.seconds)[0]
    outcome = run_until_signal(reference.data, tmp_path, [number, number], moment, gap=0.01 * index)
    # The second may find the process already ending on its own.
    assert outcome.status in {128 + number, -number, FINISHED, 1}, outcome.log[-3000:]
    assert_whole(tmp_path)
    assert_ends_as_the_reference(tmp_path, reference)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_kill_before_training_begins_leaves_nothing_in_the_way(
    number: signal.Signals, tmp_path: Path, reference: Reference
):
    outcome = run_until_signal(reference.data, tmp_path, [number], 0.3, once_started=False)
    assert outcome.status != FINISHED
    assert_ends_as_the_reference(tmp_path, reference)


# The disk.


def test_a_full_disk_costs_checkpoints_and_not_the_run(tmp_path: Path, reference: Reference):
    """From one checkpoint on, no file may be as large as the SAE's; the final save fails, with the way to go on named."""
    outcome = run(reference.data, tmp_path, Fault(reference.operations // 2, action="full"))
    assert outcome.status == 1
    assert "could not be written" in outcome.log
    assert "The finished SAE could not be saved in output_path" in outcome.log
    assert "Traceback" in outcome.log  # an OSError, which is not swallowed
    assert_whole(tmp_path)
    assert not (tmp_path / "out/cfg.json").exists()
    assert_ends_as_the_reference(tmp_path, reference)


def mounted(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in a mount namespace of its own; skip where the system refuses one."""
    if shutil.which("unshare") is None:
        pytest.skip("needs `unshare` (util-linux) to mount a small file system")
    probe = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"this system refuses to mount a tmpfs in a user namespace: {probe.stderr.strip()}")
    return subprocess.run(["unshare", "-rm", "bash", "-c", command], capture_output=True, text=True, check=False)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from fault_runs import Fault, train
train(Path({data!r}), Path({folder!r}), Fault(), {changes!r})
"""


def script(tmp_path: Path, reference: Reference, folder: Path, **changes: object) -> str:
    path = tmp_path / "run.py"
    tests = str(Path(__file__).parent)
    path.write_text(SCRIPT.format(tests=tests, data=str(reference.data), folder=str(folder), changes=changes))
    return f"{shutil.which('python') or 'python'} {path}"


@pytest.fixture
def here_python(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.slow
@pytest.mark.usefixtures("here_python")
def test_a_small_file_system_that_fills_up_costs_no_checkpoint_that_was_there(tmp_path: Path, reference: Reference):
    disk, folder = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    copy = tmp_path / "copy"
    changes = {"checkpoint_path": str(disk / "checkpoints"), "output_path": str(disk / "out"), "keep_checkpoints": 1}
    command = script(tmp_path, reference, folder, **changes)
    # Room for the checks at the start (4.5 times the weights and moments, 1.6 MB), which is then taken away.
    result = mounted(
        disk,
        f"mount -t tmpfs -o size=64m tmpfs {disk} && ({command} & pid=$!; "
        f"until ls {disk}/checkpoints/*/*/manifest.json >/dev/null 2>&1; do sleep 0.05; done; "
        # Again and again, or what an attempt at a checkpoint gives back would do for the SAE.
        f"while kill -0 $pid 2>/dev/null; do head -c 80000000 /dev/zero >> {disk}/filler; done; wait $pid; echo status $?); "
        f"rm {disk}/filler; cp -r {disk}/. {copy}",
    )
    log = (folder / "log").read_text()
    assert "status 1" in result.stdout, result.stderr + log[-3000:]
    assert "No space left on device" in log
    assert "The finished SAE could not be saved in output_path" in log
    whole = [path for path in (copy / "checkpoints").glob("*/[!.]*") if verify_checkpoint(path)]
    assert whole
    # Elsewhere, with room, it goes on from there.
    shutil.copytree(copy / "checkpoints", tmp_path / "again/checkpoints")
    if (copy / "out").exists():
        shutil.copytree(copy / "out", tmp_path / "again/out")
    assert_ends_as_the_reference(tmp_path / "again", reference)


@pytest.mark.slow
@pytest.mark.usefixtures("here_python")
def test_a_read_only_folder_is_refused_before_the_model_is_loaded(tmp_path: Path, reference: Reference):
    disk, folder = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    for field in ("output_path", "checkpoint_path"):
        command = script(tmp_path, reference, folder, **{field: str(disk / "inside")})
        result = mounted(disk, f"mount -t tmpfs -o ro tmpfs {disk} && {command}; echo status $?")
        log = (folder / "log").read_text()
        assert "status 1" in result.stdout
        assert f"ValueError: {field}={str(disk / 'inside')!r} cannot be written: Read-only file system" in log


def test_a_folder_that_vanishes_during_the_run_is_made_again(tmp_path: Path, reference: Reference):
    (tmp_path / "started").unlink(missing_ok=True)
    process = start(reference.data, tmp_path)
    began = time.monotonic()
    while not list((tmp_path / "checkpoints").glob("*/[!.]*/manifest.json")) and process.is_alive():
        time.sleep(0.01)
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    outcome = finish(process, tmp_path, began)
    assert outcome.status == FINISHED, outcome.log[-3000:]
    for name in ("sae_weights.safetensors", "metrics.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == reference.end[name]


# Damage.


@pytest.mark.parametrize("seed", slow_except(range(3), 0))
def test_auto_passes_over_a_damaged_checkpoint_and_ends_the_same(seed: int, tmp_path: Path, reference: Reference):
    outcome = run(reference.data, tmp_path, Fault(reference.operations // 2))
    assert outcome.status == -9
    found = sorted((tmp_path / "checkpoints").glob("*/[!.]*"), key=lambda path: int(path.name))
    assert len(found) == 2
    assert int(found[-1].name) < STEPS * 128
    files = sorted(path for path in found[-1].iterdir() if path.stat().st_size)
    victim = files[seed * 4 % len(files)]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=victim.name):
        verify_checkpoint(found[-1])
    again = run(reference.data, tmp_path)
    assert "Passed over" in again.log
    assert f"Resumed from {found[0]}" in again.log
    shutil.rmtree(found[-1], ignore_errors=True)
    assert_ends_as_the_reference(tmp_path, reference, again)
