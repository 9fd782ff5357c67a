"""Run the notebooks of the documentation, and check what is committed of them.

    python scripts/run_notebooks.py                    # run copies: fails on errors and other kinds of outputs
    python scripts/run_notebooks.py --write            # renew the outputs
    python scripts/run_notebooks.py --check            # run nothing: look at what is committed (what the tests do)
    python scripts/run_notebooks.py docs/notebooks/train_and_look.ipynb

Every notebook runs offline, from top to bottom, in a temporary folder. What is written back has no times, versions or
names of the machine in it, so that a diff shows what has changed.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

FOLDER = Path(__file__).parent.parent / "docs/notebooks"
MAX_BYTES = 500_000
TIMEOUT = 600
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
IMAGES = ("image/png", "image/jpeg")
KINDS_OF_TEXT = ("text/plain", "text/markdown", "text/html")
COLOURS = re.compile(r"\x1b\[[\d;]*m?")
NOISE = {
    "a path of a machine": re.compile(r"(?<![\w.])/(?:home|tmp|root|Users|var|mnt|opt)/|[A-Z]:\\\\Users"),
    "a progress bar": re.compile(r"\r|\d(?:it|tok|seq|s)/(?:s|it)\]|\d+%\|"),
    "a warning": re.compile(r"\w+Warning: "),
    "terminal colours": COLOURS,
    "the address of an object": re.compile(r" at 0x[0-9a-f]{6,}>"),
}


# Looking at a notebook.


def text_of(value: Any) -> str:
    """A notebook's text, which may be stored in lines."""
    return value if isinstance(value, str) else "".join(value)


def texts_of(output: Any) -> Iterator[str]:
    """All that an output shows as text."""
    if output.output_type == "stream":
        yield text_of(output.text)
    elif output.output_type == "error":
        yield f"{output.ename}: {output.evalue}"
    else:
        yield from (text_of(output.data[kind]) for kind in KINDS_OF_TEXT if kind in output.data)


def headings(notebook: Any) -> list[tuple[int, str]]:
    """(level, text) of the headings, in order."""
    found: list[tuple[int, str]] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"^(`{3,}|~{3,}).*?^\1", "", cell.source, flags=re.MULTILINE | re.DOTALL)
            found += [(len(marks), text) for marks, text in re.findall(r"^(#{1,6})\s+(.+?)\s*$", prose, re.MULTILINE)]
    return found


def problems_of_prose(notebook: Any) -> Iterator[str]:
    """Headings that skip a level, links without a text or an address, pictures without a description."""
    levels = headings(notebook)
    if [level for level, _ in levels].count(1) != 1 or levels[0][0] != 1:
        yield "it needs one heading of the first level, at its top"
    for (before, _), (level, text) in itertools.pairwise(levels):
        if level > before + 1:
            yield f"the heading {text!r} skips a level"
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.search(r"(?<!!)\[\s*\]\(|\]\(\s*\)|!\[\s*\]\(", cell.source):
            yield f"an empty link, or a picture without a description, in {cell.source[:40]!r}"


def problems_of_output(output: Any) -> Iterator[str]:
    """What should not have been committed."""
    if output.output_type == "error":
        yield f"an error, {output.ename}"
    elif output.output_type == "stream" and output.name == "stderr":
        yield f"a message on stderr, {text_of(output.text)[:80]!r}"
    for text in texts_of(output):
        for what, pattern in NOISE.items():
            if found := pattern.search(text):
                yield f"{what}, {text[max(0, found.start() - 20) : found.end() + 20]!r}"
    data = output.get("data", {})
    yield from (f"a widget, {kind}" for kind in data if "widget" in kind or "javascript" in kind)
    for kind in IMAGES:
        if kind in data and not output.metadata.get(kind, {}).get("alt"):
            yield "an image without a description: display(figure, metadata={'image/png': {'alt': ...}})"


def problems_of(notebook: Any, n_bytes: int = 0) -> list[str]:
    """All that is wrong with a notebook as it is committed."""
    found = list(problems_of_prose(notebook))
    if n_bytes > MAX_BYTES:
        found.append(f"it has {n_bytes:,} bytes, more than {MAX_BYTES:,}")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        where = f"code cell {number} ({cell.source.strip().splitlines()[0][:40]!r})" if cell.source.strip() else number
        if cell.execution_count is None:
            found.append(f"{where} has not been run")
        elif cell.execution_count != number:
            found.append(f"{where} was run out of order, as number {cell.execution_count}")
        found += [f"{where} shows {each}" for output in cell.outputs for each in problems_of_output(output)]
    return found


# Comparing what is committed with what comes out now.


def tables_of(text: str) -> list[tuple[str, int]]:
    """(heading row, number of rows) of the tables in Markdown."""
    lines = text.splitlines()
    found: list[tuple[str, int]] = []
    for index, line in enumerate(lines[1:], 1):
        if re.fullmatch(r"\|(?:\s*:?-+:?\s*\|)+", line.strip()):
            rows = lines[index + 1 :]
            found.append((lines[index - 1].strip(), next((n for n, r in enumerate(rows) if "|" not in r), len(rows))))
    return found


def structure(output: Any) -> tuple[Any, ...]:
    """What of an output does not depend on the machine's numbers: its kind, and the shape of its tables."""
    if output.output_type == "stream":
        return ("stream", output.name)
    if output.output_type == "error":
        return ("error", output.ename)
    tables = tables_of(text_of(output.data.get("text/markdown", "")))
    return (output.output_type, *sorted(output.data), *tables)


def differences(committed: Any, fresh: Any) -> list[str]:
    """Cells whose outputs are of other kinds than those that are committed."""
    found: list[str] = []
    pairs = zip(committed.cells, fresh.cells, strict=True)
    for number, (old, new) in enumerate((pair for pair in pairs if pair[0].cell_type == "code"), 1):
        before, after = ([structure(output) for output in cell.outputs] for cell in (old, new))
        if before != after:
            found.append(f"code cell {number} has other outputs than those committed: {after}, was {before}")
    return found


# Running.


def cleaned(notebook: Any) -> Any:
    """Without what differs from run to run: times, versions, names of kernels."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({k: v for k, v in output.metadata.items() if k in output.data})
    return notebook


def executed(notebook: Any, timeout: int = TIMEOUT) -> Any:
    """A copy of the notebook, run from top to bottom in a temporary folder.

    Raises:
        CellExecutionError, CellTimeoutError, DeadKernelError: a cell has failed.
    """
    copy: Any = nbformat.from_dict(notebook)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            copy,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],  # it warns of TCP without encryption on this machine itself
        )
        client.execute()
    return cleaned(copy)


def look_at(path: Path) -> list[str]:
    """What is wrong with a notebook as it is committed."""
    return problems_of(nbformat.read(path, as_version=4), path.stat().st_size)


def run(path: Path, *, write: bool = False, timeout: int = TIMEOUT) -> list[str]:
    """Run a notebook, and say what is wrong with it. With `write`, its outputs are renewed, unless it fails."""
    committed = nbformat.read(path, as_version=4)
    try:
        fresh = executed(committed, timeout)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [f"it fails: {COLOURS.sub('', str(error)).rstrip()}"]
    found = problems_of(fresh)
    if write:
        path.write_text(nbformat.writes(fresh).rstrip("\n") + "\n", encoding="utf-8")
        return list(dict.fromkeys([*found, *look_at(path)]))
    return list(dict.fromkeys([*look_at(path), *found, *differences(committed, fresh)]))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of docs/notebooks")
    parser.add_argument("--write", action="store_true", help="write the outputs into the notebooks")
    parser.add_argument("--check", action="store_true", help="run nothing, look at what is committed")
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help="seconds for one cell (default %(default)s)")
    args = parser.parse_args(argv)
    if args.write and args.check:
        parser.error("--write runs the notebooks and --check does not: give one of them.")
    paths: list[Path] = args.notebooks or sorted(FOLDER.glob("*.ipynb"))
    if missing := [path for path in paths if not path.is_file()]:
        parser.error(f"there is no notebook {missing[0]}.")
    wrong = 0
    for path in paths:
        started = time.monotonic()
        found = look_at(path) if args.check else run(path, write=args.write, timeout=args.timeout)
        seconds = "" if args.check else f"{time.monotonic() - started:6.1f} s  "
        print(f"{seconds}{path.name}: {f'{len(found)} problems' if found else 'good'}", flush=True)
        for each in found:
            print(f"    {each}")
        wrong += bool(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
