"""The paper's three findings on the bundled model: train, measure, and say which of them show.

    python examples/reproduce_findings.py            # or: make reproduce

Three kinds of SAE (local, e2e, e2e + downstream) x five sparsities x two seeds on the middle layer of the bundled language
model, all with the same tokens and the same search for a learning rate. No network, no GPU; under an hour on two cores.
Interrupted, run it again: it goes on where it stood.
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

import yaml

from e2e_sae_plugin.comparison import Comparison, compare, load_subjects, write_comparison
from e2e_sae_plugin.demo import demo_tokens, load_demo_model
from e2e_sae_plugin.demo.run import quiet_host

KINDS: dict[str, dict[str, Any]] = {
    "local": {"objective": "local", "sparsities": [0.15, 0.25, 0.4, 0.65, 1.0]},
    "e2e": {"objective": "e2e", "sparsities": [0.005, 0.01, 0.02, 0.04, 0.08]},
    "e2e+ds": {"objective": {"kl": 1, "beta": 1e-4}, "sparsities": [0.02, 0.04, 0.07, 0.12, 0.2]},
}
RATES = (1e-3, 3e-3, 1e-2, 2e-2)
TOKENS, SEARCH_TOKENS = 1_200_000, 250_000
STEP_TOKENS = 512
SEEDS = (0, 1)
CARD_TOKENS = 32_768


def base(tokens: int) -> dict[str, Any]:
    """What all SAEs share. Small steps and a high rate: with few tokens, the number of updates is what counts."""
    warm_up = tokens // STEP_TOKENS // 20
    return {
        "model_name": "e2e-sae-demo",
        "dataset_path": "e2e-sae-demo",
        "hook_name": "blocks.3.hook_resid_pre",
        "context_size": 128,
        "training_tokens": tokens,
        "train_batch_size_tokens": STEP_TOKENS,
        "store_batch_size_prompts": STEP_TOKENS // 128,
        "lr_warm_up_steps": warm_up,
        "lr_scheduler_name": "cosineannealing",
        "lr_end": 1e-4,
        "adam_beta2": 0.99,  # 0.999 remembers the first, largest gradients for half of so short a run
        "b_dec_init_method": "mean",  # three quarters of an activation's norm in the bundled model
        "n_batches_for_norm_estimate": 20,
        "n_eval_batches": 16,
        "eval_batch_size_prompts": 8,
        "checkpoint_every_minutes": 5,
        "logger": {
            "log_to_wandb": False,
            "wandb_log_frequency": 10,
            "eval_every_n_wandb_logs": 10**6,
        },  # at the end alone
        "sae": {
            "architecture": "standard",
            "d_in": 128,
            "d_sae": 1024,
            "normalize_activations": "expected_average_only_in",
            "l1_warm_up_steps": warm_up,
        },
    }


def run_sweep(config: dict[str, Any], processes: int) -> None:
    """Train a sweep in so many processes, each with one thread: small matrices gain nothing from more."""
    path = Path(f"{config['output_path']}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "e2e_sae_plugin", "sweep", "--config", str(path), "--part"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running: list[subprocess.Popen[bytes]] = []
    for part in range(1, processes + 1):
        log = None if part == 1 else (path.parent / f"{path.stem}-part{part}.log").open("ab")  # one bar on the screen
        running.append(subprocess.Popen([*command, f"{part}/{processes}"], env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait() for process in running]
    except KeyboardInterrupt:  # they got it too, and save before they end
        codes = [process.wait() for process in running]
        raise
    if any(codes):
        raise SystemExit(f"The sweep {path} ended with {codes}. Run this again to go on.")


def final_loss(folder: Path) -> float:
    """What training minimised, sparsity included, over the last tenth of the logged steps."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["losses/overall_loss"] for entry in entries if "losses/overall_loss" in entry]
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def search_rates(output: Path, processes: int, scale: float) -> dict[str, float]:
    """The best of `RATES` for each kind, at its middle sparsity."""
    kinds = {
        f"{name}_lr{rate:g}": {**kind, "sparsities": kind["sparsities"][2:3], "lr": rate}
        for name, kind in KINDS.items()
        for rate in RATES
    }
    folder = output / "search"
    tokens = round(SEARCH_TOKENS * scale)
    run_sweep({"base": base(tokens), "kinds": kinds, "seeds": [SEEDS[0]], "output_path": str(folder)}, processes)
    found: dict[str, dict[str, float]] = {}
    for name, kind in KINDS.items():
        sparsity = kind["sparsities"][2]
        found[name] = {
            f"{rate:g}": final_loss(folder / f"{name}_lr{rate:g}-{sparsity:g}-seed{SEEDS[0]}") for rate in RATES
        }
    (output / "learning_rates.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, losses in found.items():
        print(f"{name:8}", "  ".join(f"lr {rate}: loss {loss:.4f}" for rate, loss in losses.items()))
    return {name: float(min(losses, key=lambda rate: losses[rate])) for name, losses in found.items()}


def report(output: Path, n_tokens: int) -> Comparison:
    """Compare all the SAEs on held-out files, with feature cards for those of similar CE loss increase."""
    with quiet_host():
        subjects = load_subjects([str(output / "saes")])
        model = load_demo_model()
        tokens = demo_tokens("evaluation", 128)[: n_tokens // 128]
        folder = output / "report"
        found = compare(subjects, model, tokens, cache=folder, n_cards=0, progress=True)
        matched = [found.groups[key][0].name for key in found.matched.items()]
        found = compare(
            subjects,
            model,
            tokens,
            cache=folder,
            n_cards=9,
            cards_for=matched,
            n_exact=9,
            card_tokens=CARD_TOKENS,
            progress=True,
        )
        write_comparison(found, folder, "The paper's three findings on the bundled model")
    return found


def main() -> None:
    """Search, train, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/findings"), help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="default here: %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the training tokens (default 1)")
    parser.add_argument(
        "--tokens", type=int, default=102_400, help="held-out tokens to measure on (default %(default)s)"
    )
    parser.add_argument("--only", choices=["search", "train"], help="stop after this part")
    args = parser.parse_args()
    started = time.monotonic()
    times: dict[str, float] = {}

    def done(part: str) -> None:
        times[part] = (time.monotonic() - started) / 60 - sum(times.values())
        print(f"{part}: {times[part]:.1f} minutes")

    rates = search_rates(args.output, args.processes, args.scale)
    done("search for learning rates")
    if args.only == "search":
        return
    kinds = {name: {**kind, "lr": rates[name]} for name, kind in KINDS.items()}
    run_sweep(
        {
            "base": base(round(TOKENS * args.scale)),
            "kinds": kinds,
            "seeds": list(SEEDS),
            "output_path": str(args.output / "saes"),
        },
        args.processes,
    )
    done("training")
    found = report(args.output, args.tokens)
    done("evaluation and report")
    for each in found.findings:
        print(f"\n{each.title}: {each.verdict.upper()}\n  {each.claim}")
        for part, verdict in each.parts:
            print(f"  {verdict:>15}: {part}")
        for line in each.evidence:
            print(f"    {line}")
    print(f"\nThe report: {args.output / 'report' / 'report.html'}")
    (args.output / "minutes.json").write_text(json.dumps(times, indent=1) + "\n")


if __name__ == "__main__":
    main()
