"""`e2e-sae completion`: shtab's scripts, from the commands' own parsers."""

from __future__ import annotations

import argparse
import sys

import shtab
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from e2e_sae_plugin.command_line.commands import COMMANDS
from e2e_sae_plugin.command_line.train_flags import TrainParser

# Metavars, and fields of a run, whose values are paths.
FILES = frozenset({"FILE", "DATA", "cfg.dataset_path"})
FOLDERS = frozenset(
    {
        "DIR", "SAE", "SOURCE", "[SAE_ID=]FOLDER", "cfg.output_path", "cfg.checkpoint_path", "cfg.resume_from_checkpoint",
        "cfg.from_pretrained_path",
    }
)  # fmt: skip


def completion_command(args: argparse.Namespace) -> None:
    """Print the script for a shell."""
    sys.stdout.write(f"{shtab.complete(whole_parser(), shell=args.shell)}\n")


def whole_parser() -> argparse.ArgumentParser:
    """All commands as the sub-commands of one parser, which is how shtab reads them; nothing is parsed with it."""
    root = argparse.ArgumentParser(prog="e2e-sae", description="Train sparse autoencoders end to end.")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    for command in COMMANDS.values():
        flags = _of_a_run(command.name) if command.parser is None or command.parse is not None else command.parser()
        _complete_paths(flags)
        # Its actions are taken over as they are; -h is among them already.
        commands.add_parser(command.name, help=command.summary, parents=[flags], add_help=False)
    names = commands.add_parser("help", help="explain a command")
    names.add_argument("command", choices=list(COMMANDS), help="which")
    return root


def _of_a_run(command: str) -> argparse.ArgumentParser:
    """The flags of a run with those of every architecture."""
    whole = argparse.ArgumentParser(add_help=False)
    for architecture in SAE_TRAINING_CLASS_REGISTRY:
        parser = TrainParser(command)
        known = parser.known_options(["--architecture", architecture])
        for action in parser._actions:
            if not set(action.option_strings) & set(whole._option_string_actions):
                whole._add_action(action)
        assert set(known) <= set(whole._option_string_actions)
    return whole


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        names = {action.metavar, action.dest}
        if names & FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif names & FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
