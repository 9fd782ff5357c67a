"""What several processes send to each other per step, against 4 bytes x parameters x 2 (N - 1), and their speed.

    python benchmarks/ranks.py [--steps 12] [--repeats 3] [--d-sae 4096]

Trains on the bundled model: one process with 2 threads and 2 processes with 1 thread each, in turn, so that both meet
the same load of the machine; of each the fastest repeat counts. Bytes are those of the loopback interface (Linux). Also
prints how many tokens the stream alone gives per second, which every rank draws all of.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LoggingConfig, TopKTrainingSAEConfig

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner
from e2e_sae_plugin.demo import load_demo_model
from e2e_sae_plugin.demo.bundled import bundled_dataset
from e2e_sae_plugin.demo.corpus import stdlib_texts

WARM_UP_STEPS = 3


def runner(d_sae: int, steps: int, dataset: Any) -> E2ESAETrainingRunner:
    """A run of 4,096 tokens a step on the bundled model."""
    config = E2ESAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=128, d_sae=d_sae, k=16),
        model_name="e2e-sae-demo",
        hook_name="blocks.3.hook_resid_pre",
        dataset_path="e2e-sae-demo",
        context_size=128,
        train_batch_size_tokens=4096,
        store_batch_size_prompts=16,
        training_tokens=4096 * (steps + WARM_UP_STEPS),
        lr=1e-3,
        n_eval_batches=0,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=10**6),
        verbose=False,
    )
    return E2ESAETrainingRunner(config, override_model=load_demo_model(), override_dataset=dataset)


def loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def worker(args: argparse.Namespace) -> None:
    """One process of a launch: seconds and bytes per step, printed by rank 0."""
    torch.set_num_threads(args.threads)
    trainer = (run := runner(args.d_sae, args.steps, bundled_dataset("e2e-sae-demo", 128)))._build_trainer()
    trainer.begin()
    for _ in range(WARM_UP_STEPS):
        trainer.advance()
    bytes_before, seconds = loopback_bytes(), []
    for _ in range(args.steps):
        began = time.perf_counter()
        trainer.advance()
        seconds.append(time.perf_counter() - began)
    if run.leads:
        sent = (loopback_bytes() - bytes_before) / args.steps
        n_parameters = sum(p.numel() for p in trainer.trained_parameters().values())
        print("RESULT", json.dumps({"seconds": sorted(seconds)[len(seconds) // 2], "bytes": sent, "n": n_parameters}))


def launch(size: int, threads: int, args: argparse.Namespace) -> dict[str, float]:
    script = [__file__, "--worker", f"--threads={threads}", f"--steps={args.steps}", f"--d-sae={args.d_sae}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *torchrun, *script], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[len("RESULT ") :])


def stream_speed(name: str, dataset: Any, n_batches: int) -> None:
    tokens = runner(256, 1, dataset).tokens
    next(tokens)
    began = time.perf_counter()
    n_tokens = sum(next(tokens).numel() for _ in range(n_batches))
    print(f"{name:<34}{n_tokens / (time.perf_counter() - began):>12,.0f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    pairs = [(launch(1, 2, args), launch(2, 1, args)) for _ in range(args.repeats)]
    alone, two = (min(each, key=lambda result: result["seconds"]) for each in zip(*pairs, strict=True))
    predicted = 4 * alone["n"] * 2 * (2 - 1)
    print(
        f"{alone['n']:,} trained parameters, median of {args.steps} steps of 4,096 tokens, fastest of {args.repeats} repeats"
    )
    print(f"1 process,   2 threads            {alone['seconds'] * 1e3:8.0f} ms per step")
    print(f"2 processes, 1 thread each        {two['seconds'] * 1e3:8.0f} ms per step")
    print(f"throughput ratio                  {alone['seconds'] / two['seconds']:8.2f}")
    ratios = ", ".join(f"{a['seconds'] / b['seconds']:.2f}" for a, b in pairs)
    print(f"  of each repeat                  {ratios}")
    print(f"sent per step, predicted          {predicted / 2**20:8.2f} MiB")
    print(f"sent per step, measured           {two['bytes'] / 2**20:8.2f} MiB")
    torch.set_num_threads(1)
    stream_speed("stream, bundled tokens", bundled_dataset("e2e-sae-demo", 128), 50)
    texts = stdlib_texts("train")[:300]
    stream_speed("stream, text tokenised on the fly", Dataset.from_dict({"text": texts}), 30)


if __name__ == "__main__":
    main()
