"""Training runs on the bundled model in processes of their own, which are killed at moments of all kinds.

The processes are forked from a server that has imported everything, so that dozens of them fit into minutes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from sae_lens import LoggingConfig, TopKTrainingSAEConfig
from time_limits import hang_seconds
from transformers.utils import logging as transformers_logging

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective
from e2e_sae_plugin.demo import load_demo_model
from e2e_sae_plugin.demo.corpus import stdlib_texts

STEPS, CONTEXT, PROMPTS = 12, 32, 4
LARGEST_BYTES = 100_000  # less than the SAE's 264 KB, more than a log
KEPT = ("sae_weights.safetensors", "sparsity.safetensors", "metrics.jsonl", "cfg.json")
# The server imports this module by name, and before Python 3.13 it does not get the path of who starts it.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).strip(
    os.pathsep
)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fault_runs"])


def prepare(folder: Path) -> None:
    """The data of all the runs: raw text, which has the most state."""
    texts = [text[:2000] for text in stdlib_texts("train")[:40]]
    Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "data"))


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "sae": TopKTrainingSAEConfig(d_in=128, d_sae=512, k=16, normalize_activations="expected_average_only_in"),
        "objective": Objective.e2e_downstream(1e-4),
        "model_name": "demo",
        "hook_name": "blocks.3.hook_resid_pre",
        "dataset_path": "the standard library",
        "context_size": CONTEXT,
        "training_tokens": STEPS * PROMPTS * CONTEXT,
        "train_batch_size_tokens": PROMPTS * CONTEXT,
        "store_batch_size_prompts": PROMPTS,
        "n_eval_batches": 1,
        "n_batches_for_norm_estimate": 2,
        "lr": 1e-3,
        "dead_feature_window": 3,
        "checkpoint_path": str(folder / "checkpoints"),
        "checkpoint_every_minutes": 1e-9,
        "resume_from_checkpoint": "auto",
        "save_final_checkpoint": True,
        "output_path": str(folder / "out"),
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=1, eval_every_n_wandb_logs=5),
        "verbose": False,
        **changes,
    }


@dataclass
class Fault:
    """What happens to a process, beside signals from outside: at which of its file operations, and what."""

    at_operation: int | None = None
    torn: bool = False
    """Cut the file that is being synced in half first."""
    action: str = "kill"
    """`kill`, or `full`: no file may grow beyond `LARGEST_BYTES` from then on."""


@dataclass
class Outcome:
    status: int
    seconds: float
    log: str = field(repr=False)


def train(data: Path, folder: Path, fault: Fault, changes: dict[str, Any]) -> None:
    """A whole run, or as much of it as the fault lets happen. Runs in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    torch.manual_seed(0)  # a run that is killed before its first checkpoint begins as the reference did
    random.seed(0)
    np.random.seed(0)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    _arm(fault, folder)
    config = E2ESAERunnerConfig(**settings(folder, **changes))
    dataset: Any = load_from_disk(str(data / "data"))
    runner = E2ESAETrainingRunner(config, override_model=load_demo_model(), override_dataset=dataset)
    (folder / "started").touch()
    runner.run()
    (folder / "operations").write_text(str(_operations))


_operations = 0


def _arm(fault: Fault, folder: Path) -> None:
    """Count the file operations of checkpoints and final saves, and act at the one that is asked for."""
    global _operations
    _operations = 0
    for name in ("fsync", "rename", "replace", "mkdir", "rmdir"):
        setattr(os, name, _counted(getattr(os, name), fault, folder))


def _counted(operation: Callable[..., Any], fault: Fault, folder: Path) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        global _operations
        _operations += 1
        if _operations == fault.at_operation:
            if fault.action == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_BYTES, resource.RLIM_INFINITY))
            else:
                if fault.torn and isinstance(args[0], int) and (size := os.fstat(args[0]).st_size):
                    path = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
                    if path.is_file():
                        os.truncate(path, size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        return operation(*args, **kwargs)

    return counted


def start(data: Path, folder: Path, fault: Fault | None = None, **changes: Any) -> BaseProcess:
    process = PROCESSES.Process(target=train, args=(data, folder, fault or Fault(), changes))
    process.start()
    return process


def join(process: BaseProcess) -> int:
    """Wait for the process to end, and return its exit code."""
    process.join(hang_seconds())
    status = process.exitcode
    if status is None:
        process.kill()
    assert status is not None, "the run hangs"
    return status


def finish(process: BaseProcess, folder: Path, began: float) -> Outcome:
    status = join(process)
    return Outcome(status, time.monotonic() - began, (folder / "log").read_text() if folder.exists() else "")


def run(data: Path, folder: Path, fault: Fault | None = None, **changes: Any) -> Outcome:
    began = time.monotonic()
    return finish(start(data, folder, fault, **changes), folder, began)


def run_until_signal(
    data: Path, folder: Path, numbers: list[int], moment: float, *, once_started: bool = True, gap: float = 0.0
) -> Outcome:
    """Send the signals `moment` seconds after the run's start (or after the process's), `gap` seconds apart."""
    (folder / "started").unlink(missing_ok=True)
    began = time.monotonic()
    process = start(data, folder)
    while once_started and not (folder / "started").exists() and process.is_alive():
        time.sleep(0.005)
    time.sleep(moment)
    for number in numbers:
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(process.pid, number)
            time.sleep(gap)
    return finish(process, folder, began)


def end_state(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves and that another one must leave too."""
    state: dict[str, Any] = {name: (folder / "out" / name).read_bytes() for name in KEPT}
    (final,) = (folder / "checkpoints").glob("*/final_*")
    for name in ("optimizer.safetensors", "trainer_state.safetensors"):
        state[f"final/{name}"] = (final / name).read_bytes()
    counts = json.loads((final / "trainer_state.json").read_text())
    state["final/state"] = {key: value for key, value in counts.items() if key != "metrics"}
    return state


def moments(seed: int, n: int, seconds: float) -> list[float]:
    generator = random.Random(seed)
    return [generator.uniform(0, seconds) for _ in range(n)]
