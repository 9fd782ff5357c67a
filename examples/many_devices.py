"""One run on several processes: each holds a replica, trains on its part of every batch, and the result is one process's.

    python examples/many_devices.py                                                # one process
    torchrun --standalone --nproc-per-node 2 examples/many_devices.py              # two, on the CPU (gloo)
    torchrun --standalone --nproc-per-node 4 examples/many_devices.py --device cuda    # four GPUs (NCCL)
    torchrun --standalone --nproc-per-node 2 examples/many_devices.py --shard      # each holds half of the dictionary

The script is the same for all: the runner finds torchrun's launch by itself. Where the run of one process is there, the
others say how far their weights are from its; each model and seed is the same, so what differs is the order of sums. No
network; a quarter of a minute on two cores. Writes output/many_devices/<number of processes>.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bundled import settings
from safetensors.torch import load_file

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective

OUTPUT = Path("output/many_devices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--tokens", type=int, default=10_240, help="(%(default)s)")
    parser.add_argument("--shard", action="store_true", help="divide the dictionary too: for what no device can hold")
    args = parser.parse_args()

    n = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
    output = OUTPUT / (f"{n}-sharded" if args.shard else str(n))
    cfg = settings(
        output,
        args.tokens,
        objective=Objective.e2e_downstream(beta=1e-4),
        device=args.device,
        shard_dictionary=args.shard,
        lr=1e-3,
        verbose=True,  # rank 0 alone says anything
    )
    runner = E2ESAETrainingRunner(E2ESAERunnerConfig(**cfg))
    runner.run()
    alone = OUTPUT / "1" / "sae_weights.safetensors"
    if runner.leads and n > 1 and alone.is_file():  # files of one's own are for one rank to read and write
        ours, theirs = load_file(output / alone.name), load_file(alone)
        for name, expected in theirs.items():
            error = float((ours[name] - expected).norm() / expected.norm())
            print(f"  {name}: relative difference from one process {error:.1e}")


if __name__ == "__main__":
    main()
