"""How the cost of a training step grows, beside what the model of cost (`e2e_sae_plugin.cost`) predicts.

    python benchmarks/scaling.py [--only dictionary context] [--quick] [--json FILE] [--out FOLDER] [--docs FILE]

One size at a time is changed, from a base of six blocks of width 256. Each point runs in a process of its own, so that its
peak memory is its own. One number is fitted, on the base point alone: the machine's speed. `--docs` puts the tables where
the file says `<!-- scaling NAME -->`.
"""

from __future__ import annotations

# Nothing heavy may be imported here: on Linux a child's peak memory starts at what its parent holds when it is started.
import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Point:
    """A GPT-2 with an SAE on `blocks.<layer>.hook_resid_pre`, and one optimizer step of it."""

    d_sae: int = 4096
    context_size: int = 128
    vocabulary: int = 8192
    layer: int = 3
    n_saes: int = 1
    """SAEs at the same place that share the clean pass, as in a sweep."""
    n_layers: int = 6
    d_model: int = 256
    n_heads: int = 4
    tokens_per_step: int = 2048
    micro_batch_tokens: int = 1024


@dataclass(frozen=True)
class Axis:
    """What is changed, and to what."""

    field: str
    label: str
    values: tuple[int, ...]
    is_log: bool = True


AXES = {
    "dictionary": Axis("d_sae", "features of the dictionary", (1024, 4096, 16384, 65536)),
    "context": Axis("context_size", "tokens of context", (32, 128, 512, 1024)),
    "vocabulary": Axis("vocabulary", "tokens of vocabulary", (2048, 8192, 32768, 131072)),
    "layer": Axis("layer", "block that the SAE's hook enters", (0, 2, 3, 5), is_log=False),
    "saes": Axis("n_saes", "SAEs on one clean pass", (1, 4, 12)),
}
BASE = Point()
QUICK = Point(256, 16, 512, 1, n_layers=2, d_model=32, n_heads=2, tokens_per_step=64, micro_batch_tokens=32)
QUICK_VALUES = {
    "d_sae": (256, 512),
    "context_size": (16, 32),
    "vocabulary": (512, 1024),
    "layer": (0, 1),
    "n_saes": (1, 2),
}


# In the point's own process.


def measure(point: Point, steps: int, threads: int) -> dict[str, Any]:
    """Time and peak memory of one point, and what is predicted of it."""
    import torch

    from e2e_sae_plugin.cost.flops import step_flops, total_flops
    from e2e_sae_plugin.cost.measure import peak_memory
    from e2e_sae_plugin.cost.memory import saved_by_spliced_pass, step_memory
    from e2e_sae_plugin.cost.workload import workload_of

    torch.set_num_threads(threads)
    all_parts = build(point)
    parts = all_parts[0]
    work = workload_of(parts.cfg, parts.spliced, parts.sae)
    memory = step_memory(work, saved_by_spliced_pass(parts.spliced, point.context_size))
    # Every further SAE adds what it keeps between steps; and a sweep holds what the clean pass gave of a whole step.
    kept = memory.parts["SAE weights"] + memory.parts["optimizer state"]
    clean = memory.parts["clean activations"] * (work.step_prompts // work.sae_prompts - 1) if point.n_saes > 1 else 0
    times = timed_steps(all_parts, steps)
    return {
        "seconds": [wall for wall, _ in times],
        "cpu_seconds": [cpu for _, cpu in times],
        "peak_bytes": peak_memory(),
        "flops_per_token": point.n_saes * total_flops(step_flops(work), sharing=point.n_saes),
        "predicted_peak_bytes": memory.peak_bytes + (point.n_saes - 1) * kept + clean,
        "flops_by_part": step_flops(work),
        "memory_by_part": memory.parts,
        "memory_by_phase": memory.phases,
    }


def build(point: Point) -> list[Any]:
    """The parts of each of the point's SAEs; the model is the same."""
    from sae_lens import LoggingConfig, StandardTrainingSAEConfig
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from e2e_sae_plugin import E2ESAERunnerConfig, splice_into
    from e2e_sae_plugin.build import build_sae
    from e2e_sae_plugin.cost.measure import RunParts

    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=point.n_layers,
            d_model=point.d_model,
            n_heads=point.n_heads,
            d_head=point.d_model // point.n_heads,
            d_mlp=4 * point.d_model,
            d_vocab=point.vocabulary,
            n_ctx=max(point.context_size, 128),
            act_fn="gelu_new",
            normalization_type="LN",
            device="cpu",
            seed=0,
        )
    )
    hook_name = f"blocks.{point.layer}.hook_resid_pre"
    sae_cfg = StandardTrainingSAEConfig(
        d_in=point.d_model, d_sae=point.d_sae, l1_coefficient=1e-3, apply_b_dec_to_input=False, decoder_init_norm=1.0
    )
    parts: list[Any] = []
    for seed in range(point.n_saes):
        cfg: Any = E2ESAERunnerConfig(
            sae=sae_cfg,
            hook_name=hook_name,
            context_size=point.context_size,
            train_batch_size_tokens=point.tokens_per_step,
            store_batch_size_prompts=point.micro_batch_tokens // point.context_size,
            training_tokens=1000 * point.tokens_per_step,
            lr=1e-4,
            seed=seed,
            checkpoint_path=None,
            logger=LoggingConfig(log_to_wandb=False),
            verbose=False,
        )
        spliced = splice_into(model, hook_name, needs_downstream=False)
        spliced.check()
        parts.append(RunParts(cfg, spliced, build_sae(cfg)))
    return parts


def timed_steps(all_parts: list[Any], steps: int) -> list[tuple[float, float]]:
    """Wall-clock and processor seconds of each step of all the SAEs, after one untimed step; several SAEs on one clean
    pass, as `e2e-sae sweep` runs them."""
    import time
    from contextlib import nullcontext

    import torch

    from e2e_sae_plugin import E2ESAETrainer
    from e2e_sae_plugin.metrics_log import MetricsLog
    from e2e_sae_plugin.splice.shared import SharedCleanPasses

    shared = SharedCleanPasses([p.spliced for p in all_parts], hidden=True) if len(all_parts) > 1 else None
    log = MetricsLog(None, to_wandb=False)
    trainers = [E2ESAETrainer(parts.cfg, parts.sae, parts.spliced, iter([]), log) for parts in all_parts]
    cfg = all_parts[0].cfg
    times: list[tuple[float, float]] = []
    for _ in range(steps + 1):
        tokens = torch.randint(all_parts[0].spliced.vocabulary, (cfg.step_size_prompts, cfg.context_size))
        start = time.perf_counter(), time.process_time()
        with nullcontext() if shared is None else shared.over(tokens):
            for trainer in trainers:
                trainer.step(tokens)
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return times[1:]


# In the parent.


def measure_in_child(point: Point, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(asdict(point))]
    command += ["--steps", str(args.steps), "--threads", str(args.threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{point} failed with exit status {result.returncode}.\n{result.stderr[-3000:]}")
    row = json.loads(result.stdout.splitlines()[-1])
    seconds = row["cpu_seconds" if args.cpu_time else "seconds"]
    row["ms_per_token"] = 1e3 * median(seconds) / point.tokens_per_step
    gigabytes = row["peak_bytes"] / 1e9
    print(f"{point}: {row['ms_per_token']:.3f} ms per token, {gigabytes:.2f} GB", file=sys.stderr, flush=True)
    return {"point": asdict(point), **row}


def predict(rows: list[dict[str, Any]], base: dict[str, Any]) -> None:
    """Adds the predicted times: the base point's speed, in FLOP/s, holds everywhere."""
    speed = base["flops_per_token"] / base["ms_per_token"]
    for row in rows:
        row["predicted_ms_per_token"] = row["flops_per_token"] / speed


def table_of(name: str, axis: Axis, rows: list[dict[str, Any]]) -> Any:
    from e2e_sae_plugin.report.table import Table

    columns = [axis.label, "MFLOP per token", "ms per token", "predicted", "peak GB", "predicted GB"]
    cells: list[tuple[Any, ...]] = []
    for row in rows:
        cells.append(
            (
                row["point"][axis.field],
                row["flops_per_token"] / 1e6,
                row["ms_per_token"],
                row["predicted_ms_per_token"],
                row["peak_bytes"] / 1e9,
                row["predicted_peak_bytes"] / 1e9,
            )
        )
    formats = dict(zip(columns[1:], ("{:,.1f}", "{:.3f}", "{:.3f}", "{:.2f}", "{:.2f}"), strict=True))
    if name == "saes":  # the same SAEs in runs of their own cost the first row's time each
        one = rows[0]
        columns.append("times faster than runs of their own")
        columns.append("predicted factor")
        cells = [
            (
                *cell,
                row["point"]["n_saes"] * one["ms_per_token"] / row["ms_per_token"],
                row["point"]["n_saes"] * one["predicted_ms_per_token"] / row["predicted_ms_per_token"],
            )
            for cell, row in zip(cells, rows, strict=True)
        ]
        formats |= {columns[-2]: "{:.2f}", columns[-1]: "{:.2f}"}
    return Table(f"scaling_{name}", "", "", tuple(columns), tuple(cells), formats)


def charts_of(name: str, axis: Axis, rows: list[dict[str, Any]]) -> list[Any]:
    from e2e_sae_plugin.report.chart import Chart, Series

    x = tuple(float(row["point"][axis.field]) for row in rows)
    charts: list[Any] = []
    for what, title, measured, predicted, label, scale in (
        ("time", "Time", "ms_per_token", "predicted_ms_per_token", "ms per token", 1.0),
        ("memory", "Peak memory", "peak_bytes", "predicted_peak_bytes", "peak GB of the process", 1e9),
    ):
        ys = [tuple(row[key] / scale for row in rows) for key in (measured, predicted)]
        series = (Series("measured", x, ys[0], style="solid"), Series("predicted", x, ys[1], style="dashed"))
        charts.append(
            Chart(
                name=f"scaling_{name}_{what}",
                title=f"{title} against {axis.label}",
                caption="",
                x_label=axis.label,
                y_label=label,
                kind="lines",
                series=series,
                x_log=axis.is_log,
                y_log=what == "time" and axis.is_log,
            )
        )
    return charts


def write(name: str, axis: Axis, rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Draws one axis into `--out`, and returns its part of the documentation."""
    from e2e_sae_plugin.report.matplotlib_charts import save_figure

    charts = charts_of(name, axis, rows)
    for chart in charts:
        save_figure(chart, args.out)
    images = "\n".join(f"![{chart.title}](performance/{chart.name}.svg)" for chart in charts)
    return f"{table_of(name, axis, rows).to_markdown()}\n{images}"


def into_docs(fragments: dict[str, str], path: Path) -> None:
    """Puts each fragment between its two comments in a Markdown file."""
    text = path.read_text()
    for name, fragment in fragments.items():
        start, end = f"<!-- scaling {name} -->", f"<!-- end of scaling {name} -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"{path} has no place for the table: a line {start} and a line {end}.")
        text = pattern.sub(lambda _, whole=f"{start}\n{fragment}\n{end}": whole, text)
    path.write_text(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES), help="what is changed")
    parser.add_argument("--steps", type=int, default=3, help="timed steps after one warm-up; their median counts")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time, with --threads 1: where other programs run too"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model: tries the script, measures nothing useful")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--out", type=Path, help="folder of the plots (default docs/performance; none with --quick)")
    parser.add_argument("--docs", type=Path, help="Markdown file that the tables are put into")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time needs --threads 1: threads that wait for one another spend processor time too")
    if args.out is None and not args.quick:
        args.out = ROOT / "docs/performance"
    return args


def main() -> None:
    args = parse_args()
    if args.child:
        print(json.dumps(measure(Point(**json.loads(args.child)), args.steps, args.threads)))
        return
    base = QUICK if args.quick else BASE
    measured = {base: measure_in_child(base, args)}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in args.only:
        axis = AXES[name]
        rows[name] = []
        for value in QUICK_VALUES[axis.field] if args.quick else axis.values:
            point = replace(base, **{axis.field: value})
            if point not in measured:
                measured[point] = measure_in_child(point, args)
            rows[name].append(measured[point])
    predict(list(measured.values()), measured[base])
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    fragments = {name: table_of(name, AXES[name], rows[name]).to_markdown() for name in args.only}
    if args.out is not None:
        fragments = {name: write(name, AXES[name], rows[name], args) for name in args.only}
    if args.docs is not None:
        into_docs(fragments, args.docs)
    speed = measured[base]["flops_per_token"] / measured[base]["ms_per_token"] / 1e6
    clock = "processor" if args.cpu_time else "wall-clock"
    print(
        f"{args.threads} threads, fp32, {clock} time; {speed:.0f} GFLOP/s at the base point\n\n"
        + "\n\n".join(fragments.values())
    )


if __name__ == "__main__":
    main()
