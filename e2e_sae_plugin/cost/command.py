"""`e2e-sae estimate`."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.cost.estimate import DEFAULT_STEPS, estimate_run
from e2e_sae_plugin.cost.report import report, to_dict

ParseConfig = Callable[[Sequence[str]], E2ESAERunnerConfig]


def estimate_command(args: argparse.Namespace, parse_config: ParseConfig) -> None:
    """Print what a run will cost.

    Args:
        args: those of this command; `settings` has the others.
        parse_config: reads these as `e2e-sae train` reads its own.

    Raises:
        ValueError: a setting that a run would refuse too, or flags that contradict each other.
    """
    if not args.measure and args.steps is not None:
        raise ValueError("--steps has no effect with --no-measure. Leave one of them out.")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}.")
    if any(each.partition("=")[0] == "--resume" for each in args.settings):
        raise ValueError("--resume has no effect on an estimate, which is that of the whole run. Leave it out.")
    if args.json is not None:
        _check_json(args.json)
    host_logger = logging.getLogger("sae_lens")
    level = host_logger.level
    host_logger.setLevel(logging.WARNING)  # it counts steps and logs of the run that is not made
    try:
        n_steps = (args.steps or DEFAULT_STEPS) if args.measure else 0
        estimate = estimate_run(parse_config(args.settings), n_steps, args.ranks)
    finally:
        host_logger.setLevel(level)
    print(report(estimate))
    if args.json is not None:
        args.json.write_text(json.dumps(to_dict(estimate), indent=2) + "\n")


def _check_json(path: Path) -> None:
    """Before the steps, which may take minutes.

    Raises:
        ValueError: it cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"--json {str(path)!r} is a folder. Name a file in it.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--json: there is no folder {str(folder)!r} to write into. Make it, or name another.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"--json {str(path)!r} cannot be written: no permission. Name another file.")
