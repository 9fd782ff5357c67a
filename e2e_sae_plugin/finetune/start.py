"""From any finished SAE of SAELens to its training form, with the same weights to the bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from e2e_sae_plugin.architectures import SPARSITY_COEFFICIENT
from e2e_sae_plugin.hub.foreign import read_sae
from e2e_sae_plugin.hub.load import load_pretrained

ESTIMATED_NORMALISATIONS = ("expected_average_only_in", "covariance_whitening")


def load_sae(source: str | Path | SAE[Any], sae_id: str | None = None, device: str = "cpu") -> SAE[Any]:
    """An SAE from wherever SAELens finds one.

    Args:
        source: an SAE; a folder that SAELens, this package, sparsify or dictionary_learning saved; a release of SAELens; a
            Hub repository, `owner/name` or `owner/name@revision`.
        sae_id: which SAE of a release or repository.
        device: where to put it.

    Raises:
        ValueError: a folder without an SAE, or with one that is corrupt or of a kind that SAELens does not have; a release
            or repository without `sae_id`, or a `sae_id` beside a folder or an SAE, where it means nothing; or as in
            `load_pretrained`.
        HubError: as in `load_pretrained`.
    """
    if not isinstance(source, SAE | str | Path):
        raise ValueError(f"An SAE is named by a folder, a release or a repository, got {source!r}.")
    if isinstance(source, SAE) or Path(source).is_dir():
        if sae_id is not None:
            raise ValueError(f"sae_id={sae_id!r} has no meaning for an SAE or a folder: leave it out.")
        if isinstance(source, SAE):
            return source
        return read_sae(source, device)
    if Path(source).is_file():
        raise ValueError(f"{str(source)!r} is a file. Give the folder that it lies in.")
    if sae_id is None and "@" not in str(source):  # `owner/name@revision` can be nothing but a repository
        raise ValueError(
            f"There is no folder {str(source)!r}, so it is taken for a release of SAELens or a Hub repository, and needs a "
            "sae_id (--sae-id)."
        )
    return load_pretrained(str(source), sae_id, device=device)


def load_quietly(source: str | Path, sae_id: str | None = None, device: str = "cpu") -> SAE[Any]:
    """`load_sae` without SAELens's advice to load the model with the metadata's arguments, for who does so anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="\nThis SAE has non-empty model_from_pretrained_kwargs")
        return load_sae(source, sae_id, device=device)


def training_config(
    sae: SAE[Any], settings: Mapping[str, Any] | None = None, *, thresholds_are_frozen: bool = True
) -> TrainingSAEConfig:
    """The training config of the architecture that the SAE has, in fp32, with what its training settings were.

    A normalisation that was estimated is folded into a finished SAE's weights (SAELens ignores one that was not), so it is
    "none" here; those at run time stay.

    Args:
        sae: a finished SAE, in inference or training form.
        settings: fields of the training config, for instance `{"l1_coefficient": 0.1}`; they win over the metadata's.
        thresholds_are_frozen: a JumpReLU SAE whose thresholds do not move needs no sparsity coefficient; it is 0 then,
            unless given.

    Raises:
        ValueError: an architecture without a training form (transcoders among them), a setting that it does not know, or
            a sparsity coefficient that neither `settings` nor the metadata have.
    """
    architecture = sae.cfg.architecture()
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        transcoder = " A transcoder writes elsewhere than it reads." if "transcoder" in architecture else ""
        raise ValueError(
            f"An SAE of architecture {architecture!r} cannot be fine-tuned: SAELens has no training form of it.{transcoder} "
            f"Expected one of {sorted(SAE_TRAINING_CLASS_REGISTRY)}."
        )
    config_class = get_sae_training_class(architecture)[1]
    known = {field.name for field in fields(config_class)} - {"metadata"}
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(f"sae_settings must be a mapping of training settings, got {settings!r}.")
    fixed = {field.name for field in fields(sae.cfg)}
    for name in settings or {}:
        if name in fixed:
            raise ValueError(
                f"sae_settings has {name!r}, which would change what the SAE computes. It can have the settings of "
                f"training alone: {sorted(known - fixed)}."
            )
        if name not in known:
            raise ValueError(f"Architecture {architecture!r} has no training setting {name!r}. It has {sorted(known)}.")
    inherited = {**_saved_training_settings(sae, architecture), **_shared_settings(sae, known)}
    chosen = {**inherited, **(settings or {}), "dtype": "float32"}
    _require_sparsity(architecture, chosen, thresholds_are_frozen)
    if chosen["normalize_activations"] in ESTIMATED_NORMALISATIONS:
        chosen["normalize_activations"] = "none"
    return config_class.from_dict({**{k: v for k, v in chosen.items() if k in known}, "architecture": architecture})


def training_counterpart(sae: SAE[Any], config: TrainingSAEConfig | None = None) -> TrainingSAE[Any]:
    """The SAE in the form that SAELens trains, in fp32 and with the same weights.

    Args:
        config: from `training_config`, the default.

    Raises:
        ValueError: as in `training_config`.
    """
    config = copy.deepcopy(training_config(sae) if config is None else config)
    config.metadata = type(sae.cfg.metadata)(**sae.cfg.metadata.to_dict())
    trained: TrainingSAE[Any] = get_sae_training_class(config.architecture())[0](config)
    trained.load_state_dict({name: value.detach().clone().float() for name, value in sae.state_dict().items()})
    return trained.to(sae.device)


def _saved_training_settings(sae: SAE[Any], architecture: str) -> dict[str, Any]:
    """What the SAE's metadata say of its training, where that was of the same architecture.

    A JumpReLU SAE that BatchTopK or Matryoshka exported has the settings of another architecture there.
    """
    metadata = sae.cfg.metadata
    if metadata.training_architecture != architecture or not isinstance(metadata.training_architecture_details, dict):
        return {}
    return dict(metadata.training_architecture_details)


def _shared_settings(sae: SAE[Any], known: set[str]) -> dict[str, Any]:
    return {field.name: getattr(sae.cfg, field.name) for field in fields(sae.cfg) if field.name in known}


def _require_sparsity(architecture: str, chosen: dict[str, Any], thresholds_are_frozen: bool) -> None:
    name = SPARSITY_COEFFICIENT.get(architecture)
    if name is None or name in chosen:
        for warm_up in ("l1_warm_up_steps", "l0_warm_up_steps"):
            if warm_up in chosen:
                chosen[warm_up] = 0  # the SAE is sparse already
        return
    if architecture == "jumprelu" and thresholds_are_frozen:
        chosen[name] = 0.0
        return
    raise ValueError(
        f"The metadata of this {architecture!r} SAE do not say its {name}, without which its L0 would drift. Give the one "
        f"that it was trained with: sae_settings={{{name!r}: ...}} (--sparsity-coefficient), as in SAELens "
        "beside a squared error summed over dimensions."
    )


def same_weights(first: SAE[Any], second: SAE[Any]) -> bool:
    """Whether two SAEs have the same parameters and buffers, to the bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)


@torch.no_grad()
def finished_form(trained: TrainingSAE[Any], original: SAE[Any]) -> SAE[Any]:
    """The fine-tuned weights in the original's own inference form, fp32, as a drop-in replacement.

    SAELens's export of a training SAE folds decoder norms into the encoder; here the form has not changed, so there is
    nothing to fold, and what was not trained is as it was, to the bit.
    """
    config = copy.deepcopy(original.cfg)
    config.dtype = "float32"
    finished: SAE[Any] = type(original)(config).to(trained.device)
    finished.load_state_dict(trained.state_dict())
    return finished
