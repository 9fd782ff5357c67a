"""What the approximations of the KL save, and what they cost.

    python benchmarks/approximations.py --results approximations.json
    python benchmarks/approximations.py --only speed --results approximations.json
    python benchmarks/approximations.py --only quality --settings exact "kl_top_k 64" --seeds 0 --results approximations.json

Speed: processor time of an optimizer step of GPT-2 small's shape (random weights, TopK SAE with 8 d features, 4 x 256
tokens). Quality: a short end-to-end run of a TopK SAE on the bundled model, measured exactly on held-out files. Results
go into the JSON file, and the table is of all that is in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from contestants import hugging_face_gpt2, our_trainer, random_tokens
from sae_lens import TopKTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM
from shape import Shape

from e2e_sae_plugin import E2ESAETrainingRunner, Objective
from e2e_sae_plugin.demo import demo_dataset, demo_tokens, load_demo_model
from e2e_sae_plugin.demo.run import CONTEXT_SIZE, EVALUATION_PROMPTS, DemoKind, demo_config, evaluate_folder, quiet_host

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "kl_positions 0.5": {"kl_positions": 0.5},
    "kl_positions 0.25": {"kl_positions": 0.25},
    "kl_top_k 64": {"kl_top_k": 64},
}
SHAPE = Shape(n_prompts=4)
LEARNING_RATE = 3e-3
"""The demo's 1e-2 follows a local phase, which has no KL in it and is left out here."""


def step_seconds(names: list[str], n_rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each step; the settings take turns, so that a change of the machine's speed meets them all."""
    tokenizer: Any = None  # the tokens are given
    model = HookedProxyLM(hugging_face_gpt2(SHAPE), tokenizer, hook_names=[])
    sae_cfg = TopKTrainingSAEConfig(
        d_in=SHAPE.d_model, d_sae=8 * SHAPE.d_model, k=SHAPE.k, rescale_acts_by_decoder_norm=False
    )
    trainer = our_trainer(SHAPE, model, f"transformer.h.{SHAPE.layer - 1}", sae_cfg, None)
    tokens = random_tokens(SHAPE)
    trainer.step(tokens)  # the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(n_rounds):
        for name in names:
            trainer.runner_cfg.objective = Objective.e2e(**SETTINGS[name])
            before = time.process_time()
            trainer.step(tokens)
            seconds[name].append(time.process_time() - before)
    return seconds


def run_on_bundled_model(name: str, training_tokens: int, seed: int) -> dict[str, float]:
    """Train one SAE end to end, and measure it on files that neither it nor the model has seen."""
    kind = DemoKind(name.replace(" ", "-"), Objective.e2e(**SETTINGS[name]), local_first=0)
    model = load_demo_model()
    with tempfile.TemporaryDirectory() as folder:
        cfg = demo_config(kind, Path(folder), training_tokens, seed)
        cfg.lr, cfg.lr_end = LEARNING_RATE, LEARNING_RATE / 100
        with quiet_host():
            E2ESAETrainingRunner(cfg, override_model=model, override_dataset=demo_dataset("train", CONTEXT_SIZE)).run()
        assert cfg.output_path is not None
        held_out = demo_tokens("evaluation", CONTEXT_SIZE)[:EVALUATION_PROMPTS]
        metrics = evaluate_folder(Path(cfg.output_path), model, held_out)
    return {"ce_loss_increase": metrics.ce_loss_increase, "kl": metrics.kl, "n_alive": metrics.n_alive}


def table(results: dict[str, Any]) -> str:
    """A row for each setting, with what has been measured of it."""
    lines = [
        "| KL | step, CPU s | speed | CE loss increase (each seed) | KL | alive |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    exact = results["speed"].get("exact")
    for name in SETTINGS:
        cells = [name, "", "", "", "", ""]
        if seconds := results["speed"].get(name):
            cells[1] = f"{mean(seconds):.1f}"
            cells[2] = f"{mean(exact) / mean(seconds):.2f} x" if exact else ""
        if runs := list(results["quality"].get(name, {}).values()):
            each = ", ".join(f"{run['ce_loss_increase']:.4f}" for run in runs)
            cells[3] = f"{mean(run['ce_loss_increase'] for run in runs):.4f} ({each})"
            cells[4] = f"{mean(run['kl'] for run in runs):.4f}"
            cells[5] = f"{mean(run['n_alive'] for run in runs):.0f}"
        if any(cells[1:]):
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "quality"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=2, help="steps of each setting that are timed (%(default)s)")
    parser.add_argument("--tokens", type=int, default=300_000, help="of each run on the bundled model (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--results", type=Path, required=True, help="JSON file that this run's figures are added to")
    args = parser.parse_args()
    results: dict[str, Any] = {"speed": {}, "quality": {}}
    if args.results.exists():
        results = json.loads(args.results.read_text())
    if args.only != "quality":
        results["speed"] |= step_seconds(args.settings, args.rounds)
    for name in args.settings if args.only != "speed" else ():
        for seed in args.seeds:
            run = run_on_bundled_model(name, args.tokens, seed)
            results["quality"].setdefault(name, {})[str(seed)] = run
            args.results.write_text(json.dumps(results, indent=1))
    args.results.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
