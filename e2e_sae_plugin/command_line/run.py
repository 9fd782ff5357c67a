"""A command from its arguments to the exit status."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable

from e2e_sae_plugin.cache_folders import explained_cache_errors
from e2e_sae_plugin.distributed import LostRankError, join, joined
from e2e_sae_plugin.faults import NonFiniteError
from e2e_sae_plugin.interruption import RunInterrupted
from e2e_sae_plugin.rank_checks import check_alone
from e2e_sae_plugin.sweep.runner import SweepFailed

ON_SEVERAL_RANKS = ("train",)


def run(command: str, function: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command; returns the exit status.

    0 done; 2 a setting that is refused; 1 a run that failed for a reason outside it (the disk, numbers that are not
    finite); 130 and 143 after SIGINT and SIGTERM.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for client in ("httpx", "httpx2"):  # the Hub's, which logs a line for each request
        logging.getLogger(client).setLevel(logging.WARNING)
    # The host's: its own line of code where data are tensors already; advice that every command here follows.
    warnings.filterwarnings("ignore", message="To copy construct from a tensor")
    warnings.filterwarnings("ignore", message="\nThis SAE has non-empty model_from_pretrained_kwargs")
    try:
        if command not in ON_SEVERAL_RANKS:
            _check_alone(command)
        with explained_cache_errors():
            function(args)
    except ValueError as error:
        _print_error(command, error)
        return 2
    except (OSError, NonFiniteError, SweepFailed, LostRankError) as error:
        _print_error(command, error)
        return 1
    except RunInterrupted as interrupted:
        return 128 + interrupted.signal_number
    return 0


def _check_alone(command: str) -> None:
    join()  # so that one rank can speak for all
    check_alone(
        f"e2e-sae {command}",
        "Start it once; each GPU can train a part of a sweep: e2e-sae sweep --part I/N."
        if command == "sweep"
        else "Start it once, without torchrun.",
    )


def _print_error(command: str, error: Exception) -> None:
    """Once, where all ranks have the same."""
    ranks, text = joined(), f"e2e-sae {command}: {error}"
    if ranks is None or ranks.speaks(text):
        sys.stderr.write(f"{text}\n")
