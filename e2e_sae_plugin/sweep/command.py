"""`e2e-sae sweep`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from e2e_sae_plugin.sweep.config import SweepConfig
from e2e_sae_plugin.sweep.runner import SweepRunner
from e2e_sae_plugin.sweep.summary import read_summary, summary_table


def sweep(args: argparse.Namespace) -> None:
    """Train the SAEs of a sweep's file."""
    cfg = SweepConfig.load(args.config)
    saes = SweepRunner(cfg, part=_part(args.part)).run()
    failed = [name for name, sae in saes.items() if sae is None]
    n_whole = len(saes) - len(failed)
    print(f"{n_whole} of {len(saes)} SAEs are in {cfg.output_path}, with their held-out metrics in sweep.csv.")
    rows = read_summary(cfg)
    print(f"\n{summary_table(rows).to_text()}")
    if command := _next_command([row for row in rows if row["status"] == "finished"], str(cfg.output_path)):
        print(f"\nCompare them: {command}")
    if failed:
        raise OSError(f"{len(failed)} failed, see failed.json in their folders: {', '.join(failed)}.")


def _next_command(finished: Sequence[dict[str, str]], folder: str) -> str:
    """`e2e-sae compare` of the SAEs at one hook, which alone can be compared; empty where there are no two."""
    hooks = list(dict.fromkeys(row["hook_name"] for row in finished))
    at_first = [f"{folder}/{row['name']}" for row in finished if row["hook_name"] in hooks[:1]]
    if len(at_first) < 2:
        return ""
    saes = [folder] if len(hooks) == 1 else at_first
    output = f"{folder}-compared" if len(hooks) == 1 else f"{folder}-compared/{hooks[0]}"
    command = shlex.join(["e2e-sae", "compare", *saes, "--output", output])
    return command if len(hooks) == 1 else f"{command} (and so for each of the {len(hooks)} hooks)"


def _part(text: str) -> tuple[int, int]:
    index, sign, n = text.partition("/")
    if not sign or not index.isdecimal() or not n.isdecimal() or not 1 <= int(index) <= int(n):
        raise ValueError(f"--part takes I/N with 1 <= I <= N, for instance 1/2, got {text!r}.")
    return int(index), int(n)
