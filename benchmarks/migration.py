"""A SAELens script before and after its two lines are changed: equal settings, tokens and data.

    python benchmarks/migration.py
    python benchmarks/migration.py --model smollm2 --tokens 200000 --architectures topk standard

Before is SAELens's own runner. After is `E2ESAERunnerConfig` with the same settings and no `objective`, which is the default
recipe; "e2e by name" is the same with `Objective.e2e()`. Each SAE is measured on the same held-out files. Prints a table.
What `--output` has already is neither trained nor measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from models import MODELS, Subject
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.constants import SAE_WEIGHTS_FILENAME

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective, evaluate
from e2e_sae_plugin.demo.run import quiet_host

CONTEXT_SIZE, STEP_PROMPTS = 128, 4
STEP_TOKENS = CONTEXT_SIZE * STEP_PROMPTS


def sae_config(architecture: str, d_in: int, n_steps: int) -> Any:
    """As users write them: activations normalized, coefficients that give tens to a hundred active features."""
    size: dict[str, Any] = {"d_in": d_in, "d_sae": 8 * d_in, "normalize_activations": "expected_average_only_in"}
    makers = {
        "topk": lambda: TopKTrainingSAEConfig(k=40, **size),
        "batchtopk": lambda: BatchTopKTrainingSAEConfig(k=40, **size),
        "standard": lambda: StandardTrainingSAEConfig(l1_coefficient=1.0, l1_warm_up_steps=n_steps // 20, **size),
        "jumprelu": lambda: JumpReLUTrainingSAEConfig(
            l0_coefficient=0.2, l0_warm_up_steps=n_steps // 5, jumprelu_bandwidth=2.0, **size
        ),
    }
    return makers[architecture]()


def train(kind: str, architecture: str, lr: float, tokens: int, seed: int, subject: Subject, folder: Path) -> None:
    """Train one SAE into `folder`."""
    settings: dict[str, Any] = {
        "sae": sae_config(architecture, subject.d_in, tokens // STEP_TOKENS),
        "model_name": subject.name, "model_class_name": subject.model_class_name, "hook_name": subject.hook_name,
        "dataset_path": "Python standard library", "context_size": CONTEXT_SIZE, "training_tokens": tokens,
        "train_batch_size_tokens": STEP_TOKENS, "store_batch_size_prompts": STEP_PROMPTS, "n_batches_in_buffer": 16,
        "lr": lr, "n_batches_for_norm_estimate": 20, "checkpoint_path": None, "output_path": str(folder), "seed": seed,
        "logger": LoggingConfig(log_to_wandb=False), "verbose": False,
    }  # fmt: skip
    given: dict[str, Any] = {"override_model": subject.model, "override_dataset": subject.dataset}
    if kind == "SAELens":
        LanguageModelSAETrainingRunner(LanguageModelSAERunnerConfig(**settings), **given).run()
    else:
        objective: dict[str, Any] = {} if kind == "default" else {"objective": Objective.e2e()}
        E2ESAETrainingRunner(E2ESAERunnerConfig(**settings, **objective, overwrite_output=True), **given).run()


def row(kind: str, args: argparse.Namespace, architecture: str, subject: Subject) -> dict[str, Any]:
    """Train and measure one SAE, unless that has been done."""
    folder = (
        args.output / f"{args.model}-{args.tokens}" / f"{architecture}-{args.lr:g}-{kind.replace(' ', '_')}-{args.seed}"
    )
    path = folder / "measured.json"
    if path.is_file():
        return json.loads(path.read_text())
    if not (folder / SAE_WEIGHTS_FILENAME).is_file():
        train(kind, architecture, args.lr, args.tokens, args.seed, subject, folder)
    found = evaluate(
        SAE.load_from_disk(folder), subject.model, subject.held_out, hook_name=subject.hook_name, ablations=False
    )
    increase = found.metrics["ce_loss_increase"]
    assert increase is not None
    measured = {
        "architecture": architecture, "kind": kind, "ce_loss_increase": increase.value, "low": increase.low,
        "high": increase.high, "kl": found.value("kl"), "l0": found.value("l0"), "alive": found.n_alive,
    }  # fmt: skip
    path.write_text(json.dumps(measured))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--tokens", type=int, default=250_000 // STEP_TOKENS * STEP_TOKENS)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--architectures", nargs="+", default=["topk", "batchtopk", "standard", "jumprelu"])
    parser.add_argument("--kinds", nargs="+", default=["SAELens", "default", "e2e by name"])
    parser.add_argument("--output", type=Path, default=Path("output/migration"))
    args = parser.parse_args()
    quiet_host()
    subject = MODELS[args.model](CONTEXT_SIZE, args.tokens)
    print("| architecture | run | CE loss increase | KL | L0 | alive |\n| --- | --- | --- | --- | --- | --- |")
    for architecture in args.architectures:
        for kind in args.kinds:
            found = row(kind, args, architecture, subject)
            print(
                f"| {architecture} | {kind} | {found['ce_loss_increase']:.4f} [{found['low']:.4f}, {found['high']:.4f}] | "
                f"{found['kl']:.4f} | {found['l0']:.1f} | {found['alive']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
