"""`e2e-sae convert`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from e2e_sae_plugin.checkpoint.folder import E2E_CFG_FILENAME
from e2e_sae_plugin.convert.convert import convert_each


def convert_command(args: argparse.Namespace) -> None:
    """Convert, and print what was converted.

    Raises:
        ValueError: a setting or a source is refused.
        OSError: something cannot be read, fetched or written.
    """
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    folders: list[tuple[Path, bool]] = []
    found = convert_each(args.source, args.output, samples=args.samples, positions=args.position, n_layers=args.layers)
    for each in found:  # one at a time: a dictionary of the paper's has 280 MB
        metadata = each.sae.cfg.metadata
        sparsity = "-" if metadata.sparsity is None else f"{metadata.sparsity:g}"
        shape = f"{each.sae.cfg.d_sae} x {each.sae.cfg.d_in}"
        has_config = "no" if each.config is None else "yes"
        rows.append(
            (
                each.name,
                str(metadata.model_name or "-"),
                str(metadata.hook_name),
                str(metadata.kind),
                sparsity,
                shape,
                has_config,
            )
        )
        notes += [f"{each.name}: {note}" for note in each.notes]
        if each.folder is not None:
            folders.append((each.folder, each.config is not None))
    _print_table(("SAE", "model", "hook", "kind", "lambda", "d_sae x d_in", "config"), rows)
    for note in notes:
        print(f"Note: {note}")
    print("\nNext:")
    for folder, _ in folders:
        print(f"  e2e-sae evaluate {shlex.quote(str(folder))}")
    for folder in [folder for folder, has_config in folders if has_config][:1]:
        print(f"  e2e-sae train --config {shlex.quote(str(folder / E2E_CFG_FILENAME))}     trains such an SAE anew")


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
