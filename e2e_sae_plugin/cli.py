"""The command line: `e2e-sae <command>`.

Nothing is imported here that takes time: torch and SAELens come with the command that is chosen, once its arguments are
known to be right.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NoReturn

from e2e_sae_plugin._version import __version__
from e2e_sae_plugin.command_line.commands import COMMANDS, usage
from e2e_sae_plugin.command_line.suggestions import did_you_mean

INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, whose meaning is that of `command_line.run.run`.

    Raises:
        SystemExit: arguments that are refused, or help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(argv: list[str]) -> int:
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"e2e-sae-plugin {__version__}")
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        print(_unknown(argv[0]), file=sys.stderr)
        return 2
    args = command.arguments(argv[1:])
    with _interruptible_imports():
        run = _imported("command_line.run:run")
        function = _imported(command.runs)
    return run(command.name, function, args)


def _unknown(word: str) -> str:
    what, known = ("option", ["--help", "--version"]) if word.startswith("-") else ("command", [*COMMANDS, "help"])
    hint = did_you_mean(word, known)
    expected = "" if hint else f" Expected {'one of ' if what == 'command' else ''}{', '.join(known)}."
    return f"e2e-sae: unknown {what} {word!r}.{hint}{expected}\ne2e-sae --help explains the commands."


def _imported(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(import_module(f"e2e_sae_plugin.{module}"), name)


@contextlib.contextmanager
def _interruptible_imports() -> Iterator[None]:
    """Ctrl-C ends the process at once while libraries are imported, which takes seconds: a `KeyboardInterrupt` in the middle
    of one may be swallowed there, or come out as another error. Nothing has begun yet that would have to be tidied up."""
    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield
        return

    def leave(_number: int, _frame: Any) -> NoReturn:
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
