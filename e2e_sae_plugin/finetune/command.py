"""`e2e-sae finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import yaml

from e2e_sae_plugin.architectures import SPARSITY_COEFFICIENT
from e2e_sae_plugin.command_line.sae_flags import DATA_FLAGS, TOKEN_FLAGS
from e2e_sae_plugin.finetune.recipe import finetune_config
from e2e_sae_plugin.finetune.runner import FinetuneRunner
from e2e_sae_plugin.finetune.start import load_sae
from e2e_sae_plugin.preflight import device_or_default


def finetune(args: argparse.Namespace) -> None:
    """Fine-tune an SAE.

    Raises:
        ValueError: a setting is refused.
    """
    args.device = device_or_default("--device", args.device)
    sae = load_sae(args.sae, args.sae_id, device=args.device)
    if args.sparsity_coefficient is not None and sae.cfg.architecture() not in SPARSITY_COEFFICIENT:
        raise ValueError(
            f"--sparsity-coefficient has no effect: architecture {sae.cfg.architecture()!r} fixes its L0 by itself."
        )
    coefficient = SPARSITY_COEFFICIENT.get(sae.cfg.architecture())
    settings = {} if args.sparsity_coefficient is None else {str(coefficient): args.sparsity_coefficient}
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    if args.seqpos_slice is not None:
        given["seqpos_slice"] = tuple(args.seqpos_slice)
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
    "output_path", "overwrite_output", "checkpoint_path", "resume_from_checkpoint", "dataset_path", *DATA_FLAGS,
    "model_name", "model_class_name", "hook_name", *TOKEN_FLAGS, "lr", "train_batch_size_tokens",
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
