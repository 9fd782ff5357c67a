"""The command line: `e2e-sae <command>`."""

import argparse
import contextlib
import dataclasses
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import make_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig
from simple_parsing import ArgumentParser, subgroups

from e2e_sae_plugin._version import __version__
from e2e_sae_plugin.checkpoint.resume import AUTO
from e2e_sae_plugin.comparison.command import compare_command, evaluate_command
from e2e_sae_plugin.config import MODEL_CLASSES, E2ESAERunnerConfig, read_yaml
from e2e_sae_plugin.config_fields import FIELDS_REFUSED, FIELDS_WITHOUT_EFFECT
from e2e_sae_plugin.convert.command import convert_command
from e2e_sae_plugin.cost.command import estimate_command
from e2e_sae_plugin.distributed import LostRankError, join, joined
from e2e_sae_plugin.faults import NonFiniteError
from e2e_sae_plugin.finetune.command import finetune
from e2e_sae_plugin.hub.pretrained_command import pretrained_command
from e2e_sae_plugin.hub.push_command import push_command
from e2e_sae_plugin.interruption import RunInterrupted
from e2e_sae_plugin.joint import MultiE2ESAERunnerConfig, MultiE2ESAETrainingRunner
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.rank_checks import check_alone
from e2e_sae_plugin.runner import E2ESAETrainingRunner
from e2e_sae_plugin.sweep.command import sweep
from e2e_sae_plugin.sweep.runner import SweepFailed

USAGE = """usage: e2e-sae [--version] [--help] <command> ...

Train sparse autoencoders end to end, plugged into SAELens.

commands:
  train      train an SAE; flags of SAELens's runner and of the objective, or --config run.yaml
  estimate   what a run will cost, before it runs: arithmetic, memory by part, time, what to change
  finetune   make a finished SAE faithful: a short run on KL + MSE, and a table of before and after
  sweep      train many SAEs side by side on one clean pass: objectives x sparsities x seeds
  evaluate   measure one SAE: what it costs the model, how sparse it is, what becomes of later layers
  compare    several SAEs on one page: Pareto fronts, pathways, geometry, the most important features
  push       share SAEs on the Hugging Face Hub, with a model card, in one commit
  pretrained the published end-to-end SAEs of GPT-2 and how to load them
  convert    checkpoints and configs of the paper's authors' library -> SAELens SAEs
  demo       train a local, an e2e and an e2e+ds SAE on the bundled language model, offline, in minutes

e2e-sae <command> --help explains a command.
Several GPUs or machines: torchrun --nproc-per-node N -m e2e_sae_plugin train ..."""

ON_SEVERAL_RANKS = ("train",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 done; 2 a setting that is refused; 1 a run that failed for a reason outside it (the disk, numbers that are not
    finite); 130 and 143 after SIGINT and SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"e2e-sae-plugin {__version__}")
        return 0
    commands = {"train": train, "finetune": finetune, "sweep": sweep, "demo": demo}
    commands |= {"estimate": partial(estimate_command, parse_config=parse_train_config)}
    commands |= {"evaluate": evaluate_command, "compare": compare_command}
    commands |= {"push": push_command, "pretrained": pretrained_command, "convert": convert_command}
    if argv[0] not in commands:
        print(f"{USAGE}\n\ne2e-sae: unknown command {argv[0]!r}, expected one of {sorted(commands)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for client in ("httpx", "httpx2"):  # the Hub's, which logs a line for each request
        logging.getLogger(client).setLevel(logging.WARNING)
    # The host's own line of code, warned about again and again where data are tensors already.
    warnings.filterwarnings("ignore", message="To copy construct from a tensor")
    try:
        if argv[0] not in ON_SEVERAL_RANKS:
            _check_alone(argv[0])
        commands[argv[0]](argv[1:])
    except ValueError as error:
        _print_error(argv[0], error)
        return 2
    except (OSError, NonFiniteError, SweepFailed, LostRankError) as error:
        _print_error(argv[0], error)
        return 1
    except RunInterrupted as interrupted:
        return 128 + interrupted.signal_number
    except KeyboardInterrupt:
        return 130
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
        print(text, file=sys.stderr)


def train(argv: Sequence[str]) -> None:
    """Train from flags or from a YAML file, by one process or by all that torchrun has started: one SAE, or with `saes` in
    the file several."""
    ranks = join()
    with contextlib.nullcontext() if ranks is None else ranks.all_or_none():
        several = _config_of_several(argv)
        cfg = parse_train_config(argv) if several is None else None
    if several is not None:
        check_alone("A run of several SAEs", "Start it once, without torchrun.")
        MultiE2ESAETrainingRunner(several).run()
    elif cfg is not None:
        E2ESAETrainingRunner(cfg).run()


def _config_of_several(argv: Sequence[str]) -> MultiE2ESAERunnerConfig | None:
    """The config of a file that names several SAEs; None for one SAE.

    Raises:
        ValueError: other flags beside it, or what the config refuses.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path)
    files.add_argument("--resume")
    chosen, flags = files.parse_known_args(list(argv))
    if chosen.config is None or not chosen.config.is_file() or "saes" not in (content := read_yaml(chosen.config)):
        return None  # what is wrong with them is said as for one SAE
    flags += [] if chosen.resume in (None, AUTO) else ["--resume", chosen.resume]
    if flags:
        raise ValueError(
            f"--config names several SAEs and holds every setting, so it takes no other flags; got {' '.join(flags)}. "
            "Such a run goes on where it stood by itself (--resume auto says nothing new)."
        )
    return MultiE2ESAERunnerConfig.from_dict(content)


def parse_train_config(argv: Sequence[str]) -> E2ESAERunnerConfig:
    """The config that `e2e-sae train` runs.

    Raises:
        ValueError: `--config` beside other flags than --resume, a file that is no mapping, or what the config refuses.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path)
    files.add_argument("--resume")
    chosen, flags = files.parse_known_args(list(argv))
    if chosen.config is None:
        flags += [] if chosen.resume is None else ["--resume_from_checkpoint", chosen.resume]
        return _config_from_flags(flags or ["--help"])
    if flags:
        raise ValueError(
            f"--config holds every setting but --resume, so it takes no other flags; got {' '.join(flags)}."
        )
    return load_config(chosen.config, **({} if chosen.resume is None else {"resume_from_checkpoint": chosen.resume}))


def load_config(path: Path, **overrides: Any) -> E2ESAERunnerConfig:
    """Read a YAML (or JSON) file with the fields of `E2ESAERunnerConfig`; what it leaves out takes the default.

    Raises:
        ValueError: there is no such file, it is no mapping, or it holds an unknown key or a refused value.
    """
    content = read_yaml(path)
    if "saes" in content:
        raise ValueError(
            f"{str(path)!r} names several SAEs (saes), and this is for a run with one. e2e-sae train takes such a file; in "
            "Python, MultiE2ESAERunnerConfig.load does."
        )
    return E2ESAERunnerConfig.from_dict({**content, **overrides})


def _config_from_flags(flags: Sequence[str]) -> E2ESAERunnerConfig:
    """Flags from the config class and the registry of architectures, as SAELens's own runner builds them."""
    architectures: dict[str, Any] = {
        name: partial(config_class, d_in=512, d_sae=1024)
        for name, (_, config_class) in SAE_TRAINING_CLASS_REGISTRY.items()
    }
    command_line_class = make_dataclass(
        "CommandLineRunnerConfig",
        [("sae", TrainingSAEConfig, subgroups(architectures, default="standard", alias="--architecture"))],
        bases=(E2ESAERunnerConfig,),
    )
    command_line_class.__doc__ = "The run."
    parser = _TrainParser(
        prog="e2e-sae train",
        description="Train an SAE end to end. Settings come from these flags, or all of them from --config FILE (YAML). "
        "--resume DIR (or auto) goes on from a checkpoint, with either. A file with `saes` trains several SAEs in one run.",
    )
    parser.add_arguments(command_line_class, dest="cfg")
    config: E2ESAERunnerConfig = parser.parse_args(list(flags)).cfg
    return config


class _TrainParser(ArgumentParser):
    """Takes the flags' help from docstrings, not from comments near the fields (as SAELens's own parser does), and says
    which of the host's fields are read otherwise here."""

    def _resolve_subgroups(self, wrappers: Any, args: Any, namespace: Any = None) -> Any:
        resolved, chosen = super()._resolve_subgroups(wrappers, args, namespace)
        for root in resolved:
            for wrapper in [root, *root.descendants]:
                for field in wrapper.fields:
                    text = field._docstring
                    # A `#` comment is not help; a string below a field is, in our own classes alone.
                    below = text.docstring_below if wrapper.dataclass is Objective else ""
                    override = FIELD_HELP.get(field.name)
                    described = override or text.desc_from_cls_docstring
                    field._docstring = dataclasses.replace(
                        text,
                        comment_above="",
                        comment_inline="",
                        docstring_below="" if override else below,
                        desc_from_cls_docstring=described,
                    )
        return resolved, chosen


FIELD_HELP = {
    "hook_name": "A TransformerLens hook, or a module path such as model.layers.9 for AutoModelForCausalLM.",
    "model_class_name": f"One of {', '.join(MODEL_CLASSES)}.",
    **{name: f"Refused unless left at its default: {reason}." for name, reason in FIELDS_REFUSED.items()},
    **dict.fromkeys(FIELDS_WITHOUT_EFFECT, "No effect in end-to-end training."),
}


def demo(argv: Sequence[str]) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        prog="e2e-sae demo",
        description="Train a local, an e2e and an e2e+ds SAE on the bundled language model, at similar L0, and compare "
        "them on held-out files of Python's standard library. Needs no network, no GPU and no account.",
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the SAEs (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens for each SAE (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the SAEs' initial weights (%(default)s)")
    args = parser.parse_args(list(argv))
    from e2e_sae_plugin.demo.run import run_demo  # only the demo needs its model and data

    print(run_demo(args.output, args.tokens, args.seed))


if __name__ == "__main__":
    sys.exit(main())
