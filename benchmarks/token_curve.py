"""CE loss increase at an equal number of active features, against training tokens: local, e2e, e2e+ds, local then e2e.

    python benchmarks/token_curve.py --search --tokens 1200000            # the settings of plain e2e, one after another
    python benchmarks/token_curve.py --tokens 1200000 4000000 --seeds 0 1 --csv curve.csv
    python benchmarks/token_curve.py --model output/adamw_model           # of another bundled model

TopK SAEs with 40 of 1,024 features, on `blocks.3.hook_resid_pre` of the bundled model. Each run has a process of its own
with one thread. What is finished is kept in `--output`: interrupted, run the same command again. The CSV has all that is
kept there, with 95 % intervals of a bootstrap over held-out sequences.
"""

from __future__ import annotations

import argparse
import csv
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from quality import RESULT, RUN_HEADER, row, run_in_child
from quality_recipes import CURVES, E2E_SEARCH, SEARCH_SEED, Recipe

MEASURED = ["ce_loss_increase", "low", "high", "kl", "l0", "n_alive", "seconds", "cpu_seconds"]


def on_model(recipe: Recipe, model: Path | None, tokens: int) -> Recipe:
    """The recipe for a model and a number of tokens, with both in its name."""
    settings = {**recipe.settings, "training_tokens": tokens}
    if model is not None:
        settings["model_directory"] = str(model)
    where = "bundled" if model is None else model.name
    return replace(recipe, name=f"{where} {recipe.name} {tokens}", settings=settings)


def kept(output: Path) -> list[dict[str, Any]]:
    """What all finished runs have reached: of any recipe, seed, model and number of tokens."""
    rows: list[dict[str, Any]] = []
    for file in output.glob(f"*/{RESULT}"):
        result = json.loads(file.read_text())
        settings = result["asked"]["settings"]
        tokens = settings.pop("training_tokens")
        model = Path(settings.pop("model_directory", "bundled")).name
        about = {"model": model, "recipe": name_of(settings), "tokens": tokens, "seed": result["asked"]["seed"]}
        rows.append(about | {key: result["found"][key] for key in MEASURED})
    return sorted(rows, key=lambda each: (each["model"], each["recipe"], each["tokens"], each["seed"]))


def name_of(settings: dict[str, Any]) -> str:
    """Of the recipe that has these settings, but for the number of tokens."""
    for recipe in (*CURVES.values(), *E2E_SEARCH):
        if {**recipe.settings, "training_tokens": None} == {**settings, "training_tokens": None}:
            return recipe.name
    raise SystemExit(f"No recipe has the settings {settings}. Remove that run, or name another --output.")


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Figures to four significant digits: the intervals are wider."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", "recipe", "tokens", "seed", *MEASURED], lineterminator="\n")
        writer.writeheader()
        for each in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in each.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--search", action="store_true", help="instead, variants of plain e2e, with a seed of their own"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_200_000, 4_000_000, 12_000_000, 40_000_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipes", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--model", type=Path, help="folder of scripts/train_demo_model.py; default: the bundled model")
    parser.add_argument("--at-once", type=int, default=1, help="runs at once, on as many cores (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/token_curve"), help="default %(default)s")
    parser.add_argument("--csv", type=Path, help="write all that --output has to this file")
    args = parser.parse_args()
    recipes = list(E2E_SEARCH) if args.search else [CURVES[name] for name in args.recipes]
    seeds = [SEARCH_SEED] if args.search else args.seeds
    runs = [
        (on_model(recipe, args.model, tokens), seed) for tokens in args.tokens for recipe in recipes for seed in seeds
    ]
    print(RUN_HEADER, flush=True)
    with ThreadPoolExecutor(args.at_once) as pool:
        results = pool.map(lambda run: run_in_child(run[0], run[1], args.output, threads=1), runs)
        for (recipe, seed), found in zip(runs, results, strict=True):
            print(row(f"{recipe.name}, seed {seed}", recipe, found), flush=True)
    if args.csv:
        write_csv(kept(args.output), args.csv)


if __name__ == "__main__":
    main()
