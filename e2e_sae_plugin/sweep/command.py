"""`e2e-sae sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from e2e_sae_plugin.sweep.config import SweepConfig
from e2e_sae_plugin.sweep.runner import SweepRunner

DESCRIPTION = """Train many SAEs side by side: objectives x sparsities x seeds (x hook points), on one stream of tokens and
one clean pass per batch. Each SAE is the one that `e2e-sae train` would train alone. Interrupted, run the same command
again: it goes on where it stood. An SAE that diverges is left out; the others go on."""

EXAMPLE = """A sweep's file:

  base:                        # any field of E2ESAERunnerConfig; shared by all
    model_name: e2e-sae-demo   # the bundled model
    dataset_path: e2e-sae-demo
    hook_name: blocks.3.hook_resid_pre
    context_size: 128
    training_tokens: 200_000
    train_batch_size_tokens: 512
    lr: 1.0e-2
    logger: {log_to_wandb: false}
    sae: {architecture: standard, d_in: 128, d_sae: 1024, normalize_activations: expected_average_only_in}
  kinds:                       # each with an objective, its sparsities (l1_coefficient here) and own settings
    local: {objective: local, sparsities: [0.3, 1]}
    e2e: {objective: e2e, sparsities: [0.005, 0.02], lr: 3.0e-3}
    e2e+ds: {objective: {kl: 1, beta: 1.0e-4}, sparsities: [0.03, 0.1]}
  seeds: [0, 1]
  output_path: sweep           # one SAE folder each, and sweep.csv
"""


def sweep(argv: Sequence[str]) -> None:
    """Train the SAEs of a sweep's file."""
    parser = argparse.ArgumentParser(
        prog="e2e-sae sweep",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the sweep, in YAML")
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="train every N-th SAE from the I-th on; processes with different parts share the folder (one per GPU)",
    )
    args = parser.parse_args(list(argv))
    cfg = SweepConfig.load(args.config)
    saes = SweepRunner(cfg, part=_part(args.part)).run()
    failed = [name for name, sae in saes.items() if sae is None]
    print(
        f"{len(saes) - len(failed)} of {len(saes)} SAEs are in {cfg.output_path}, with their held-out metrics in sweep.csv."
    )
    if failed:
        raise OSError(f"{len(failed)} failed, see failed.json in their folders: {', '.join(failed)}.")


def _part(text: str) -> tuple[int, int]:
    index, sign, n = text.partition("/")
    if not sign or not index.isdecimal() or not n.isdecimal() or not 1 <= int(index) <= int(n):
        raise ValueError(f"--part takes I/N with 1 <= I <= N, for instance 1/2, got {text!r}.")
    return int(index), int(n)
