"""What `e2e-sae push`, `pretrained` and `convert` take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from e2e_sae_plugin.command_line.parser import CommandParser

PUSH = """Share SAEs on the Hugging Face Hub, in SAELens's format, with a model card: all of it in one commit, or
nothing. Everything is checked and hashed first; what is there already does not go up again, so a push that failed can
be repeated as it was. Log in with `hf auth login`, or set HF_TOKEN."""

PUSH_EXAMPLES = """\
examples:
  e2e-sae push me/gpt2-e2e run_output --dry-run             what would go up; asks the Hub nothing
  e2e-sae push me/gpt2-e2e run_output --private
  e2e-sae push me/gpt2-e2e sweep                            all SAEs of a sweep
  e2e-sae push me/gpt2-e2e layer_6=a/output layer_8=b/output
  e2e-sae evaluate run_output --output run_output/evaluation.json     before it: the card then has these numbers

Anyone loads them with sae_lens.SAE.from_pretrained("me/gpt2-e2e", SAE_ID)."""

PRETRAINED = """List the SAEs that Braun et al. 2024 (arXiv 2405.12241) published of GPT2-small, with the paper's numbers,
and how to load them. Needs no network. "matched": the table that they are in, of similar CE loss increase (ce) or of
similar L0 (l0)."""

PRETRAINED_EXAMPLES = """\
examples:
  e2e-sae pretrained                          all 18
  e2e-sae pretrained --layer 6 --kind e2e+ds"""

CONVERT = """\
Convert checkpoints of the paper's authors' library (e2e_sae) to SAELens SAEs with equal outputs, and their runs to
configs of this package with an equal loss. Writes one folder for each SAE, which SAELens loads. SOURCE is one of
  a run's folder with samples_<N>.pt and final_config.yaml, or one of its .pt files;
  a folder with pairs <name>.pt and <name>.yaml, or one of them by name;
  hf:OWNER/REPO[@REVISION][/NAME];
  wandb:ENTITY/PROJECT/RUN.
Files are read as tensors alone: no code in them is run."""

CONVERT_EXAMPLES = """\
examples:
  e2e-sae convert out/my_run --output converted                                 its last checkpoint, all positions
  e2e-sae convert out/my_run --output converted --samples all --position blocks.6.hook_resid_pre
  e2e-sae convert hf:apollo-research/e2e-saes-gpt2/e2e_similar_ce_layer_6 --output converted"""


def push_parser() -> CommandParser:
    """The parser of `e2e-sae push`."""
    parser = CommandParser("push", description=PUSH, examples=PUSH_EXAMPLES)
    add = parser.add_argument
    add("repository", metavar="OWNER/NAME", help="created where it is missing")
    add(
        "saes",
        nargs="+",
        metavar="[SAE_ID=]FOLDER",
        help="an SAE's folder, a checkpoint's, or one of several SAEs. Default id: of one SAE its hook's name, of several "
        "their folders' names",
    )
    add("--private", action="store_true", help="a repository that is created is private; refused for a public one")
    add("--revision", metavar="BRANCH", help="default: main; created from it where it is missing")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--overwrite", action="store_true", help="replace other SAEs that the repository has under the same ids")
    add(
        "--license",
        metavar="ID",
        help='of the SAEs, as the Hub spells it, such as "mit" (default: what the card says already)',
    )
    add("--message", metavar="TEXT", help="of the commit (default: one that names the SAEs)")
    add("--dry-run", action="store_true", help="check everything and print what would go up, asking the Hub nothing")
    return parser


def pretrained_parser() -> CommandParser:
    """The parser of `e2e-sae pretrained`."""
    parser = CommandParser("pretrained", description=PRETRAINED, examples=PRETRAINED_EXAMPLES)
    add = parser.add_argument
    add("--layer", type=int, choices=(2, 6, 10), help="those of one layer (default: all)")
    add("--kind", choices=("local", "e2e", "e2e+ds"), help="those of one objective (default: all)")
    add("--matched", choices=("ce", "l0"), help="those of one table (default: both)")
    add("--json", action="store_true", help="as JSON, for programs")
    return parser


def convert_parser() -> CommandParser:
    """The parser of `e2e-sae convert`."""
    parser = CommandParser("convert", description=CONVERT, examples=CONVERT_EXAMPLES)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a run, a checkpoint, or where they are: see above")
    add("--output", type=Path, required=True, metavar="DIR", help="gets a folder for each SAE (required)")
    add("--samples", type=_samples, metavar="N", help="which samples_<N>.pt of a run, or all (default: the largest N)")
    add(
        "--position",
        action="append",
        metavar="HOOK",
        help="convert the SAE at this hook alone; may be repeated (default: all)",
    )
    add("--layers", type=int, metavar="L", help="blocks of the model, where they are needed and not known")
    return parser


def _samples(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of samples, or all, got {text!r}") from None
