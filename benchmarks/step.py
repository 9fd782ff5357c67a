"""Speed and memory of one end-to-end training step: this package, `e2e-sae` and `eai-sparsify`.

    python benchmarks/step.py [--steps 3] [--d-sae-multiples 60 8] [--only ours-relu e2e-sae] [--json FILE]

Each contestant runs in a process of its own, so that its peak memory is its own. `--tiny` tries the script itself.
"""

from __future__ import annotations

# Nothing heavy may be imported here: on Linux a child's peak memory starts at what its parent holds when it is started.
import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from shape import GPT2_SMALL, TINY, Shape, model_flop_per_token, sae_flop_per_token


@dataclass(frozen=True)
class Contestant:
    name: str
    architecture: str
    peer: str | None = None
    """Who it is compared with."""


CONTESTANTS = (
    Contestant("ours-relu", "relu", "e2e-sae"),
    Contestant("e2e-sae", "relu"),
    Contestant("ours-relu-sparse", "relu-sparse", "e2e-sae-sparse"),
    Contestant("e2e-sae-sparse", "relu-sparse"),
    Contestant("ours-topk", "topk", "eai-sparsify"),
    Contestant("eai-sparsify", "topk"),
)
MATMUL_SIZE = 2048


@dataclass
class Measurement:
    """What one contestant's process reports."""

    seconds: list[float]
    """Of each step after the warm-up."""
    cpu_seconds: list[float]
    """The same in processor time of all threads: what to compare where other programs take their share."""
    peak_rss_bytes: int
    gflop_per_second: float
    """Of a dense fp32 matrix product, right after the steps."""


def measure(name: str, shape: Shape, d_sae: int, steps: int, threads: int) -> Measurement:
    """Runs in the contestant's own process."""
    import resource

    import torch
    from contestants import CONTESTANTS as RUNS

    torch.set_num_threads(threads)
    _, *times = RUNS[name](shape, d_sae, steps + 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds, cpu_seconds = ([step[i] for step in times] for i in (0, 1))
    return Measurement(seconds, cpu_seconds, peak, matmul_speed())


def matmul_speed(repeats: int = 12) -> float:
    """GFLOP/s of a square fp32 matrix product, the best of a few."""
    import torch

    left, right = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    out = torch.empty_like(left)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / best / 1e9


def measure_in_child(name: str, d_sae: int, args: argparse.Namespace) -> Measurement | None:
    """None where the contestant failed: its library is not installed, or there is not enough memory."""
    command = [sys.executable, __file__, "--child", name, "--child-d-sae", str(d_sae)]
    command += ["--steps", str(args.steps), "--threads", str(args.threads), *(["--tiny"] if args.tiny else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        error = result.stderr[max(result.stderr.rfind("Traceback"), 0) :][:3000]
        print(f"{name} at d_sae {d_sae:,} failed with exit status {result.returncode}.\n{error}", file=sys.stderr)
        return None
    measurement = Measurement(**json.loads(result.stdout.splitlines()[-1]))
    steps = ", ".join(
        f"{wall:.1f} ({cpu:.1f})" for wall, cpu in zip(measurement.seconds, measurement.cpu_seconds, strict=True)
    )
    print(f"{name} at d_sae {d_sae:,}: steps of {steps} s (processor time)", file=sys.stderr, flush=True)
    return measurement


def to_row(contestant: Contestant, shape: Shape, d_sae: int, measurement: Measurement, gflop: float) -> dict[str, Any]:
    flop = model_flop_per_token(shape) + sae_flop_per_token(shape, d_sae, contestant.architecture)
    tokens_per_second = shape.tokens_per_step / median(measurement.seconds)
    floor = gflop * 1e9 / flop
    return {
        "contestant": contestant.name,
        "d_sae": d_sae,
        "tokens_per_second": tokens_per_second,
        "peak_rss_gb": measurement.peak_rss_bytes / 1e9,
        "floor_mflop_per_token": flop / 1e6,
        "floor_tokens_per_second": floor,
        "share_of_floor": tokens_per_second / floor,
        **asdict(measurement),
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Speed and memory relative to the peer at the same dictionary size, where both ran."""
    by_key = {(row["contestant"], row["d_sae"]): row for row in rows}
    for contestant in CONTESTANTS:
        for row in rows:
            peer = by_key.get((contestant.peer, row["d_sae"]))
            if row["contestant"] == contestant.name and peer is not None:
                row["speed_ratio"] = row["tokens_per_second"] / peer["tokens_per_second"]
                row["cpu_time_ratio"] = median(peer["cpu_seconds"]) / median(row["cpu_seconds"])
                row["memory_ratio"] = row["peak_rss_gb"] / peer["peak_rss_gb"]
                peers = [by_key.get((name, row["d_sae"])) for name in {c.peer for c in CONTESTANTS}]
                leanest = min(other["peak_rss_gb"] for other in peers if other is not None)
                row["memory_ratio_to_leanest"] = row["peak_rss_gb"] / leanest


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        "| contestant | d_sae | tokens/s | x peer | x peer, CPU | peak GB | x peer | x leanest | floor | share |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ratios = ("speed_ratio", "cpu_time_ratio", "memory_ratio", "memory_ratio_to_leanest")
        speed, cpu, memory, leanest = (f"{row[key]:.2f}" if key in row else "" for key in ratios)
        lines.append(
            f"| {row['contestant']} | {row['d_sae']:,} | {row['tokens_per_second']:.0f} | {speed} | {cpu} "
            f"| {row['peak_rss_gb']:.2f} | {memory} | {leanest} | {row['floor_tokens_per_second']:.0f} "
            f"| {row['share_of_floor']:.0%} |"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [contestant.name for contestant in CONTESTANTS]
    parser.add_argument("--steps", type=int, default=3, help="timed steps after one warm-up; their median counts")
    parser.add_argument("--d-sae-multiples", type=int, nargs="+", default=[60, 8], help="d_sae as multiples of d_model")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these contestants only")
    parser.add_argument("--threads", type=int, default=2, help="threads of each contestant")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--tiny", action="store_true", help="a small model: tries the script, measures nothing useful")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--child-d-sae", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    shape = TINY if args.tiny else GPT2_SMALL
    if args.child:
        print(json.dumps(asdict(measure(args.child, shape, args.child_d_sae, args.steps, args.threads))))
        return
    measured: list[tuple[Contestant, int, Measurement]] = []
    for multiple in args.d_sae_multiples:
        d_sae = multiple * shape.d_model
        for contestant in CONTESTANTS:
            if contestant.name in args.only:
                measurement = measure_in_child(contestant.name, d_sae, args)
                if measurement is not None:
                    measured.append((contestant, d_sae, measurement))
    if not measured:
        sys.exit("No contestant ran.")
    gflop = median(measurement.gflop_per_second for _, _, measurement in measured)
    rows = [to_row(contestant, shape, d_sae, measurement, gflop) for contestant, d_sae, measurement in measured]
    add_ratios(rows)
    print(
        f"{args.threads} threads, fp32, {gflop:.0f} GFLOP/s, {shape.tokens_per_step:,} tokens per step\n\n{table(rows)}"
    )
    if args.json:
        args.json.write_text(
            json.dumps({"gflop_per_second": gflop, "shape": asdict(shape), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
