"""SAE folders of SAELens (any version), sparsify and dictionary_learning, read as SAELens SAEs."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens import __version__ as sae_lens_version
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import (
    get_sae_lens_config_from_disk,
    load_safetensors_weights,
    read_sae_components_from_disk,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from e2e_sae_plugin.checkpoint.finished import exported, is_checkpoint, sae_of_checkpoint
from e2e_sae_plugin.data.rows import RECORD

logger = logging.getLogger(__name__)

CONFIG_FILENAME = "config.json"
SPARSIFY_WEIGHTS, DICTIONARY_WEIGHTS = "sae.safetensors", "ae.pt"
WEIGHTS_FILENAMES = (SAE_WEIGHTS_FILENAME, SPARSIFY_WEIGHTS, DICTIONARY_WEIGHTS)
FORMATS = (
    f"SAELens ({SAE_CFG_FILENAME}, {SAE_WEIGHTS_FILENAME}), sparsify ({SAE_CFG_FILENAME}, {SPARSIFY_WEIGHTS}) and "
    f"dictionary_learning ({CONFIG_FILENAME}, {DICTIONARY_WEIGHTS})"
)

# Class of dictionary_learning -> SAELens's architecture, and whether the encoder subtracts the decoder's bias.
DICTIONARIES: dict[str, tuple[str, bool]] = {
    "AutoEncoder": ("standard", True),
    "AutoEncoderNew": ("standard", False),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
}
# Settings of sparsify that SAELens has nothing for, with the value that a plain TopK SAE has.
SPARSIFY_SETTINGS = {"activation": "topk", "transcode": False, "skip_connection": False, "signed": False}

# Tensor of sparsify or dictionary_learning -> SAELens's name, where that is another.
TENSORS = {
    "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec",
    "bias": "b_dec", "decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag",
}  # fmt: skip
TRANSPOSED = ("encoder.weight", "decoder.weight")  # torch's Linear has [out, in]
NO_WEIGHTS = ("k", "group_sizes")  # buffers of dictionary_learning
Components = tuple[dict[str, Any], dict[str, Tensor]]
"""Config and weights in SAELens's format, as `SAE.load_from_disk` takes them from its converter."""

_RESIDUAL = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)$")


def is_sae_folder(folder: Path) -> bool:
    """Return whether a folder holds one SAE, of any format in `FORMATS`."""
    return (folder / SAE_CFG_FILENAME).is_file() or (folder / DICTIONARY_WEIGHTS).is_file()


def sae_folders(folder: Path) -> list[Path]:
    """The folder itself if it holds an SAE, else its sub-folders that do, sorted by name."""
    if is_sae_folder(folder):
        return [folder]
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inside if path.is_dir() and is_sae_folder(path)]


def read_sae(folder: str | Path, device: str = "cpu") -> SAE[Any]:
    """Load the SAE of a folder; a checkpoint's as the inference SAE that its run would have ended with.

    Raises:
        ValueError: If the folder holds no SAE, a corrupt one, or one that SAELens cannot represent.
    """
    folder = Path(folder)
    if not is_sae_folder(folder):
        several = [path.name for path in sae_folders(folder)]
        hint = f" Name one of the folders in it: {', '.join(several[:20])}." if several else ""
        raise ValueError(f"The folder {str(folder)!r} holds no SAE.{hint} Supported formats: {FORMATS}.")
    readers = {DICTIONARY_WEIGHTS: _dictionary_learning, SPARSIFY_WEIGHTS: _sparsify}
    reader = next((readers[name] for name in readers if (folder / name).is_file()), _sae_lens)
    try:
        if is_checkpoint(folder):
            return exported(sae_of_checkpoint(folder, device))
        return SAE.load_from_disk(folder, device=device, converter=reader)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The SAE in {str(folder)!r} is corrupt: {error}. Fetch or save it again.") from error
    except RuntimeError as error:  # of load_state_dict, in several lines
        raise ValueError(
            f"The weights in {str(folder)!r} do not fit its config: {' '.join(str(error).split())}"
        ) from error
    except (FileNotFoundError, KeyError) as error:
        raise ValueError(
            f"The SAE in {str(folder)!r} is incomplete: no {error}. Supported formats: {FORMATS}."
        ) from error


# SAELens.


def _sae_lens(path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None) -> Components:
    weights, run = Path(path) / SAE_WEIGHTS_FILENAME, Path(path) / RUNNER_CFG_FILENAME
    cfg = with_dtype(get_sae_lens_config_from_disk(path, device, cfg_overrides), weights)
    cfg, state = read_sae_components_from_disk(cfg, weights, device)
    if run.is_file() and RECORD not in cfg.get("metadata", {RECORD: None}):  # SAELens's metadata do not say it
        cfg["metadata"]["training_tokens"] = _read_json(run).get("training_tokens")
    return cfg, state


def with_dtype(cfg: dict[str, Any], weights: Path) -> dict[str, Any]:
    """The config, with the dtype that the weights are saved in where it names none."""
    if "dtype" in cfg:
        return cfg
    with safe_open(weights, framework="pt") as file:
        return {**cfg, "dtype": str(file.get_tensor("W_dec").dtype).removeprefix("torch.")}


# sparsify.


def _sparsify(path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None) -> Components:
    del cfg_overrides  # SAELens's dtype, which is not asked for here
    folder = Path(path)
    own = _read_json(folder / SAE_CFG_FILENAME)
    for name, value in SPARSIFY_SETTINGS.items():
        if own.get(name, value) != value:
            raise ValueError(
                f"{str(folder / SAE_CFG_FILENAME)!r} has {name}={own[name]!r}, which SAELens has no SAE for. Of sparsify, "
                f"TopK SAEs can be loaded ({name}={value!r})."
            )
    weights = _renamed(load_safetensors_weights(folder / SPARSIFY_WEIGHTS, device))
    parents = (folder.absolute().parents[i] / CONFIG_FILENAME for i in range(2))
    run = next((_read_json(path) for path in parents if path.is_file()), {})
    known = {
        "model_name": run.get("model"),
        "dataset_path": run.get("dataset"),
        "context_size": run.get("ctx_len"),
        "exclude_special_tokens": run.get("exclude_tokens") or None,
        "hook_name": _hook_of_folder(folder),
    }
    return _config("topk", device, weights, known, k=own["k"], rescale_acts_by_decoder_norm=False), weights


def _hook_of_folder(folder: Path) -> str | None:
    """The residual stream after a layer; sparsify names folders after modules: `layers.3`, or `layers.3/seed1`.

    Other modules have no TransformerLens hook of the same output in some models.
    """
    for name in (folder.absolute().name, folder.absolute().parent.name):
        if (match := _RESIDUAL.search(name)) is not None:
            return f"blocks.{match[1]}.hook_resid_post"
    return None


# dictionary_learning.


def _dictionary_learning(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> Components:
    del cfg_overrides
    folder, config = Path(path), Path(path) / CONFIG_FILENAME
    content = _read_json(config)
    trainer, buffer = content.get("trainer") or {}, content.get("buffer") or {}
    name = trainer.get("dict_class")
    if name not in DICTIONARIES:
        raise ValueError(
            f"{str(config)!r} names dict_class={name!r}, which SAELens has no SAE for. Of dictionary_learning, "
            f"these can be loaded: {', '.join(DICTIONARIES)}."
        )
    architecture, subtracts_bias = DICTIONARIES[name]
    weights = _renamed(_tensors(folder / DICTIONARY_WEIGHTS, device))
    if name == "AutoEncoder":
        _fold_decoder_norms(weights)
    if architecture == "jumprelu":
        if weights["threshold"].ndim == 0 and weights["threshold"] < 0:  # set after a number of steps
            logger.warning("The %s in %s has no threshold yet: all its positive activations count.", name, folder)
        weights["threshold"] = weights["threshold"].expand(weights["W_dec"].shape[0]).contiguous()
    else:
        weights.pop("threshold", None)  # AutoEncoderTopK's, which it does not use by default
    known = {
        "model_name": trainer.get("lm_name"),
        "hook_name": _hook_of_trainer(trainer, buffer),
        "context_size": buffer.get("ctx_len"),
    }
    own: dict[str, Any] = {"apply_b_dec_to_input": subtracts_bias}
    if architecture == "topk":
        own |= {"k": trainer["k"], "rescale_acts_by_decoder_norm": False}
    return _config(architecture, device, weights, known, **own), weights


def _tensors(path: Path, device: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} is corrupt, or holds more than tensors, which could run code. Save the SAE's state_dict() in it."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{str(path)!r} holds no state_dict. Save the SAE's state_dict() in it.")
    return state


def _hook_of_trainer(trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> str | None:
    """The residual stream after a layer, unless the config names another module."""
    module, layer = trainer.get("submodule_name") or "resid_post", trainer.get("layer")
    is_residual_output = module.startswith("resid_post") and buffer.get("io", "out") == "out"
    return f"blocks.{layer}.hook_resid_post" if is_residual_output and layer is not None else None


def _fold_decoder_norms(weights: dict[str, Tensor]) -> None:
    """Give decoder rows norm 1, as dictionary_learning does when it loads an `AutoEncoder`."""
    norms = weights["W_dec"].norm(dim=1)
    if torch.allclose(norms, torch.ones_like(norms)):
        return
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    weights["W_dec"] = weights["W_dec"] / norms[:, None]
    weights["W_enc"] = weights["W_enc"] * norms
    weights["b_enc"] = weights["b_enc"] * norms


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept = {
        name: tensor.T if name in TRANSPOSED else tensor for name, tensor in state.items() if name not in NO_WEIGHTS
    }
    return {TENSORS.get(name, name): tensor.contiguous() for name, tensor in kept.items()}


def _config(
    architecture: str, device: str, weights: Mapping[str, Tensor], known: Mapping[str, Any], **own: Any
) -> dict[str, Any]:
    d_sae, d_in = weights["W_dec"].shape
    metadata = {name: value for name, value in known.items() if value is not None}
    return {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": str(weights["W_dec"].dtype).removeprefix("torch."),
        "device": device,
        "metadata": {"sae_lens_version": sae_lens_version, **metadata},
        **own,
    }


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object. Supported formats: {FORMATS}.")
    return content
