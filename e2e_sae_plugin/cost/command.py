"""`e2e-sae estimate`."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.cost.estimate import DEFAULT_STEPS, estimate_run
from e2e_sae_plugin.cost.report import report, to_dict

DESCRIPTION = """What a run will cost, before it runs: arithmetic and memory by part, the time from a few real steps on this
machine, and which settings to change if it does not fit or takes too long. Settings are given as to `e2e-sae train`: its
flags, or --config FILE. The steps are on random tokens, so no data are read; nothing is written but --json's file."""

ParseConfig = Callable[[Sequence[str]], E2ESAERunnerConfig]


def estimate_command(argv: Sequence[str], parse_config: ParseConfig) -> None:
    """Print what a run will cost.

    Args:
        parse_config: reads the arguments that are left as `e2e-sae train` reads its own.

    Raises:
        ValueError: a setting that a run would refuse too, or flags that contradict each other.
    """
    parser = _parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        if not argv:
            raise ValueError("give --config FILE, or the flags of `e2e-sae train`.")
        return
    args, settings = parser.parse_known_args(list(argv))
    if not args.measure and args.steps is not None:
        raise ValueError("--steps has no effect with --no-measure. Leave one of them out.")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}.")
    if "--resume" in settings:
        raise ValueError("--resume has no effect on an estimate, which is that of the whole run. Leave it out.")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json: there is no folder {str(args.json.absolute().parent)!r} to write into.")
    if not settings:
        raise ValueError("give --config FILE, or the flags of `e2e-sae train`.")
    host_logger = logging.getLogger("sae_lens")
    level = host_logger.level
    host_logger.setLevel(logging.WARNING)  # it counts steps and logs of the run that is not made
    try:
        n_steps = (args.steps or DEFAULT_STEPS) if args.measure else 0
        estimate = estimate_run(parse_config(settings), n_steps, args.ranks)
    finally:
        host_logger.setLevel(level)
    print(report(estimate))
    if args.json is not None:
        args.json.write_text(json.dumps(to_dict(estimate), indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="e2e-sae estimate",
        usage="e2e-sae estimate (--config FILE | flags of e2e-sae train) [--no-measure] [--steps N] [--ranks N] "
        "[--json FILE]",
        description=DESCRIPTION,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--no-measure",
        dest="measure",
        action="store_false",
        help="run no steps: the model is loaded on the CPU and counted, also for a device that is not here",
    )
    parser.add_argument("--steps", type=int, help=f"timed steps, after one that is not timed (default {DEFAULT_STEPS})")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes that share each step: what each computes, holds and sends"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    return parser
