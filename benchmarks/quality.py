"""Time to quality: how long until an SAE on the bundled model costs no more than what `e2e-sae` reaches with its own recipe.

    python benchmarks/quality.py [--seeds 0 1 2] [--threads 1] [--only ours-200 e2e-sae] [--json FILE]
    python benchmarks/quality.py --search        # the recipes that were tried, each once
    python benchmarks/quality.py --tiny          # tries the script, measures nothing useful

Each run has a process of its own. What is finished is kept in `--output`: interrupted, run the same command again. Times are
comparable only if all were measured on the same idle machine: `--output` a new folder for that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from quality_recipes import CONTESTANTS, PEER, PEER_TUNED, SEARCH, SEARCH_SEED, Recipe

L0, L0_TOLERANCE = 40.0, 0.05
TINY_TOKENS = 20_480
RESULT, SAE_FOLDER = "result.json", "sae"

Results = dict[str, dict[int, dict[str, Any]]]
"""By name of the contestant, then by seed: what `quality_runs.run` found."""


def folder_of(output: Path, name: str, seed: int) -> Path:
    """Of one run."""
    return output / f"{re.sub(r'[^a-zA-Z0-9.]+', '-', name)}-seed{seed}"


def run_in_child(recipe: Recipe, seed: int, output: Path, threads: int) -> dict[str, Any]:
    """One run in a process of its own, unless its result is there already.

    Raises:
        SystemExit: the run failed.
    """
    folder = folder_of(output, recipe.name, seed)
    asked = {"library": recipe.library, "settings": recipe.settings, "seed": seed, "threads": threads}
    file = folder / RESULT
    if file.is_file() and (kept := json.loads(file.read_text()))["asked"] == asked:
        return kept["found"]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--child", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, env=environment, input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{folder.name} failed with exit status {done.returncode}.\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"asked": asked, "found": found}, indent=1) + "\n")
    part.replace(file)  # whole or not there
    print(row(folder.name, recipe, found), file=sys.stderr, flush=True)
    return found


def child(folder: Path) -> None:
    """The run that standard input asks for; its result is the last line of standard output."""
    import torch
    from quality_runs import run

    asked = json.loads(sys.stdin.read())
    torch.set_num_threads(asked["threads"])
    print(json.dumps(run(asked["library"], asked["settings"], asked["seed"], folder / SAE_FOLDER)))


def row(name: str, recipe: Recipe, found: dict[str, Any]) -> str:
    """One run as a line of a Markdown table (`RUN_HEADER`)."""
    return (
        f"| {name} | {recipe.tokens:,} | {found['seconds']:.1f} | {found['cpu_seconds']:.1f} "
        f"| {found['ce_loss_increase']:+.4f} | {found['l0']:.1f} | {found['n_alive']} |"
    )


RUN_HEADER = "| run | tokens | seconds | processor time | CE loss increase | L0 | alive |\n| --- |" + " ---: |" * 6


def reached(ours: dict[str, Any], peer: dict[str, Any]) -> bool:
    """Whether a run of ours, at the L0 that is asked for, costs no more than the peer's of the same seed, at that or more:
    further features can only be in the peer's favour."""
    at_l0 = abs(ours["l0"] - L0) <= L0_TOLERANCE * L0 and peer["l0"] >= (1 - L0_TOLERANCE) * L0
    return at_l0 and ours["ce_loss_increase"] <= peer["ce_loss_increase"]


def comparison(results: Results, peer: str) -> list[str]:
    """Each recipe of ours against one of the peer's: the share of its time, by seed and on average."""
    lines = [
        f"| share of the time of {peer} | by seed | mean | processor time, mean | reached |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for name, runs in results.items():
        seeds = sorted(set(runs) & set(results.get(peer, {})))
        if CONTESTANTS[name].library != "ours" or not seeds:
            continue
        shares, cpu_shares = (
            [runs[seed][key] / results[peer][seed][key] for seed in seeds] for key in ("seconds", "cpu_seconds")
        )
        n_reached = sum(reached(runs[seed], results[peer][seed]) for seed in seeds)
        lines.append(
            f"| {name} | {', '.join(f'{share:.3f}' for share in shares)} | **{mean(shares):.3f}** "
            f"| {mean(cpu_shares):.3f} | {n_reached} of {len(seeds)} |"
        )
    return lines


def prices(results: Results, output: Path) -> list[str]:
    """Beside the time: what the SAEs do to later layers, how far seeds agree, how many features live."""
    import itertools

    import torch
    from quality_runs import held_out_tokens
    from sae_lens import SAE

    from e2e_sae_plugin.demo import load_demo_model
    from e2e_sae_plugin.demo.run import quiet_host
    from e2e_sae_plugin.evaluation import evaluate_many
    from e2e_sae_plugin.evaluation.geometry import CosineSummary, nearest_cosines

    lines: list[str] = []
    model, tokens = load_demo_model(), held_out_tokens()
    for name, runs in results.items():
        with quiet_host():
            saes = {str(s): SAE.load_from_disk(str(folder_of(output, name, s) / SAE_FOLDER)) for s in runs}
            found = list(evaluate_many(saes, model, tokens, ablations=False).values())
        alive = [sae.W_dec[each.alive] for sae, each in zip(saes.values(), found, strict=True)]
        pairs = [nearest_cosines(a, b).cosine for a, b in itertools.permutations(alive, 2)]
        across = CosineSummary.of(torch.cat(pairs)).mean if pairs else None
        layers = list(found[0].downstream_mse())
        if not lines:
            header = [*(f"MSE at {hook.removesuffix('.hook_resid_pre')}" for hook in layers), "MSE at the SAE"]
            header += ["KL", "alive features", "mean cosine across seeds"]
            lines = ["| | CE loss increase | " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * len(header)]
        increase = [each.metrics["ce_loss_increase"] for each in found]
        cells = ["; ".join(f"{e.value:+.4f} [{e.low:.4f}, {e.high:.4f}]" for e in increase if e is not None)]
        cells += [f"{mean(each.downstream_mse()[hook].value for each in found):,.0f}" for hook in layers]
        cells += [f"{mean(each.value('mse') for each in found):,.0f}", f"{mean(e.value('kl') for e in found):.4f}"]
        cells += [f"{mean(each.n_alive for each in found):.0f}", "" if across is None else str(across)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each run (default 1: small matrices gain little)")
    parser.add_argument("--at-once", type=int, default=1, help="runs at once, on as many cores (default %(default)s)")
    parser.add_argument(
        "--peer-tokens",
        type=int,
        default=2_000_000,
        help="of each run of e2e-sae (%(default)s); its sparsity coefficients give an L0 of 40 with the default alone",
    )
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--search", action="store_true", help="instead, the recipes that were tried")
    parser.add_argument("--output", type=Path, default=Path("output/quality"), help="default %(default)s")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--tiny", action="store_true", help="very short runs: tries the script")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def as_asked(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """With the numbers of tokens that the arguments ask for."""
    if args.tiny:
        return recipe.with_tokens(min(recipe.tokens, TINY_TOKENS))
    return recipe if recipe.library == "ours" else recipe.with_tokens(args.peer_tokens)


def search(args: argparse.Namespace) -> None:
    """Print what each recipe of `SEARCH` reaches, and in what time."""
    print(RUN_HEADER)
    for recipe in (as_asked(recipe, args) for recipe in SEARCH):
        print(row(recipe.name, recipe, run_in_child(recipe, SEARCH_SEED, args.output, args.threads)), flush=True)


def compare(args: argparse.Namespace) -> None:
    """Run the contestants seed by seed, so that what else the machine does is alike for all, and print the tables."""
    recipes = {name: as_asked(recipe, args) for name, recipe in CONTESTANTS.items()}
    results: Results = {name: {} for name in recipes if name in args.only}
    with ThreadPoolExecutor(args.at_once) as pool:
        runs = [(name, seed) for seed in args.seeds for name in results]
        found = pool.map(lambda run: run_in_child(recipes[run[0]], run[1], args.output, args.threads), runs)
        for (name, seed), what in zip(runs, found, strict=True):
            results[name][seed] = what
    print(f"Threads for each run: {args.threads}; runs at once: {args.at_once}\n")
    print(RUN_HEADER)
    for name, runs in results.items():
        for seed, found in runs.items():
            print(row(f"{name}, seed {seed}", recipes[name], found))
    for peer in (PEER, PEER_TUNED):
        if peer.name in results:
            print("\n" + "\n".join(comparison(results, peer.name)))
    table = prices(results, args.output)
    print("\n" + "\n".join(table))
    if args.json:
        settings = {name: recipes[name].settings for name in results}
        args.json.write_text(
            json.dumps({"threads": args.threads, "settings": settings, "runs": results, "prices": table}, indent=1)
            + "\n"
        )


def main() -> None:
    args = parse_args()
    if args.child:
        child(args.child)
    elif args.search:
        search(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
