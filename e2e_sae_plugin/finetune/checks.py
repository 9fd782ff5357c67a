"""What has to fit between an SAE that exists and the model and data of a fine-tune, each refused by name."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainingSAEConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from e2e_sae_plugin.architectures import SPARSITY_COEFFICIENT
from e2e_sae_plugin.checkpoint.identity import tokenizer_fingerprint
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.data.rows import overlap_share, trained_rows, unseen_rows
from e2e_sae_plugin.data.settings import ROW_SETTINGS, DataSettings
from e2e_sae_plugin.evaluation.metrics import reconstruct_with
from e2e_sae_plugin.evaluation.place import model_name_of, same_model_name
from e2e_sae_plugin.finetune.start import training_config

logger = logging.getLogger(__name__)

L1_TOLERANCE = 5.0
"""A coefficient of the metadata that is further than this factor from what the SAE's shrinkage implies is refused."""


def check_same_place(sae: SAE[Any], model_name: str, hook_name: str, hook_head_index: int | None) -> None:
    """Refuse a model or hook other than the metadata's.

    Raises:
        ValueError: names both, and how to force it.
    """
    metadata = sae.cfg.metadata
    differences: list[str] = []
    if metadata.model_name is not None and not same_model_name(metadata.model_name, model_name):
        differences.append(f"model_name={metadata.model_name!r}, not {model_name!r}")
    if metadata.hook_name is not None and metadata.hook_name != hook_name:
        differences.append(f"hook_name={metadata.hook_name!r}, not {hook_name!r}")
    if metadata.hook_name is not None and metadata.hook_head_index != hook_head_index:
        differences.append(f"hook_head_index={metadata.hook_head_index!r}, not {hook_head_index!r}")
    if differences:
        raise ValueError(
            f"The SAE was trained on another place: {'; '.join(differences)} (its metadata say). Leave that out to take the "
            "metadata's, or set force=True (--force) to fine-tune it there all the same, for instance on the chat version "
            "of its model."
        )


def check_given_model(sae: SAE[Any], model: Any) -> None:
    """Refuse a model object that is named otherwise than the SAE's metadata say.

    Raises:
        ValueError: names both.
    """
    name, expected = model_name_of(model), sae.cfg.metadata.model_name
    if name and expected and not same_model_name(name, expected):
        raise ValueError(
            f"override_model is {name!r}, but the SAE is of model_name={expected!r} (its metadata say). Pass that model, or "
            "set force=True to fine-tune on this one all the same."
        )


def check_tokenizer(sae: SAE[Any], tokenizer: Any) -> None:
    """Refuse a tokenizer other than the one that the SAE was trained with, where its metadata have its fingerprint
    (those of this package's SAEs have).

    Raises:
        ValueError: the vocabularies differ.
    """
    expected = sae.cfg.metadata.tokenizer_sha256
    if expected is None or tokenizer is None:
        return
    if tokenizer_fingerprint(tokenizer) != expected:
        raise ValueError(
            "The model's tokenizer is not the one that the SAE was trained with: the vocabulary's fingerprint differs from "
            "tokenizer_sha256 in the SAE's metadata, so its features would see other text. Use the SAE's own model and "
            "tokenizer, or set force=True (--force) to go on all the same."
        )


def check_same_sae(sae: SAE[Any], cfg: E2ESAERunnerConfig) -> None:
    """Refuse a config that was made for another SAE, or that changes what the SAE computes, and an SAE that is not finite.

    Raises:
        ValueError: names what differs, or the weight.
    """
    for name, value in sae.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"The SAE's {name} is not finite, so nothing can be trained from it. Fetch or save it again."
            )
    if cfg.from_pretrained_path is not None:
        raise ValueError(
            f"from_pretrained_path={cfg.from_pretrained_path!r} has no effect: a fine-tune starts from the SAE that is "
            "given. Leave it out."
        )
    if cfg.sae.architecture() != sae.cfg.architecture():
        raise ValueError(
            f"The config is of a {cfg.sae.architecture()!r} SAE, but this one is of architecture "
            f"{sae.cfg.architecture()!r}. Make it with finetune_config(sae, ...) of the same SAE."
        )
    expected = training_config(sae, {**_coefficients(cfg.sae)}, thresholds_are_frozen=True)
    for field in fields(sae.cfg):
        if field.name in ("dtype", "device", "metadata"):
            continue
        ours, theirs = getattr(cfg.sae, field.name, None), getattr(expected, field.name, None)
        if ours != theirs:
            raise ValueError(
                f"The config has sae.{field.name}={ours!r}, but the SAE has {theirs!r}: it would compute something else. "
                "Make the config with finetune_config(sae, ...) of the same SAE, and leave that setting out."
            )


def _coefficients(config: TrainingSAEConfig) -> dict[str, float]:
    name = SPARSITY_COEFFICIENT.get(config.architecture())
    return {} if name is None else {name: getattr(config, name)}


def check_not_overwritten(sae: SAE[Any], cfg: E2ESAERunnerConfig) -> None:
    """Refuse to replace the SAE that is fine-tuned by what comes of it.

    Raises:
        ValueError: `output_path` holds these very weights, and `overwrite_output` is set.
    """
    if cfg.output_path is None or not cfg.overwrite_output:
        return
    weights = Path(cfg.output_path) / SAE_WEIGHTS_FILENAME
    with contextlib.suppress(OSError, SafetensorError):
        there, own = load_file(weights), sae.state_dict()
        if there.keys() == own.keys() and all(torch.equal(there[name].to(own[name]), own[name]) for name in own):
            raise ValueError(
                f"output_path={cfg.output_path!r} holds the SAE that is fine-tuned, which would be lost. Choose another."
            )


def without_row_settings(cfg: E2ESAERunnerConfig) -> E2ESAERunnerConfig:
    """The config for a dataset object, which is read as it is: what the SAE's record says of rows is of another."""
    cfg = copy.copy(cfg)
    defaults = {field.name: field.default for field in fields(cfg)}
    for name in ROW_SETTINGS:
        if getattr(cfg, name) != defaults[name]:
            logger.info("override_dataset is read as it is: %s=%r is not used.", name, getattr(cfg, name))
            setattr(cfg, name, defaults[name])
    return cfg


def warn_of_overlap(sae: SAE[Any], settings: DataSettings | None, rows: tuple[int, int], context_size: int) -> None:
    """Say by how much the held-out rows are those that the SAE was trained on, or that this is not known.

    Args:
        sae: The original.
        settings: The data of the fine-tune; None for a dataset object, of which nothing is known.
        rows: First and last row that is held out.
        context_size: Tokens in a sequence.
    """
    if settings is None:
        return
    records = trained_rows(sae)
    known = [each for each in records if each.is_of(settings) and each.counts_as(settings, context_size)]
    share = overlap_share(known, [rows])
    others = "Before and after may both look better than they are: give other data, or skip_examples (--skip-examples)."
    if share:
        logger.warning("The SAE was trained on %.0f%% of the rows that are held out. %s", 100 * share, others)
    elif unseen_rows({"": sae}, {"": records}, settings, context_size).unknown and not settings.skip_examples:
        logger.warning(
            "The SAE was trained on %s too, on rows that its record does not tell. %s", settings.dataset_path, others
        )


@torch.no_grad()
def implied_l1_coefficient(sae: SAE[Any], sae_in: Tensor, activation_shape: Sequence[int] | None = None) -> float:
    """The L1 coefficient at which the SAE would be at rest, from how far its reconstructions are shrunk.

    Where `||x - b - y||^2 + lambda * sum_i f_i ||d_i||` with `y = sum_i f_i d_i` is least, scaling all of `f` changes
    nothing: `lambda = 2 E[(x - b - y) . y] / E[sum_i f_i ||d_i||]`.

    Args:
        sae_in: activations `[tokens, d_in]` that the SAE reads.
        activation_shape: see `reconstruct_with`.
    """
    feature_acts, sae_out = reconstruct_with(sae, activation_shape)(sae_in)
    written = sae_out - sae.decode(torch.zeros_like(feature_acts)).flatten(1)
    shrinkage = 2 * ((sae_in - sae_out) * written).sum(-1).mean()
    l1 = (feature_acts * sae.W_dec.norm(dim=1)).sum(-1).mean()
    return float(shrinkage / l1) if float(l1) > 0 else 0.0


def check_l1_coefficient(
    sae: SAE[Any], coefficient: float, sae_in: Tensor, activation_shape: Sequence[int] | None = None
) -> None:
    """Refuse an L1 coefficient of the metadata that this SAE cannot have been trained with as it is now.

    SAELens folds activations' estimated normalisation into the weights when it saves, but the coefficient in the metadata
    still belongs to normalised activations; it would be wrong by their scale, and the L0 would drift.

    Raises:
        ValueError: names both coefficients.
    """
    implied = implied_l1_coefficient(sae, sae_in, activation_shape)
    if coefficient == 0 or not (1 / L1_TOLERANCE < implied / coefficient < L1_TOLERANCE):
        raise ValueError(
            f"The metadata say l1_coefficient={coefficient:.6g}, but the SAE's reconstructions are shrunk as by about "
            f"{implied:.4g}: it was probably trained on normalised activations, and the normalisation is folded into its "
            "weights. Give the coefficient for activations as they are"
            + (f", for instance {implied:.4g}" if implied > 0 else "")
            + ": sae_settings={'l1_coefficient': ...} (--sparsity-coefficient); or set force=True (--force) to keep the "
            "metadata's."
        )
