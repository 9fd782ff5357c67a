"""`e2e-sae convert`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from e2e_sae_plugin.checkpoint.folder import E2E_CFG_FILENAME
from e2e_sae_plugin.convert.convert import convert_each
from e2e_sae_plugin.convert.sources import Samples

DESCRIPTION = """\
Convert checkpoints of the paper's authors' library (e2e_sae) to SAELens SAEs with equal outputs, and their runs to
configs of this package with an equal loss. Writes one folder for each SAE, which SAELens loads. SOURCE is one of
  a run's folder with samples_<N>.pt and final_config.yaml, or one of its .pt files;
  a folder with pairs <name>.pt and <name>.yaml, or one of them by name;
  hf:OWNER/REPO[@REVISION][/NAME];
  wandb:ENTITY/PROJECT/RUN.
Files are read as tensors alone: no code in them is run."""

EXAMPLES = """\
examples:
  e2e-sae convert out/my_run --output converted                                 its last checkpoint, all positions
  e2e-sae convert out/my_run --output converted --samples all --position blocks.6.hook_resid_pre
  e2e-sae convert hf:apollo-research/e2e-saes-gpt2/e2e_similar_ce_layer_6 --output converted"""


def convert_command(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: a setting or a source is refused.
        OSError: something cannot be read, fetched or written.
    """
    args = _parser().parse_args(list(argv))
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="e2e-sae convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE")
    add("--output", type=Path, required=True, metavar="DIR", help="gets a folder for each SAE")
    add("--samples", type=_samples, metavar="N", help="which samples_<N>.pt of a run, or all (default: the largest N)")
    add("--position", action="append", metavar="HOOK", help="convert the SAE at this hook alone; may be repeated")
    add("--layers", type=int, metavar="L", help="blocks of the model, where they are needed and not known")
    return parser


def _samples(text: str) -> Samples:
    if text == "all":
        return "all"
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of samples, or all, got {text!r}") from None
