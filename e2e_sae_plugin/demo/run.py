"""The demo: a local, an e2e and an e2e + downstream SAE on the bundled model, compared on held-out text."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from sae_lens import SAE, LoggingConfig, TopKTrainingSAEConfig
from torch import Tensor
from transformer_lens import HookedTransformer

from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.demo.data import demo_dataset, demo_tokens
from e2e_sae_plugin.demo.model import load_demo_model
from e2e_sae_plugin.evaluation import SpliceMetrics, measure, reconstruct_with
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.runner import E2ESAETrainingRunner
from e2e_sae_plugin.splice import splice_into

HOOK_NAME = "blocks.3.hook_resid_pre"
CONTEXT_SIZE = 128
EVALUATION_PROMPTS = 400


@dataclass(frozen=True)
class DemoKind:
    """One row of the demo."""

    name: str
    objective: Objective
    local_first: float
    """Share of the tokens that is trained locally before the objective takes over."""


# Same data, tokens, steps, learning rate and dictionary for each; k fixes the L0 (docs/demo.md).
KINDS = (
    DemoKind("local", Objective.local(), 0),
    DemoKind("e2e", Objective.e2e(), 0.6),
    DemoKind("e2e+ds", Objective.e2e_downstream(beta=1e-4), 0.6),
)


def demo_config(kind: DemoKind, output: Path | None, training_tokens: int, seed: int) -> E2ESAERunnerConfig:
    """The run of one kind. Small steps and a high rate: with few tokens, the number of updates is what counts."""
    folder = None if output is None else output / kind.name.replace("+", "_")
    return E2ESAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=128, d_sae=1024, k=40, normalize_activations="expected_average_only_in"),
        objective=kind.objective,
        local_first=kind.local_first,
        b_dec_init_method="mean",  # three quarters of an activation's norm in the bundled model
        model_name="e2e-sae-demo",
        hook_name=HOOK_NAME,
        dataset_path="Python standard library",
        context_size=CONTEXT_SIZE,
        training_tokens=training_tokens,
        train_batch_size_tokens=4 * CONTEXT_SIZE,
        store_batch_size_prompts=4,
        lr=1e-2,
        lr_scheduler_name="cosineannealing",
        lr_end=1e-4,
        adam_beta2=0.99,  # 0.999 remembers the first, largest gradients for half of so short a run
        lr_warm_up_steps=min(100, training_tokens // (4 * CONTEXT_SIZE) // 10),
        n_batches_for_norm_estimate=20,
        n_eval_batches=0,
        seed=seed,
        output_path=None if folder is None else str(folder),
        # What is finished is not trained again, what was interrupted goes on.
        resume_from_checkpoint="auto" if folder is not None and folder.exists() else None,
        checkpoint_path=None if output is None else str(output / "checkpoints"),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )


@contextmanager
def quiet_host() -> Iterator[None]:
    """Silence what SAELens says about overridden models and data, which a demo overrides on purpose."""
    host_logger = logging.getLogger("sae_lens")
    level = host_logger.level
    host_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The training dataset contains fewer samples")
            warnings.filterwarnings("ignore", message="To copy construct from a tensor")
            warnings.filterwarnings("ignore", message="\nThis SAE has non-empty model_from_pretrained_kwargs")
            yield
    finally:
        host_logger.setLevel(level)


def train_kind(
    kind: DemoKind, model: HookedTransformer, dataset: Dataset, output: Path, training_tokens: int, seed: int
) -> Path:
    """Train one SAE and return the folder it was saved in."""
    cfg = demo_config(kind, output, training_tokens, seed)
    with quiet_host():
        E2ESAETrainingRunner(cfg, override_model=model, override_dataset=dataset).run()
    assert cfg.output_path is not None
    return Path(cfg.output_path)


def evaluate_folder(folder: Path, model: HookedTransformer, tokens: Tensor) -> SpliceMetrics:
    """Measure an SAE as anybody would load it: `sae_lens.SAE.load_from_disk`."""
    with quiet_host():
        sae = SAE.load_from_disk(str(folder))
    spliced = splice_into(model, HOOK_NAME)
    spliced.check()
    return measure(reconstruct_with(sae), spliced, tokens, batch_size_prompts=16)


def format_table(rows: list[tuple[str, SpliceMetrics]]) -> str:
    """The demo's one table; downstream errors are squared L2 distances at each later layer."""
    hooks = list(rows[0][1].downstream_mse)
    layers = [f"layer {hook.split('.')[1]}" for hook in hooks]
    header = f"{'kind':8}{'L0':>7}{'CE increase':>13}{'KL':>8}{'alive':>7}   downstream MSE"
    header += "".join(f"{layer:>9}" for layer in layers)
    lines = [header, "-" * len(header)]
    for name, metrics in rows:
        line = f"{name:8}{metrics.l0:7.1f}{metrics.ce_loss_increase:+13.4f}{metrics.kl:8.4f}{metrics.n_alive:7d}"
        line += " " * 17 + "".join(f"{metrics.downstream_mse[hook]:9.2f}" for hook in hooks)
        lines.append(line)
    return "\n".join(lines)


def run_demo(output: Path, training_tokens: int = 1_000_000, seed: int = 0) -> str:
    """Train the three SAEs, write them below `output`, and return the table.

    Args:
        output: folder that gets one SAE per kind.
        training_tokens: tokens that each SAE is trained on.
        seed: of the SAEs' initial weights.
    """
    started = time.monotonic()
    for kind in KINDS:
        demo_config(kind, output, training_tokens, seed)  # what is refused of one, before any is trained
    model = load_demo_model()
    dataset, held_out = (
        demo_dataset("train", CONTEXT_SIZE),
        demo_tokens("evaluation", CONTEXT_SIZE)[:EVALUATION_PROMPTS],
    )
    print(
        f"Language model: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, trained on Python source. "
        f"SAEs: TopK, 128 x 1024 on {HOOK_NAME}, {training_tokens:,} tokens each.",
        flush=True,
    )
    rows: list[tuple[str, SpliceMetrics]] = []
    for kind in KINDS:
        first = f": the first {kind.local_first:.0%} of its tokens local" if kind.local_first else ""
        print(f"\n{kind.name}{first}", flush=True)
        folder = train_kind(kind, model, dataset, output, training_tokens, seed)
        rows.append((kind.name, evaluate_folder(folder, model, held_out)))
    clean = rows[0][1]
    return "\n".join(
        [
            f"\nOn {clean.n_tokens:,} tokens of files that neither the model nor an SAE was trained on "
            f"(clean CE {clean.ce_loss_without_sae:.3f}):\n",
            format_table(rows),
            f"\nThe SAEs are in {output}/ ({', '.join(kind.name.replace('+', '_') for kind in KINDS)}); "
            f"{time.monotonic() - started:.0f} s in all.",
            "Load one:     sae_lens.SAE.load_from_disk('" + str(output / "e2e") + "')",
            "Train yours:  e2e-sae train --help",
        ]
    )


def demo_command(args: argparse.Namespace) -> None:
    """`e2e-sae demo`."""
    print(run_demo(args.output, args.tokens, args.seed))
