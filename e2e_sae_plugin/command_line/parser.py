"""The parser of every command: errors of a line or two, in the command's name, with what may have been meant."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from e2e_sae_plugin.command_line.suggestions import did_you_mean

# What argparse takes for a value, though it begins with a dash.
_NEGATIVE_NUMBER = re.compile(r"-(\d|\.\d)")


class CommandParser(argparse.ArgumentParser):
    """The parser of `e2e-sae <command>`. Options are not abbreviated, so that a new one changes no script.

    Args:
        command: its name; errors begin with it.
        examples: what the help ends with.
        **kwargs: of `ArgumentParser`.
    """

    def __init__(self, command: str, *, examples: str = "", **kwargs: Any):
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": examples}
        super().__init__(prog=f"e2e-sae {command}", allow_abbrev=False, **{**defaults, **kwargs})

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]  # typeshed has overloads
        """Like argparse's, but an unknown option is refused before all else: a required one that is misspelt would
        otherwise be called missing."""
        given = list(sys.argv[1:] if args is None else args)
        known = self.known_options(given)
        if not {"-h", "--help"} & set(given):
            unknown = [name for name in _options_among(given) if name not in known]
            if unknown:
                self.error(" ".join(self.explain_unknown(name, known) for name in dict.fromkeys(unknown)))
        found, rest = self.parse_known_args(given, namespace)
        rest = [each for each in rest if each != "--"]
        if rest:
            self.error(f"unexpected {_plural('argument', rest)} {' '.join(rest)}.")
        return found

    def known_options(self, args: Sequence[str]) -> list[str]:
        """All options, for these arguments: some decide which others there are."""
        del args
        return list(self._option_string_actions)

    def explain_unknown(self, name: str, known: Iterable[str]) -> str:
        """What is said of an option that does not exist."""
        return f"unknown option {name}.{did_you_mean(name, [each for each in known if each.startswith('--')])}"

    def error(self, message: str) -> NoReturn:
        """Without argparse's usage, whose hundred options would push the message off the screen."""
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help explains every option.\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError:
            choices = [str(choice) for choice in action.choices or ()]
            hint = did_you_mean(str(value), choices)
            raise argparse.ArgumentError(
                action, f"expected one of {', '.join(choices)}, got {str(value)!r}.{hint}"
            ) from None


def _options_among(args: Sequence[str]) -> list[str]:
    """The arguments that argparse takes for options, without `=VALUE`."""
    before = args[: args.index("--")] if "--" in args else args
    return [
        each.partition("=")[0]
        for each in before
        if each.startswith("-") and each != "-" and " " not in each and not _NEGATIVE_NUMBER.match(each)
    ]


def _plural(word: str, things: Sequence[Any]) -> str:
    return word if len(things) == 1 else f"{word}s"


def yes_or_no(text: str) -> bool:
    """`yes` or `no` as a switch.

    Raises:
        argparse.ArgumentTypeError: If it is neither.
    """
    if text.lower() not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"expected yes or no, got {text!r}")
    return text.lower() == "yes"


def special_tokens(text: str) -> bool | list[int]:
    """`yes`, `no` or `0,2`: all special tokens, none, or those of some ids.

    Raises:
        argparse.ArgumentTypeError: If it is none of these.
    """
    if text.lower() in ("yes", "no"):
        return text.lower() == "yes"
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected yes, no, or token ids such as 0,2; got {text!r}") from None


def number_of_tokens(text: str) -> int:
    """`25M`, `1.5k`, `2e6` or `1000` as a whole number.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if factor > 1 else text) * factor
        if value != int(value) or value < 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a number of tokens such as 25M or 100000, got {text!r}") from None
    return int(value)
