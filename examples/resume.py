"""A run that is stopped in the middle and resumed ends with the weights of the run left alone, to the bit.

    python examples/resume.py [--tokens 30000]

Starts a run on the bundled model and sends it SIGTERM after some steps, as a cluster does that wants its machine back;
starts the same run again, and compares with a run that nobody stopped. `resume_from_checkpoint="auto"` is the one line
that a run needs for this. No network, no GPU; half a minute on two cores. Writes output/resume.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

from bundled import settings
from sae_lens import LoggingConfig
from safetensors.torch import load_file

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective, RunInterrupted

OUTPUT = Path("output/resume")


def train(name: str, tokens: int) -> None:
    """The whole script of a job that may be stopped and started again at any time."""
    cfg = settings(
        OUTPUT / name,
        tokens,
        objective=Objective.e2e_downstream(beta=1e-4),
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=5),
        overwrite_output=False,
        checkpoint_path=str(OUTPUT / f"{name}-checkpoints"),
        resume_from_checkpoint="auto",  # the newest whole checkpoint of this run, or a new run where there is none
    )
    E2ESAETrainingRunner(E2ESAERunnerConfig(**cfg)).run()


def terminate_after(lines: int, metrics: Path) -> None:
    """Send this process SIGTERM once a run has logged so many lines: what `kill` or a scheduler does from outside."""
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < lines:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=30_000, help="of each run (%(default)s)")
    args = parser.parse_args()

    shutil.rmtree(OUTPUT, ignore_errors=True)  # or the runs would be found finished
    metrics = {name: OUTPUT / name / "metrics.jsonl" for name in ("interrupted", "alone")}
    threading.Thread(target=terminate_after, args=(2, metrics["interrupted"]), daemon=True).start()
    try:
        train("interrupted", args.tokens)
    except RunInterrupted as stop:  # uncaught, the process would end with status 143
        n_done = int(Path(str(stop.checkpoint)).name)  # a checkpoint is called after its tokens
        print(f"\nStopped by signal {stop.signal_number} after {n_done:,} of {args.tokens:,} tokens.")
    else:
        raise SystemExit("The run was finished before the signal came: give it more --tokens.")

    train("interrupted", args.tokens)  # the same call again
    train("alone", args.tokens)
    first, second = (load_file(OUTPUT / name / "sae_weights.safetensors") for name in metrics)
    different = sum(int((first[key] != second[key]).sum()) for key in second)
    resumed, alone = ([json.loads(line) for line in path.read_text().splitlines()] for path in metrics.values())
    n_weights = sum(value.numel() for value in second.values())
    print(f"Resumed against left alone: {different} of {n_weights:,} weights differ;")
    print(f"the {len(alone)} lines of metrics.jsonl are {'the same' if resumed == alone else 'NOT the same'}.")
    raise SystemExit(0 if different == 0 and resumed == alone else 1)


if __name__ == "__main__":
    main()
