"""`e2e-sae sweep`."""

from __future__ import annotations

import argparse

from e2e_sae_plugin.sweep.config import SweepConfig
from e2e_sae_plugin.sweep.runner import SweepRunner


def sweep(args: argparse.Namespace) -> None:
    """Train the SAEs of a sweep's file."""
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
