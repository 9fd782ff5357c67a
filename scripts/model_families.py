"""Try an SAE in a tiny random model of every family, and write the tables of docs/reference/model_families.md.

    python scripts/model_families.py                  # try the families and renew their table
    python scripts/model_families.py --all            # and every causal decoder class of transformers
    python scripts/model_families.py --all --check    # write nothing: fail where a cell is not what is committed
    python scripts/model_families.py --only Falcon    # print one family

Everything is offline. It fails, whatever is committed, when a cell is neither `works` nor a refusal of the package's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import argparse
import contextlib
import difflib
import importlib.metadata
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from splice_cells import WORKS, outcome
from sweep_classes import Swept, try_all_classes
from tiny_families import (
    BLOCK,
    FAMILIES,
    MODEL_CLASSES,
    PLACES,
    Family,
    NotThere,
    hook_names,
    load,
    logits_differ,
    save,
)

PAGE = ROOT / "docs/reference/model_families.md"
PACKAGES = ("transformers", "transformer-lens", "sae-lens")
DIFFERENT = "†"
Cells = dict[str, dict[str, str]]
"""Outcome by model class and place."""


# Trying.


def try_family(family: Family) -> Cells:
    """Outcomes for every model class and place. Silent, and everything that it loads is gone afterwards."""
    cells: Cells = {}
    with tempfile.TemporaryDirectory() as cache:
        saved = save(family, Path(cache))
        for model_class in MODEL_CLASSES:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    model = load(family, saved, model_class)
            except NotThere as reason:
                cells[model_class] = dict.fromkeys(PLACES, f"-: {reason}")
                continue
            names = hook_names(family, model_class, model)
            cells[model_class] = {place: _outcome(model, names[place]) for place in PLACES}
            if logits_differ(model, saved):
                cells[model_class]["logits"] = DIFFERENT
    return cells


def _outcome(model: Any, hook_name: str | None) -> str:
    return "-: The model has no such hook." if hook_name is None else outcome(model, hook_name, BLOCK)


# Writing.


class Notes:
    """Numbers the messages of a table."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def cell(self, result: str) -> str:
        """`works`, or the kind of result with the number of its message."""
        kind, separator, message = result.partition(": ")
        if not separator:
            return kind
        return f"{kind} ({self.numbers.setdefault(_same_everywhere(message), len(self.numbers) + 1)})"

    def lines(self) -> list[str]:
        return [f"{number}. {message}" for message, number in self.numbers.items()]


def _same_everywhere(message: str) -> str:
    """One line without what differs between machines: figures with a point."""
    return re.sub(r"\d+\.\d+(e-?\d+)?", "…", " ".join(message.split()))


def families_table(results: Mapping[str, Cells]) -> str:
    notes = Notes()
    modules = {family.name: _modules_of(family) for family in FAMILIES}
    lines = [f"| family | modules | {' | '.join(f'`{name}`' for name in MODEL_CLASSES)} |", "| --- " * 5 + "|"]
    for family, cells in results.items():
        shown = [_class_cell(cells[name], notes) for name in MODEL_CLASSES]
        lines.append(f"| {' | '.join([family, modules[family], *shown])} |")
    return "\n".join([*lines, "", *notes.lines()])


def _modules_of(family: Family) -> str:
    parts = [f"`{part}`" for part in (family.mlp, family.attention) if part]
    return f"`{family.layers}`: {', '.join(parts)}"


def _class_cell(cells: Mapping[str, str], notes: Notes) -> str:
    shown = {place: notes.cell(cells[place]) for place in PLACES}
    marker = f" {DIFFERENT}" if "logits" in cells else ""
    if len(set(shown.values())) == 1:
        return shown[PLACES[0]] + marker
    return ", ".join(f"{place} {result}" for place, result in shown.items()) + marker


def classes_list(swept: Iterable[Swept]) -> str:
    by_result: dict[str, list[str]] = {}
    for each in swept:
        message = each.result.replace(each.class_name, "the class")
        by_result.setdefault(_same_everywhere(message), []).append(f"`{each.class_name}`")
    works = by_result.pop(WORKS, [])
    others = [f"* {', '.join(names)}: {result}" for result, names in sorted(by_result.items())]
    return "\n".join([f"**{len(works)} work:** {', '.join(works)}", "", *others])


def with_block(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers of this name."""
    start, end = f"<!-- {name}: start, written by scripts/model_families.py -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{PAGE} has no line {start!r} with {end!r} below.")
    return f"{before}{start}\n\n{text}\n\n{end}{after}"


def versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


# The command.


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are too small for more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="try every causal decoder class of transformers too")
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    parser.add_argument("--only", metavar="FAMILY", help="print the cells of the families whose name has this in it")
    arguments = parser.parse_args()
    _quiet()
    if arguments.only:
        for family in FAMILIES:
            if arguments.only.lower() in family.name.lower():
                print(family.name, *_lines_of(try_family(family)), sep="\n    ")
        return 0
    results = {family.name: try_family(family) for family in FAMILIES}
    failures = [f"{name}, {line}" for name, cells in results.items() for line in _lines_of(cells) if "FAILS" in line]
    committed = PAGE.read_text()
    page = with_block(committed, "families", families_table(results))
    page = with_block(page, "versions", versions())
    if arguments.all:
        swept = list(try_all_classes())
        page = with_block(page, "classes", classes_list(swept))
        failures += [f"{each.class_name}: {each.result}" for each in swept if each.result.startswith("FAILS")]
    return _conclude(committed, page, failures, check=arguments.check)


def _lines_of(cells: Cells) -> list[str]:
    return [f"{model_class} {place}: {result}" for model_class, row in cells.items() for place, result in row.items()]


def _conclude(committed: str, page: str, failures: list[str], *, check: bool) -> int:
    """Write the page, or compare it. Returns the exit status."""
    for line in failures:
        print(line, file=sys.stderr)
    if not check:
        PAGE.write_text(page)
        return 1 if failures else 0
    # The versions stand above the table for its readers; another version may give the same table.
    old, new = [[line for line in text.splitlines() if not line.startswith(PACKAGES[0])] for text in (committed, page)]
    changed = list(difflib.unified_diff(old, new, "committed", "found now", n=0, lineterm=""))
    if changed:
        print(*changed, sep="\n", file=sys.stderr)
        print(f"{PAGE.relative_to(ROOT)} is not what was found. `make families WRITE=1` renews it.", file=sys.stderr)
    return 1 if changed or failures else 0


if __name__ == "__main__":
    sys.exit(main())
