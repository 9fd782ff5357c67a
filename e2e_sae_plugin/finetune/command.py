"""`e2e-sae finetune`: its flags, and the run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, get_args

import torch
import yaml

from e2e_sae_plugin.config import MODEL_CLASSES
from e2e_sae_plugin.finetune.recipe import EVALUATION_TOKENS, TRAINING_TOKENS, Trained, finetune_config
from e2e_sae_plugin.finetune.runner import FinetuneRunner
from e2e_sae_plugin.finetune.start import SPARSITY_COEFFICIENT, load_sae
from e2e_sae_plugin.preflight import check_device_name

DESCRIPTION = """\
Fine-tune a finished SAE, so that the model's output survives it: a short run on KL + MSE (Karvonen 2025, arXiv 2503.17272).
Model, hook, context, BOS and data come from the SAE's metadata; flags win over them. Prints what the SAE costs the model
before and after, and writes an SAE of the same form with its features in the same places, a report, and what became of each
feature."""

EXAMPLES = """\
examples:
  e2e-sae finetune --sae gemma-scope-2b-pt-res-canonical --sae-id layer_12/width_16k/canonical --output tuned --device cuda
  e2e-sae finetune --sae my_sae/ --dataset monology/pile-uncopyrighted --tokens 5M --output tuned
  e2e-sae finetune --sae my_sae/ --trained scale_and_bias --tokens 2M --output tuned     the cheapest correction
  e2e-sae finetune --sae my_sae/ --output tuned --resume auto     goes on where it was stopped"""


def finetune(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: a setting is refused.
    """
    args = _parser().parse_args(list(argv))
    check_device_name("--device", args.device)
    sae = load_sae(args.sae, args.sae_id, device=args.device)
    if args.sparsity_coefficient is not None and sae.cfg.architecture() not in SPARSITY_COEFFICIENT:
        raise ValueError(
            f"--sparsity-coefficient has no effect: architecture {sae.cfg.architecture()!r} fixes its L0 by itself."
        )
    coefficient = SPARSITY_COEFFICIENT.get(sae.cfg.architecture())
    settings = {} if args.sparsity_coefficient is None else {str(coefficient): args.sparsity_coefficient}
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    overrides: dict[str, Any] = {**given, **_set(args.set)}
    cfg = finetune_config(
        sae,
        training_tokens=args.tokens,
        trained=args.trained,
        train_thresholds=args.train_thresholds,
        lora_rank=args.lora_rank,
        sae_settings=settings,
        evaluation_tokens=args.evaluation_tokens,
        model_dtype=args.model_dtype,
        force=args.force,
        **{"checkpoint_path": None if args.no_checkpoints else f"{args.output_path}-checkpoints", **overrides},
    )
    if args.wandb_project is not None:
        cfg.logger.log_to_wandb, cfg.logger.wandb_project = True, args.wandb_project
    source = args.sae if args.sae_id is None else f"{args.sae} {args.sae_id}"
    FinetuneRunner(cfg, sae, source=source, force=args.force).run()


# Flags that are fields of `E2ESAERunnerConfig`.
FIELDS = (
    "output_path", "overwrite_output", "checkpoint_path", "resume_from_checkpoint", "dataset_path", "streaming",
    "model_name", "model_class_name", "hook_name", "context_size", "lr", "train_batch_size_tokens",
    "store_batch_size_prompts", "device", "seed",
)  # fmt: skip


NOT_TO_SET = {
    "logger": "use --wandb-project",
    "sae": "use --sparsity-coefficient",
    "sae_settings": "use --sparsity-coefficient",
    "training_tokens": "use --tokens",
    **{
        name: f"use --{name.replace('_', '-')}"
        for name in ("trained", "lora_rank", "train_thresholds", "model_dtype", "evaluation_tokens", "force")
    },
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="e2e-sae finetune",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--sae", required=True, metavar="SOURCE", help="a folder, a release of SAELens, or a Hub repository")
    add("--sae-id", help="which SAE of a release or repository")
    add(
        "--tokens",
        type=number_of_tokens,
        default=TRAINING_TOKENS,
        help="training tokens, for instance 25M (the default)",
    )
    add("--output", dest="output_path", required=True, metavar="DIR", help="where the fine-tuned SAE and the report go")
    add("--overwrite", dest="overwrite_output", action="store_true", default=None, help="replace what is there")
    add(
        "--dataset",
        dest="dataset_path",
        help="text or tokens: a dataset of the Hub, or a folder (default: the metadata's)",
    )
    add("--streaming", action="store_true", default=None, help="stream the dataset instead of fetching it")
    _add_training_flags(parser.add_argument_group("what is trained"))
    _add_place_flags(parser.add_argument_group("where"))
    _add_run_flags(parser.add_argument_group("the run"))
    return parser


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--trained",
        choices=get_args(Trained),
        default="all",
        help="all weights and biases (default); the decoder and its bias; one scale per feature and the bias; LoRA",
    )
    add("--lora-rank", type=int, help="with --trained lora (default 8)")
    add("--train-thresholds", action="store_true", help="of a JumpReLU SAE, which are frozen otherwise")
    add(
        "--sparsity-coefficient",
        type=float,
        help="SAELens's l1_coefficient or l0_coefficient (default: the metadata's)",
    )
    add("--lr", type=float, help="learning rate, decaying to 0 (default: 5e-5; 1e-3 for a scale, 2e-4 for LoRA)")
    add(
        "--batch-tokens",
        dest="train_batch_size_tokens",
        type=number_of_tokens,
        help="tokens in a step (default: 8 sequences)",
    )
    add("--batch-prompts", dest="store_batch_size_prompts", type=int, help="sequences in the model at once (default 8)")
    add("--seed", type=int)


def _add_place_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", dest="model_name", help="default: the metadata's; another needs --force")
    add("--model-class", dest="model_class_name", choices=MODEL_CLASSES)
    add("--model-dtype", help="of the language model (default: bfloat16 on CUDA); the SAE is trained in fp32")
    add("--hook", dest="hook_name", help="default: the metadata's; another needs --force")
    add("--context-size", type=int, help="default: the metadata's, or 1024")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--force", action="store_true", help="accept another model, hook or tokenizer than the metadata's")


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--evaluation-tokens",
        type=number_of_tokens,
        default=EVALUATION_TOKENS,
        help="held out for the table of before and after (default 131,072)",
    )
    add("--checkpoint-path", metavar="DIR", help="where checkpoints go, every 15 minutes (default: OUTPUT-checkpoints)")
    add("--no-checkpoints", action="store_true", help="write none")
    add("--resume", dest="resume_from_checkpoint", help="a checkpoint to go on from, or auto")
    add("--wandb-project", help="log to this project of Weights & Biases")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of E2ESAERunnerConfig, for instance --set patience_evaluations=5; may be repeated",
    )


def number_of_tokens(text: str) -> int:
    """`25M`, `1.5k`, `2e6` or `1000` as a whole number.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if factor > 1 else text) * factor
        if value != int(value) or value < 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a number of tokens such as 25M or 100000, got {text!r}") from None
    return int(value)


def _set(pairs: Sequence[str]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"--set takes FIELD=VALUE, got {pair!r}.")
        if name in NOT_TO_SET:
            raise ValueError(f"--set cannot set {name}: {NOT_TO_SET[name]}.")
        try:
            overrides[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {pair!r} is not a value in YAML: {error}") from None
    return overrides
