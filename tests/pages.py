"""The code blocks of README and documentation: read from the pages, run one after the other as a reader would.

    python tests/pages.py docs/getting_started.md build/clean/bin     # a page in another environment

What a block is decided by its fence and its first line:

* `python` runs in the page's own namespace, `bash` in the page's own folder, where `yaml title="name.yaml"` is saved;
* a first line `# needs ...` (the Hub, a GPU, a file of yours) says what it cannot have here. It is compiled and type-checked
  all the same, and its commands have to be ones that the program takes;
* `diff` shows two scripts, each of which compiles; `text` is output.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from sybil import Document
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from time_limits import hang_seconds

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
LANGUAGES = {"python", "bash", "yaml", "diff", "text", "bibtex"}
INFO = re.compile(r'(?P<language>\w*) *(?:title="(?P<title>[^"]+)")?[^\n]*\n', re.MULTILINE)
COMMANDS = ("e2e-sae", "torchrun", "make")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Of its fence."""
    language: str
    title: str | None
    source: str

    @property
    def needs(self) -> str | None:
        """What it cannot have in a test; None where it runs."""
        found = re.match(r"(?:#!.*\n)?# needs (.+)", self.source)
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    document = Document(page.read_text(), str(page))
    return [
        Block(
            page,
            document.text.count("\n", 0, region.start) + 1,
            region.lexemes["language"] or "",
            region.lexemes["title"],
            str(region.lexemes["source"]),
        )
        for region in RawFencedCodeBlockLexer(INFO)(document)
    ]


def run(page: Path, folder: Path) -> None:
    """Run a page's blocks in `folder`, which is the current directory; an error names the block."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        try:
            if block.language == "yaml" and block.title:
                (folder / block.title).write_text(block.source)
            if block.language == "python" and block.needs is None:
                code = compile("\n" * block.line + block.source, str(page), "exec")
                exec(code, namespace)
            if block.language == "bash":
                run_commands(block, folder) if block.needs is None else check_commands(block)
        except BaseException as error:
            error.add_note(f"in the block at {block}")
            raise


def run_elsewhere(page: Path, folder: Path, bin_folder: Path) -> None:
    """The same with the programs of another environment; what is printed is printed."""
    python: list[str] = []
    for block in blocks(page):
        if block.language == "yaml" and block.title:
            (folder / block.title).write_text(block.source)
        if block.needs is not None or block.language not in ("python", "bash"):
            continue
        if block.language == "python":
            python.append(block.source)
            command = shlex.join([str(bin_folder / "python"), "-I", "-c", "\n".join(python)])
            block = replace(block, source=command)
        sys.stdout.write(f"{block}\n{run_commands(block, folder, bin_folder)}")


def run_commands(block: Block, folder: Path, bin_folder: Path = Path(sys.executable).parent) -> str:
    """Run a bash block with the programs of `bin_folder`; what it prints."""
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # as in the Python blocks: sums depend on it
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.source],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * hang_seconds(),
    )
    assert done.returncode == 0, f"{block} ended with status {done.returncode}:\n{done.stdout}"
    return done.stdout


def check_commands(block: Block) -> None:
    """The commands of a block that does not run are ones that their programs take."""
    for words in commands(block):
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert all(word in targets for word in words[1:] if "=" not in word), f"{block}: no such target: {words}"
            continue
        if words[0] == "torchrun":
            if "e2e_sae_plugin" not in words:
                continue  # a script of the reader's
            words = words[words.index("e2e_sae_plugin") :]
        check_arguments(words[1:], str(block))


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a bash block that are this project's, word by word."""
    for line in block.source.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|;|\||&", line):
            words = shlex.split(command.partition(">")[0], comments=True)
            if words and words[0] in COMMANDS:
                yield words


def check_arguments(argv: list[str], where: str) -> None:
    """The command takes these arguments, and the run that they or their file set is one; nothing is run."""
    from e2e_sae_plugin.command_line import train_command
    from e2e_sae_plugin.command_line.commands import COMMANDS

    command, arguments = argv[0], argv[1:]
    try:
        args = COMMANDS[command].arguments(arguments)
        if command in ("train", "estimate"):
            run_arguments = arguments if command == "train" else args.settings
            train_command.parse_train_config(run_arguments, command)
    except (ValueError, KeyError, SystemExit) as error:
        raise AssertionError(f"{where}: e2e-sae {shlex.join(argv)} is refused: {error}") from error


def check_yaml(block: Block) -> None:
    """It is YAML, a mapping."""
    assert isinstance(yaml.safe_load(block.source), dict), f"{block} is no YAML mapping"


def sides(block: Block) -> tuple[str, str]:
    """What a diff goes from, and to."""
    lines = block.source.splitlines()
    old, new = ("\n".join(line[2:] for line in lines if line[:1] != other) for other in ("+", "-"))
    return old, new


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        run_elsewhere(Path(sys.argv[1]).resolve(), Path(place), Path(sys.argv[2]).resolve())
