"""What `e2e-sae estimate`, `sweep`, `demo` and `completion` take, and the part of `train` that is not SAELens's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from e2e_sae_plugin.command_line.parser import CommandParser

ESTIMATE = """What a run will cost, before it runs: arithmetic and memory by part, the time from a few real steps on this
machine, and which settings to change if it does not fit or takes too long. Settings are given as to `e2e-sae train`: its
flags, or --config FILE. The steps are on random tokens, so no data are read; nothing is written but --json's file."""

ESTIMATE_EXAMPLES = """\
examples:
  e2e-sae estimate --config run.yaml
  e2e-sae estimate --config run.yaml --no-measure --json cost.json
  e2e-sae estimate --model_name e2e-sae-demo --hook_name blocks.3.hook_resid_pre --d_in 128 --d_sae 1024

e2e-sae train --help explains the flags of a run."""

# As `cost.estimate.DEFAULT_STEPS`, which takes torch to import; a test compares them.
DEFAULT_STEPS = 3

SWEEP = """Train many SAEs side by side: objectives x sparsities x seeds (x hook points), on one stream of tokens and
one clean pass per batch. Each SAE is the one that `e2e-sae train` would train alone. Interrupted, run the same command
again: it goes on where it stood. An SAE that diverges is left out; the others go on."""

SWEEP_FILE = """A sweep's file:

  base:                        # any field of E2ESAERunnerConfig; shared by all
    model_name: e2e-sae-demo   # the bundled model
    dataset_path: e2e-sae-demo
    hook_name: blocks.3.hook_resid_pre
    context_size: 128
    training_tokens: 200_000
    train_batch_size_tokens: 512
    lr: 1.0e-2
    logger: {log_to_wandb: false}
    sae: {architecture: standard, d_in: 128, d_sae: 1024, normalize_activations: expected_average_only_in}
  kinds:                       # each with an objective, its sparsities (l1_coefficient here) and own settings
    local: {objective: local, sparsities: [0.3, 1]}
    e2e: {objective: e2e, sparsities: [0.005, 0.02], lr: 3.0e-3}
    e2e+ds: {objective: {kl: 1, beta: 1.0e-4}, sparsities: [0.03, 0.1]}
  seeds: [0, 1]
  output_path: sweep           # one SAE folder each, and sweep.csv
"""

SWEEP_EXAMPLES = """\
examples:
  e2e-sae sweep --config sweep.yaml
  CUDA_VISIBLE_DEVICES=1 e2e-sae sweep --config sweep.yaml --part 2/2     one of two processes, on a GPU of its own

"""

DEMO = """Train a local, an e2e and an e2e+ds SAE on the bundled language model, at similar L0, and compare them on held-out
files of Python's standard library. Needs no network, no GPU and no account."""

DEMO_EXAMPLES = """\
examples:
  e2e-sae demo
  e2e-sae demo --tokens 200000 --output quick     a fifth of the time, and worse SAEs"""

COMPLETION = """Print a script that completes commands, options and their values in a shell. Making it takes some seconds:
write it to a file once, and again after an upgrade."""

COMPLETION_EXAMPLES = """\
examples:
  e2e-sae completion bash > ~/.local/share/bash-completion/completions/e2e-sae      with the package bash-completion
  e2e-sae completion bash > ~/.e2e-sae.bash; echo 'source ~/.e2e-sae.bash' >> ~/.bashrc
  e2e-sae completion zsh > ~/.zfunc/_e2e-sae      with ~/.zfunc in fpath before compinit"""


def add_file_flags(parser: argparse.ArgumentParser) -> None:
    """What stands beside, or in the place of, the settings of a run."""
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="all settings in a YAML or JSON file, in the place of flags")
    add("--resume", metavar="DIR", help="a checkpoint to go on from, or auto: the newest of this run, if there is one")


def parse_train(argv: Sequence[str]) -> argparse.Namespace:
    """`config`, `resume`, and the other arguments as `settings`: what is among them is not known without SAELens."""
    parser = CommandParser("train", add_help=False)
    add_file_flags(parser)
    args, settings = parser.parse_known_args(list(argv))
    args.settings = settings
    if not argv:
        parser.error("give --config FILE, or the flags of a run.")
    return args


def estimate_parser() -> CommandParser:
    """The parser of what `e2e-sae estimate` takes besides the settings of a run."""
    parser = CommandParser(
        "estimate",
        usage="e2e-sae estimate (--config FILE | flags of e2e-sae train) [--no-measure] [--steps N] [--ranks N] "
        "[--json FILE]",
        description=ESTIMATE,
        examples=ESTIMATE_EXAMPLES,
    )
    add_estimate_flags(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="the run's file, as for e2e-sae train")
    return parser


def add_estimate_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `e2e-sae estimate` alone."""
    add = parser.add_argument
    add(
        "--no-measure",
        dest="measure",
        action="store_false",
        help="run no steps: the model is loaded on the CPU and counted, also for a device that is not here",
    )
    add("--steps", type=int, metavar="N", help=f"timed steps, after one that is not timed (default {DEFAULT_STEPS})")
    add(
        "--ranks",
        type=int,
        metavar="N",
        help="processes that share each step: what each computes, holds and sends (default: one process)",
    )
    add("--json", type=Path, metavar="FILE", help="also write all figures to this file")


def parse_estimate(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of an estimate, and the run's as `settings`."""
    parser = estimate_parser()
    args, settings = parser.parse_known_args(list(argv))
    args.settings = [*settings, *(() if args.config is None else ("--config", str(args.config)))]
    if not args.settings:
        parser.error("give --config FILE, or the flags of `e2e-sae train`.")
    return args


def sweep_parser() -> CommandParser:
    """The parser of `e2e-sae sweep`."""
    parser = CommandParser("sweep", description=SWEEP, examples=SWEEP_EXAMPLES + SWEEP_FILE)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the sweep, in YAML (required)")
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="train every N-th SAE from the I-th on; processes with different parts share the folder, one per GPU "
        "(default %(default)s: all)",
    )
    return parser


def demo_parser() -> CommandParser:
    """The parser of `e2e-sae demo`."""
    parser = CommandParser("demo", description=DEMO, examples=DEMO_EXAMPLES)
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo_output"), metavar="DIR", help="for the SAEs (default %(default)s)")
    add("--tokens", type=int, default=1_000_000, metavar="N", help="training tokens for each SAE (default %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the SAEs' initial weights (default %(default)s)")
    return parser


def completion_parser() -> CommandParser:
    """The parser of `e2e-sae completion`."""
    import shtab  # for this command alone

    parser = CommandParser("completion", description=COMPLETION, examples=COMPLETION_EXAMPLES)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell that the script is for")
    return parser
