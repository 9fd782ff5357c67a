"""What `e2e-sae finetune`, `evaluate` and `compare` take: commands for SAEs that exist."""

from __future__ import annotations

import argparse
from pathlib import Path

from e2e_sae_plugin.command_line.parser import CommandParser, number_of_tokens, special_tokens, yes_or_no

# As in `config`, `finetune.recipe`, which take torch to import; a test compares them.
MODEL_CLASSES = ("HookedTransformer", "TransformerBridge", "AutoModelForCausalLM")
DTYPES = ("float32", "bfloat16", "float16")
TRAINED = ("all", "decoder", "scale_and_bias", "lora")
TRAINING_TOKENS, EVALUATION_TOKENS = 25_000_000, 131_072

DATA_FLAGS = ("streaming", "split", "text_column", "shuffle_seed", "skip_examples", "max_examples")
"""Fields of `DataSettings`, besides the dataset itself."""
TOKEN_FLAGS = ("context_size", "prepend_bos", "exclude_special_tokens", "seqpos_slice")

DEVICE = "cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)"

FINETUNE = """\
Fine-tune a finished SAE, so that the model's output survives it: a short run on KL + MSE (Karvonen 2025, arXiv 2503.17272).
Model, hook, context, BOS and data come from the SAE's metadata; flags win over them. Prints what the SAE costs the model
before and after, and writes an SAE of the same form with its features in the same places, a report, and what became of each
feature."""

FINETUNE_EXAMPLES = """\
examples:
  e2e-sae finetune --sae gemma-scope-2b-pt-res-canonical --sae-id layer_12/width_16k/canonical --output tuned --device cuda
  e2e-sae finetune --sae my_sae/ --dataset monology/pile-uncopyrighted --streaming --tokens 5M --output tuned
  e2e-sae finetune --sae my_sae/ --trained scale_and_bias --tokens 2M --output tuned     the cheapest correction
  e2e-sae finetune --sae my_sae/ --output tuned --resume auto     goes on where it was stopped"""

SOURCES = """\
An SAE is a folder, RELEASE:SAE_ID for one of SAELens's releases, or OWNER/REPO:SAE_ID (OWNER/REPO@REVISION:SAE_ID) for one
of a Hub repository. A folder of several SAEs, such as a sweep's, stands for all of them. LABEL=SAE gives it a name and a
kind of its own. Model, hook and data come from the metadata of the first SAE; flags win over them."""

EVALUATE = """Measure one SAE: what it costs the model, how sparse it is, what becomes of later layers. Prints a table with
95 % intervals."""

EVALUATE_EXAMPLES = """\
examples:
  e2e-sae evaluate demo_output/e2e
  e2e-sae evaluate output/several --joint                     all SAEs of a folder in one pass
  e2e-sae evaluate gpt2-small-res_sce-ajt:blocks.6.hook_resid_pre --dataset Skylion007/openwebtext --streaming"""

COMPARE = """Compare SAEs of one hook on the same tokens. Writes a page (report.html, which needs no network), the same as
Markdown, tables as CSV, figures as SVG and PNG, and every feature's importance. Interrupted, run it again: what was
measured stays."""

COMPARE_EXAMPLES = """\
examples:
  e2e-sae compare demo_output/local demo_output/e2e demo_output/e2e_ds --output compared
  e2e-sae compare sweep --output compared --cards 3           all SAEs of a sweep
  e2e-sae compare before=my_sae after=tuned --dataset my_text/ --tokens 50k"""


def finetune_parser() -> CommandParser:
    """The parser of `e2e-sae finetune`."""
    parser = CommandParser("finetune", description=FINETUNE, examples=FINETUNE_EXAMPLES)
    add = parser.add_argument
    add("--sae", required=True, metavar="SOURCE", help="a folder, a release of SAELens, or a Hub repository (required)")
    add("--sae-id", metavar="ID", help="which SAE of a release or repository")
    add(
        "--tokens",
        type=number_of_tokens,
        default=TRAINING_TOKENS,
        metavar="N",
        help="training tokens, such as 5M or 200k (default 25M)",
    )
    add(
        "--output",
        dest="output_path",
        required=True,
        metavar="DIR",
        help="where the fine-tuned SAE and the report go (required)",
    )
    add("--overwrite", dest="overwrite_output", action="store_true", default=None, help="replace what is there")
    _add_data_flags(parser.add_argument_group("data"), "dataset_path")
    _add_training_flags(parser.add_argument_group("what is trained"))
    _add_token_flags(parser.add_argument_group("tokens"), "default: the metadata's, or 1024")
    _add_place_flags(parser.add_argument_group("where"))
    _add_run_flags(parser.add_argument_group("the run"))
    return parser


def _add_data_flags(group: argparse._ArgumentGroup, destination: str) -> None:
    """Flags of `DATA_FLAGS`, and --dataset."""
    add = group.add_argument
    add(
        "--dataset",
        dest=destination,
        metavar="DATA",
        help="text or tokens: a dataset of the Hub, a file (.txt, .jsonl, .csv, .parquet, .arrow; .bin of uint16 tokens), a "
        "folder of them, or one that save_to_disk wrote (default: the metadata's)",
    )
    add("--streaming", action="store_true", default=None, help="stream the dataset instead of fetching it")
    add("--split", metavar="NAME", help='default: "train", or the only one there is')
    add("--text-column", metavar="NAME", help="of texts or of token ids (default: found by name and type)")
    add("--shuffle-seed", type=int, metavar="N", help="shuffle the rows first (default: they stay in order)")
    add("--skip-examples", type=int, metavar="N", help="leave out so many rows at the beginning (default 0)")
    add("--max-examples", type=int, metavar="N", help="read at most so many rows (default: all)")


def _add_token_flags(group: argparse._ArgumentGroup, context_size: str) -> None:
    """Which tokens count; flags of `TOKEN_FLAGS`."""
    add = group.add_argument
    add("--context-size", type=int, metavar="N", help=f"tokens in a sequence ({context_size})")
    add(
        "--prepend-bos",
        type=yes_or_no,
        metavar="yes|no",
        help="begin each sequence of text with BOS (default: the metadata's, or yes)",
    )
    add(
        "--exclude-special-tokens",
        type=special_tokens,
        metavar="yes|no|IDS",
        help="special tokens stay clean and are left out of every mean; or tokens of these ids, such as 0,2 (default: the "
        "metadata's; yes if they say nothing)",
    )
    add(
        "--seqpos-slice",
        type=int,
        nargs=2,
        metavar=("FIRST", "END"),
        help="only positions from FIRST to END - 1 (default: the metadata's)",
    )


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--trained",
        choices=TRAINED,
        default="all",
        help="all weights and biases (default); the decoder and its bias; one scale per feature and the bias; LoRA",
    )
    add("--lora-rank", type=int, metavar="N", help="with --trained lora (default 8)")
    add("--train-thresholds", action="store_true", help="of a JumpReLU SAE, which are frozen otherwise")
    add(
        "--sparsity-coefficient",
        type=float,
        metavar="X",
        help="SAELens's l1_coefficient or l0_coefficient (default: the metadata's)",
    )
    add(
        "--lr",
        type=float,
        metavar="X",
        help="learning rate, decaying to 0 (default: 5e-5; 1e-3 for a scale, 2e-4 for LoRA)",
    )
    add(
        "--batch-tokens",
        dest="train_batch_size_tokens",
        type=number_of_tokens,
        metavar="N",
        help="tokens in a step (default: 8 sequences)",
    )
    add(
        "--batch-prompts",
        dest="store_batch_size_prompts",
        type=int,
        metavar="N",
        help="sequences in the model at once (default 8)",
    )
    add("--seed", type=int, metavar="N", help="of the run's random numbers (default 42)")


def _add_place_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", dest="model_name", metavar="NAME", help="default: the metadata's; another needs --force")
    add(
        "--model-class",
        dest="model_class_name",
        choices=MODEL_CLASSES,
        help="how the model is loaded (default: the metadata's)",
    )
    add(
        "--model-dtype",
        choices=DTYPES,
        help="of the model (default: bfloat16 on CUDA, else the metadata's); the SAE is trained in fp32",
    )
    add("--hook", dest="hook_name", metavar="HOOK", help="default: the metadata's; another needs --force")
    add("--device", help=DEVICE)
    add("--force", action="store_true", help="accept another model, hook or tokenizer than the metadata's")


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--evaluation-tokens",
        type=number_of_tokens,
        default=EVALUATION_TOKENS,
        metavar="N",
        help="held out for the table of before and after (default 131,072)",
    )
    add("--checkpoint-path", metavar="DIR", help="where checkpoints go, every 15 minutes (default: OUTPUT-checkpoints)")
    add("--no-checkpoints", action="store_true", help="write none")
    add("--resume", dest="resume_from_checkpoint", metavar="DIR", help="a checkpoint to go on from, or auto")
    add("--wandb-project", metavar="NAME", help="log to this project of Weights & Biases (default: no logging there)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of E2ESAERunnerConfig, for instance --set patience_evaluations=5; may be repeated",
    )


def evaluate_parser() -> CommandParser:
    """The parser of `e2e-sae evaluate`."""
    parser = _measuring_parser("evaluate", EVALUATE, EVALUATE_EXAMPLES)
    add = parser.add_argument
    add("sae", metavar="SAE", help="what to measure")
    add("--output", type=Path, metavar="FILE", help="also write everything as JSON (CSV with --joint)")
    add(
        "--joint",
        action="store_true",
        help="splice all SAEs of the folder together, and measure what they cost as they are added and each alone",
    )
    return parser


def compare_parser() -> CommandParser:
    """The parser of `e2e-sae compare`."""
    parser = _measuring_parser("compare", COMPARE, COMPARE_EXAMPLES)
    add = parser.add_argument
    add("saes", metavar="SAE", nargs="+", help="what to compare")
    add(
        "--output",
        type=Path,
        default=Path("comparison"),
        metavar="DIR",
        help="where the report goes (default %(default)s)",
    )
    add("--cards", type=int, default=6, metavar="N", help="feature cards per SAE (default %(default)s; 0: none)")
    add(
        "--exact",
        type=int,
        default=0,
        metavar="N",
        help="measure the importance of so many features per SAE by ablating each, instead of estimating it (default 0)",
    )
    add("--title", default="SAEs compared", metavar="TEXT", help='of the report (default "%(default)s")')
    return parser


def _measuring_parser(name: str, description: str, examples: str) -> CommandParser:
    parser = CommandParser(name, description=f"{description}\n\n{SOURCES}", examples=examples)
    add = parser.add_argument
    add(
        "--tokens",
        type=number_of_tokens,
        default=100_000,
        metavar="N",
        help="how many to measure on, such as 50k (default 100k)",
    )
    _add_data_flags(parser.add_argument_group("data"), "dataset")
    _add_token_flags(parser.add_argument_group("tokens"), "default: the metadata's, or 128")
    add("--model", metavar="NAME", help="default: the metadata's")
    add("--model-class", choices=MODEL_CLASSES, help="how the model is loaded (default: the metadata's)")
    add("--model-dtype", choices=DTYPES, help="of the language model (default: the metadata's)")
    add("--hook", metavar="HOOK", help="where to splice, for SAEs whose metadata name no hook or another")
    add("--batch-prompts", type=int, default=8, metavar="N", help="sequences in the model at once (default 8)")
    add("--device", help=DEVICE)
    return parser
