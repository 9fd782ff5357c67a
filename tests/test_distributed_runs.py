"""Whole runs on several gloo processes: checkpoints, interruptions, lost ranks, and who writes what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers import runner_config
from marks import slow_except
from ranked_runs import End, Run, fail_on, finish, launch, logs, signal_to, start
from test_distributed import SETTINGS, difference
from time_limits import hang_seconds

from e2e_sae_plugin import Objective
from e2e_sae_plugin.checkpoint import verify_checkpoint
from e2e_sae_plugin.checkpoint.folder import read_manifest
from e2e_sae_plugin.distributed import TIMEOUT, Ranks
from e2e_sae_plugin.rank_checks import check_ranks


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    folders = {"output_path": str(folder / "out"), "checkpoint_path": str(folder / "checkpoints")}
    return {**SETTINGS, **folders, "resume_from_checkpoint": "auto", "verbose": True, **changes}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> End:
    """One process that nothing happens to."""
    folder = tmp_path_factory.mktemp("reference")
    ((end,),) = launch(1, [Run("batchtopk", settings(folder))], folder)
    assert end.error is None, logs(folder)
    return end


def checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints").glob("*/[!.]*") if path.is_dir())


def assert_ends_as(reference: End, folder: Path, size: int) -> None:
    """A new start with `size` ranks goes on from the checkpoint, and ends where the reference does."""
    ends = launch(size, [Run("batchtopk", settings(folder))], folder)
    assert "Resumed from" in logs(folder)["log0"]
    for (end,) in ends:
        assert end.error is None, logs(folder)
        assert difference(reference.weights, end.weights) < 1e-6
        assert difference(reference.statistics, end.statistics) == 0


@pytest.mark.parametrize(("first", "then"), slow_except([(1, 2), (2, 1), (4, 2)], (1, 2)))
def test_a_stopped_run_goes_on_with_another_number_of_ranks(
    first: int, then: int, reference: End, tmp_path: Path
) -> None:
    stop = {4: partial(signal_to, first - 1, signal.SIGTERM)}  # the last rank alone gets the signal
    ends = launch(first, [Run("batchtopk", settings(tmp_path), at_step=stop)], tmp_path)
    for (end,) in ends:
        assert end.status == 143, logs(tmp_path)
        assert int(end.statistics["counts"][1]) == 5  # all stop after the same step
    (checkpoint,) = checkpoints(tmp_path)
    assert read_manifest(checkpoint)["n_training_steps"] == 5
    assert_ends_as(reference, tmp_path, then)


@pytest.mark.parametrize("lost", slow_except([0, 2], 0))
def test_a_killed_rank_ends_the_others_with_one_message_and_a_checkpoint(
    lost: int, reference: End, tmp_path: Path
) -> None:
    kill = {6: partial(signal_to, lost, signal.SIGKILL)}
    sizes = {"train_batch_size_tokens": 96, "training_tokens": 960}
    processes = start(3, [Run("batchtopk", settings(tmp_path, **sizes), at_step=kill)], tmp_path)
    ends = finish(processes, tmp_path)
    assert ends[lost] == []
    said = [name for name, text in logs(tmp_path).items() if "To go on from it" in text]
    assert said == [f"log{1 if lost == 0 else 0}"], logs(tmp_path)
    text = logs(tmp_path)[said[0]]
    assert text.count("A rank of 3 was lost") == 1
    (checkpoint,) = checkpoints(tmp_path)
    assert str(checkpoint) in text
    verify_checkpoint(checkpoint)


@pytest.mark.slow
def test_a_run_whose_rank_was_killed_goes_on_with_fewer(reference: End, tmp_path: Path) -> None:
    kill = {6: partial(signal_to, 3, signal.SIGKILL)}
    ends = launch(4, [Run("batchtopk", settings(tmp_path), at_step=kill)], tmp_path)
    assert [end.status if end.error is None else end.error.split(":")[0] for each in ends[1:3] for end in each] == [
        1,
        1,
    ]
    assert (ends[0][0].error or "").startswith("LostRankError: Another rank of this run has ended")
    # They are told, and do not wait for the lost one: that would take distributed.TIMEOUT, and `launch` fails before.
    assert hang_seconds() < TIMEOUT.total_seconds()
    (checkpoint,) = checkpoints(tmp_path)
    assert read_manifest(checkpoint)["n_training_steps"] == 6  # steps 0 to 5 were done
    assert_ends_as(reference, tmp_path, 2)


def test_a_rank_that_fails_takes_the_others_with_it(tmp_path: Path) -> None:
    failing = Run("topk", settings(tmp_path), at_step={3: partial(fail_on, 1)})
    processes = start(2, [failing], tmp_path)
    ends = finish(processes, tmp_path)
    assert (ends[1][0].error or "") == "RuntimeError: out of memory, say"
    assert (ends[0][0].error or "").startswith("LostRankError")
    (checkpoint,) = checkpoints(tmp_path)
    assert read_manifest(checkpoint)["n_training_steps"] == 3


def test_rank_0_alone_writes_and_prints(tmp_path: Path) -> None:
    run = Run(
        "topk", settings(tmp_path, checkpoint_every_minutes=1e-9, keep_checkpoints=3, resume_from_checkpoint=None)
    )
    alone = launch(1, [Run("topk", settings(tmp_path / "alone", resume_from_checkpoint=None))], tmp_path / "alone")[0][
        0
    ]
    for (end,) in launch(2, [run], tmp_path):
        assert end.error is None, logs(tmp_path)
        assert difference(alone.weights, end.weights) < 1e-6  # the SAE that run() returns, folded, on every rank
    assert logs(tmp_path)["log1"].strip() == ""
    text = logs(tmp_path)["log0"]
    assert text.count("Trained a topk SAE") == 1
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "alone/out").iterdir())
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((tmp_path / "alone/out/metrics.jsonl").read_text().splitlines())
    assert len(checkpoints(tmp_path)) == 3
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1  # one folder, by the name that rank 0 drew


def test_what_ranks_cannot_do_is_refused_on_all_of_them(tmp_path: Path) -> None:
    """One launch, since a refusal leaves the ranks together; each refusal is before anything is loaded."""
    cases: dict[str, Run] = {
        "one step of 10 sequences, which do not divide by 4 ranks. Nearest usable: 64 or 96.": Run(
            settings={"train_batch_size_tokens": 80}
        ),
        "lr: 0.001 on rank(s) 0, 1, 2, 0.5 on rank(s) 3": Run(settings=SETTINGS, per_rank={3: {"lr": 0.5}}),
        "objective.mse: 0.0 on rank(s) 0, 2, 3": Run(
            settings=SETTINGS, per_rank={1: {"objective": Objective(mse=0.5)}}
        ),
        "compile_sae=True is refused with 4 ranks": Run(settings={**SETTINGS, "compile_sae": True}),
        "drew another batch than rank 0": Run(settings=SETTINGS, shuffled_by_rank=True),
        "device='cuda' cannot be used here": Run(settings={**SETTINGS, "device": "cuda"}),
    }
    ends = launch(4, list(cases.values()), tmp_path)
    for index, text in enumerate(cases):
        for rank, each in enumerate(ends):
            assert text in (each[index].error or ""), (rank, each[index].error)


@pytest.mark.slow
def test_torchrun_and_a_command_for_one_process() -> None:
    """Refused, and said once."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    sweep = [*torchrun, "-m", "e2e_sae_plugin", "sweep", "--config", "none.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(sweep, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert refused.stderr.count("torchrun has started 2 processes of it. Start it once; each GPU") == 1


@pytest.mark.parametrize("name", ["device", "llm_device"])
def test_devices_that_are_not_there_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = cast(Ranks, SimpleNamespace(size=4, local_size=4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = runner_config()
    setattr(config, name, "cuda")
    with pytest.raises(ValueError, match=r"4 ranks were started on this machine, which has 2 GPU\(s\)"):
        check_ranks(config, ranks)
    setattr(config, name, "cuda:1")
    with pytest.raises(ValueError, match=rf"{name}='cuda:1' names one GPU for all 4 ranks"):
        check_ranks(config, ranks)
