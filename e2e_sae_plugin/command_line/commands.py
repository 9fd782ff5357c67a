"""The commands: what each is called, takes and runs, without importing what it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from e2e_sae_plugin.command_line import hub_flags, run_flags, sae_flags
from e2e_sae_plugin.command_line.parser import CommandParser

Parse = Callable[[Sequence[str]], argparse.Namespace]


@dataclass(frozen=True)
class Command:
    """One of them."""

    name: str
    summary: str
    """One line, for the list of all."""
    runs: str
    """`module:function` below the package, imported when the command is chosen."""
    parser: Callable[[], CommandParser] | None = None
    """None for `train`, whose flags take SAELens to build."""
    parse: Parse | None = None
    """Where some arguments are left for the function; default: by the parser."""

    def arguments(self, argv: Sequence[str]) -> argparse.Namespace:
        """What the function gets. Exits where they are wrong, or ask for help."""
        if self.parse is not None:
            return self.parse(argv)
        assert self.parser is not None
        return self.parser().parse_args(argv)


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "train",
            "train an SAE; flags of SAELens's runner and of the objective, or --config run.yaml",
            "command_line.train_command:train",
            parse=run_flags.parse_train,
        ),
        Command(
            "estimate",
            "what a run will cost, before it runs: arithmetic, memory by part, time, what to change",
            "command_line.train_command:estimate",
            run_flags.estimate_parser,
            run_flags.parse_estimate,
        ),
        Command(
            "finetune",
            "make a finished SAE faithful: a short run on KL + MSE, and a table of before and after",
            "finetune.command:finetune",
            sae_flags.finetune_parser,
        ),
        Command(
            "sweep",
            "train many SAEs side by side on one clean pass: objectives x sparsities x seeds",
            "sweep.command:sweep",
            run_flags.sweep_parser,
        ),
        Command(
            "evaluate",
            "measure one SAE: what it costs the model, how sparse it is, what becomes of later layers",
            "comparison.command:evaluate_command",
            sae_flags.evaluate_parser,
        ),
        Command(
            "compare",
            "several SAEs on one page: Pareto fronts, pathways, geometry, the most important features",
            "comparison.command:compare_command",
            sae_flags.compare_parser,
        ),
        Command(
            "push",
            "share SAEs on the Hugging Face Hub, with a model card, in one commit",
            "hub.push_command:push_command",
            hub_flags.push_parser,
        ),
        Command(
            "pretrained",
            "the published end-to-end SAEs of GPT-2 and how to load them",
            "hub.pretrained_command:pretrained_command",
            hub_flags.pretrained_parser,
        ),
        Command(
            "convert",
            "checkpoints and configs of the paper's authors' library -> SAELens SAEs",
            "convert.command:convert_command",
            hub_flags.convert_parser,
        ),
        Command(
            "demo",
            "train a local, an e2e and an e2e+ds SAE on the bundled language model, offline, in minutes",
            "demo.run:demo_command",
            run_flags.demo_parser,
        ),
        Command(
            "completion",
            "print a script that completes commands and options in your shell",
            "command_line.completion:completion_command",
            run_flags.completion_parser,
        ),
    )
}


def usage() -> str:
    """What `e2e-sae --help` prints."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS.values())
    return f"""usage: e2e-sae [--version] [--help] <command> ...

Train sparse autoencoders end to end, plugged into SAELens.

commands:
{lines}

e2e-sae <command> --help (or e2e-sae help <command>) explains a command. To begin: e2e-sae demo
Several GPUs or machines: torchrun --nproc-per-node N -m e2e_sae_plugin train ..."""
