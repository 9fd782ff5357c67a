"""`e2e-sae train`, and what `e2e-sae estimate` shares with it: a run from flags or from a file."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from functools import partial

from e2e_sae_plugin.checkpoint.resume import AUTO
from e2e_sae_plugin.command_line.run_flags import parse_train
from e2e_sae_plugin.command_line.train_flags import TrainParser, config_from_flags
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.config_reading import read_yaml
from e2e_sae_plugin.cost.command import estimate_command
from e2e_sae_plugin.distributed import join
from e2e_sae_plugin.joint import MultiE2ESAERunnerConfig, MultiE2ESAETrainingRunner
from e2e_sae_plugin.rank_checks import check_alone
from e2e_sae_plugin.runner import E2ESAETrainingRunner


def train(args: argparse.Namespace) -> None:
    """Train from flags or from a YAML file, by one process or by all that torchrun has started: one SAE, or with `saes` in
    the file several."""
    if {"-h", "--help"} & set(args.settings):
        TrainParser().parse_args(args.settings)  # prints, and exits
    ranks = join()
    with contextlib.nullcontext() if ranks is None else ranks.all_or_none():
        several = _config_of_several(args)
        cfg = config_of(args) if several is None else None
    if several is not None:
        check_alone("A run of several SAEs", "Start it once, without torchrun.")
        MultiE2ESAETrainingRunner(several).run()
    elif cfg is not None:
        E2ESAETrainingRunner(cfg).run()


def estimate(args: argparse.Namespace) -> None:
    """Say what the run of these arguments will cost."""
    estimate_command(args, parse_config=partial(parse_train_config, command="estimate"))


def _config_of_several(args: argparse.Namespace) -> MultiE2ESAERunnerConfig | None:
    """The config of a file that names several SAEs; None for one SAE.

    Raises:
        ValueError: other flags beside it, or what the config refuses.
    """
    if args.config is None or not args.config.is_file() or "saes" not in (content := read_yaml(args.config)):
        return None  # what is wrong with them is said as for one SAE
    flags = [*args.settings, *([] if args.resume in (None, AUTO) else ["--resume", args.resume])]
    if flags:
        raise ValueError(
            f"--config names several SAEs and holds every setting, so it takes no other flags; got {' '.join(flags)}. "
            "Such a run goes on where it stood by itself (--resume auto says nothing new)."
        )
    return MultiE2ESAERunnerConfig.from_dict(content)


def parse_train_config(argv: Sequence[str], command: str = "train") -> E2ESAERunnerConfig:
    """The config that `e2e-sae train` runs.

    Args:
        argv: its arguments.
        command: in whose name flags are refused.

    Raises:
        ValueError: `--config` beside other flags than --resume, a file that is no mapping, or what the config refuses.
    """
    return config_of(parse_train(argv), command)


def config_of(args: argparse.Namespace, command: str = "train") -> E2ESAERunnerConfig:
    """The same of what `parse_train` made of the arguments."""
    if args.config is None:
        resume = [] if args.resume is None else ["--resume_from_checkpoint", args.resume]
        return config_from_flags([*args.settings, *resume], command)
    if args.settings:
        raise ValueError(
            "--config holds every setting but --resume, so it takes no other flags; got "
            f"{' '.join(args.settings)}. Put them into the file, or leave --config out."
        )
    return E2ESAERunnerConfig.load(
        args.config, **({} if args.resume is None else {"resume_from_checkpoint": args.resume})
    )
