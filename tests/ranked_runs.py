"""Runs of the tiny model on several gloo processes, and what each of them has at the end.

The processes are forked from a server that has imported everything. One launch does a list of runs, one after the other.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from helpers import parameters_of, runner_config, tiny_hooked_transformer, token_dataset, training_sae
from time_limits import hang_seconds
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from e2e_sae_plugin import E2ESAETrainer, E2ESAETrainingRunner
from e2e_sae_plugin.distributed import join

# The server imports this module by name, and before Python 3.13 it does not get the path of who starts it.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).strip(
    os.pathsep
)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ranked_runs"])
STORES: list[TCPStore] = []


@dataclasses.dataclass
class Run:
    """One run. `settings` are those of `runner_config`; a value that is a list of one per rank is the rank's own."""

    architecture: str = "standard"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    per_rank: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Settings of single ranks that differ."""
    perturbed: bool = True
    """Start from an SAE with every parameter moved off its initial value."""
    at_step: dict[int, Callable[[int], None]] = dataclasses.field(default_factory=dict)
    """Called before a step with the rank."""
    excluded: list[int] | None = None
    shuffled_by_rank: bool = False


@dataclasses.dataclass
class End:
    """What a process has at the end of a run."""

    weights: dict[str, Tensor]
    statistics: dict[str, Tensor]
    metrics: list[dict[str, float]]
    error: str | None = None
    status: int | None = None
    n_trained: int = 0
    """Numbers that the optimizer moves on this process."""
    n_moments: int = 0
    """Numbers that it keeps for them, counts of steps apart."""


class _Runner(E2ESAETrainingRunner):
    """Keeps its trainer, and what it logs on every rank."""

    trainer: E2ESAETrainer
    at_step: dict[int, Callable[[int], None]]

    def _build_trainer(self) -> E2ESAETrainer:
        self.trainer = super()._build_trainer()
        step = self.trainer.step

        def watched(batch: Tensor) -> Any:
            action = self.at_step.get(self.trainer.n_training_steps)
            if action is not None:
                action(0 if self.ranks is None else self.ranks.rank)
            return step(batch)

        self.trainer.step = watched  # pyright: ignore[reportAttributeAccessIssue]
        self.logged: list[dict[str, float]] = []
        log = self.trainer.metrics_log.log

        def noted(metrics: dict[str, Any], step: int, n_training_samples: int) -> None:
            self.logged.append({k: float(v) for k, v in metrics.items() if isinstance(v, int | float)})
            log(metrics, step, n_training_samples)

        self.trainer.metrics_log.log = noted  # pyright: ignore[reportAttributeAccessIssue]
        return self.trainer


def do(run: Run) -> End:
    """The run, on this process; errors become part of what it ends with."""
    rank = int(os.environ.get("RANK", "0"))
    runner: _Runner | None = None
    error, status = None, None
    try:
        join()  # as the command line does, so that other ranks do not repeat what SAELens's config logs
        config = runner_config(run.architecture, **{**run.settings, **run.per_rank.get(rank, {})})
        dataset = token_dataset(seed=rank if run.shuffled_by_rank else 0)
        if run.excluded is not None:
            config.exclude_special_tokens = run.excluded
        sae = training_sae(config) if run.perturbed else None
        runner = _Runner(config, override_model=tiny_hooked_transformer(), override_dataset=dataset, override_sae=sae)
        runner.at_step = run.at_step
        runner.run()
    except SystemExit as end:
        status = int(end.code or 0)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    trainer = getattr(runner, "trainer", None)
    statistics = {} if trainer is None else {
        "act_freq_scores": trainer.act_freq_scores,
        "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired,
        "counts": torch.tensor([trainer.n_frac_active_samples, trainer.n_training_steps, trainer.n_training_samples]),
    }  # fmt: skip
    return End(
        {} if trainer is None else parameters_of(trainer.sae),
        statistics,
        [] if trainer is None else runner.logged,  # pyright: ignore[reportOptionalMemberAccess]
        error,
        status,
        0 if trainer is None else sum(p.numel() for p in trainer.trained_parameters().values()),
        0 if trainer is None else _n_moments(trainer),
    )


def _n_moments(trainer: E2ESAETrainer) -> int:
    return sum(value.numel() for state in trainer.optimizer.state.values() for value in state.values() if value.ndim)


def _main(environment: dict[str, str], runs: list[Run], folder: Path, limit: float) -> None:
    os.environ.update(environment)
    rank = environment.get("RANK", "0")
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(0.9 * limit, file=os.fdopen(log, "w"))  # says where it hangs, see `finish`
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    warnings.simplefilter("ignore")
    try:
        ends = [do(run) for run in runs]
    except BaseException:
        traceback.print_exc()
        raise
    torch.save(ends, folder / f"ends{rank}.pt")


def start(size: int, runs: list[Run], folder: Path) -> list[BaseProcess]:
    """`size` processes, as torchrun starts them; one has no environment of a launch."""
    folder.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)  # as torchrun's agent does, it outlives the ranks
    launch = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    processes: list[BaseProcess] = []
    for rank in range(size):
        environment = {**launch, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        process = PROCESSES.Process(target=_main, args=(environment, runs, folder, hang_seconds()))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[BaseProcess], folder: Path) -> list[list[End]]:
    """Of every rank, the ends of its runs; [] of one that did not come to its end."""
    for process in processes:
        process.join(hang_seconds())
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} ranks hang: {logs(folder)}"
    files = [folder / f"ends{rank}.pt" for rank in range(len(processes))]
    return [torch.load(file, weights_only=False) if file.exists() else [] for file in files]


def launch(size: int, runs: list[Run], folder: Path) -> list[list[End]]:
    return finish(start(size, runs, folder), folder)


def logs(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("log*"))}


def signal_to(which: int, number: int, rank: int) -> None:
    """For `Run.at_step`: rank `which` sends itself a signal."""
    if rank == which:
        os.kill(os.getpid(), number)


def fail_on(which: int, rank: int) -> None:
    """For `Run.at_step`: rank `which` raises an error of its own."""
    if rank == which:
        raise RuntimeError("out of memory, say")
