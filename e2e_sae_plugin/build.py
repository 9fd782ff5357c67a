"""From a config to the parts of a run: the SAE, the model, and the checks that they fit together."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.load_model import load_model
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.util import str_to_dtype, temporary_seed
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformer_lens.loading_from_pretrained import make_model_alias_map
from transformer_lens.model_bridge import TransformerBridge

from e2e_sae_plugin.architectures import RUN_TIME_NORMALISATIONS
from e2e_sae_plugin.checkpoint.finished import fold_activation_scaling, read_scaler
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.data.rows import RECORD
from e2e_sae_plugin.demo.bundled import BUNDLED, bundled_model
from e2e_sae_plugin.model_settings import check_model_folder, check_model_settings, loading_settings, unknown_model
from e2e_sae_plugin.splice import SplicedModel
from e2e_sae_plugin.splice.given_model import check_context
from e2e_sae_plugin.spliced_losses import check_kl_top_k


def build_sae(cfg: E2ESAERunnerConfig, device: str | None = None) -> TrainingSAE[Any]:
    """Return the SAE of `cfg.sae`, initialized from `cfg.seed` or with the weights in `cfg.from_pretrained_path`.

    Those weights read activations as they are, whatever they were trained at: a checkpoint's scale is folded into them. A
    run that estimates a scale of its own takes it out of them again (`estimate_activation_scaling`). Otherwise the config
    that the user wrote wins over the one beside the weights; SAELens takes the latter.

    Args:
        device: where it is, and where its weights are drawn; None for `cfg.device`.

    Raises:
        ValueError: If there are no weights there, they do not fit `cfg.sae`, or they are of another architecture or
            normalization.
    """
    with temporary_seed(cfg.seed):
        sae: TrainingSAE[Any] = TrainingSAE.from_dict(
            TrainingSAEConfig.from_dict(
                cfg.get_training_sae_cfg_dict() | ({} if device is None else {"device": device})
            ).to_dict()
        )
    if cfg.from_pretrained_path is None:
        return sae
    weights = Path(cfg.from_pretrained_path) / SAE_WEIGHTS_FILENAME
    if not weights.is_file():
        raise ValueError(
            f"from_pretrained_path={cfg.from_pretrained_path!r} holds no {SAE_WEIGHTS_FILENAME}. Expected a folder that "
            "SAELens or this package saved."
        )
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ValueError(
            f"{str(weights)!r} (from_pretrained_path) is damaged: {error}. Fetch or save it again."
        ) from error
    _check_same_kind(cfg, Path(cfg.from_pretrained_path))
    sae.process_state_dict_for_loading(state)
    try:
        sae.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in from_pretrained_path={cfg.from_pretrained_path!r} do not fit the "
            f"{sae.cfg.architecture()!r} SAE of the config (d_in={sae.cfg.d_in}, d_sae={sae.cfg.d_sae}): {error}"
        ) from error
    fold_activation_scaling(sae, read_scaler(Path(cfg.from_pretrained_path)))
    sae.cfg.normalize_activations = cfg.sae.normalize_activations  # which folding sets to "none"
    return sae


def _check_same_kind(cfg: E2ESAERunnerConfig, folder: Path) -> None:
    """Refuse weights that another architecture or a normalization at run time was trained with."""
    path = folder / SAE_CFG_FILENAME
    saved = json.loads(path.read_text()) if path.is_file() else {}
    ours, theirs = cfg.sae.architecture(), saved.get("architecture")
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"from_pretrained_path={str(folder)!r} holds an SAE of architecture {theirs!r}, and the config has {ours!r}. "
            "Use the same architecture; an exported BatchTopK SAE is a JumpReLU SAE, and its checkpoints are not."
        )
    ours, theirs = cfg.sae.normalize_activations, saved.get("normalize_activations", "none")
    if ours != theirs and {ours, theirs} & RUN_TIME_NORMALISATIONS:
        raise ValueError(
            f"from_pretrained_path={str(folder)!r} holds an SAE of normalize_activations={theirs!r}, and the config has "
            f"{ours!r}. A normalization at run time is part of what the SAE computes: set sae.normalize_activations to "
            f"{theirs!r}."
        )


def earlier_rows(cfg: E2ESAERunnerConfig, override_sae: TrainingSAE[Any] | None) -> list[dict[str, Any]]:
    """What the record of the SAE that a run starts from says of the rows that it was trained on."""
    if override_sae is not None:
        return list(override_sae.cfg.metadata[RECORD] or ())
    if cfg.from_pretrained_path is None:
        return []
    path = Path(cfg.from_pretrained_path) / SAE_CFG_FILENAME
    config = json.loads(path.read_text()) if path.is_file() else {}
    return list((config.get("metadata") or {}).get(RECORD) or ())


def load_model_for(cfg: E2ESAERunnerConfig) -> Any:
    """The language model of a config; see `load_language_model`."""
    return load_language_model(
        cfg.model_class_name, cfg.model_name, cfg.llm_device or "cpu", cfg.model_from_pretrained_kwargs or {}
    )


def load_language_model(model_class_name: str, model_name: str, device: str, settings: Mapping[str, Any]) -> Any:
    """Load `model_name` as `model_class_name`.

    A `TransformerBridge`, which the host cannot load, takes `boot_transformers`'s arguments from `settings`
    (`model_from_pretrained_kwargs`); with `center_writing_weights=True` among them its weights are processed by
    `enable_compatibility_mode()`. Hugging Face models are wrapped without hooks of the host's: passes attach their own.

    Raises:
        ValueError: settings that cannot work, see `check_model_settings`; a name that TransformerLens does not know.
    """
    check_model_settings(model_class_name, settings)
    if model_name == BUNDLED:
        return bundled_model(model_class_name, settings, device)
    check_model_folder(model_name)
    if model_class_name == "HookedTransformer" and model_name.lower() not in make_model_alias_map():
        raise ValueError(unknown_model(model_name))  # TransformerLens's own lists every model there is
    model = _load(model_class_name, model_name, device, loading_settings(model_class_name, settings, device))
    _check_dtype(model, settings)
    return model


def _load(model_class_name: str, model_name: str, device: str, settings: dict[str, Any]) -> Any:
    if model_class_name != "TransformerBridge":
        return load_model(
            model_class_name,
            model_name,
            device=device,
            model_from_pretrained_kwargs=settings,
            hook_names=[],
        )
    processed = settings.pop("center_writing_weights", False)
    if "dtype" in settings:  # a bridge takes torch's own alone, and a file has names
        settings["dtype"] = str_to_dtype(settings["dtype"])
    bridge = TransformerBridge.boot_transformers(model_name, device=device, **settings)
    if processed:
        bridge.enable_compatibility_mode()
    return bridge


def _check_dtype(model: torch.nn.Module, settings: Mapping[str, Any]) -> None:
    """Refuse a model that its loader has not loaded in the dtype that was asked for."""
    wanted = settings.get("dtype", settings.get("torch_dtype"))
    if wanted in (None, "auto") or settings.get("quantization_config") is not None:
        return
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if found and str_to_dtype(wanted) not in found:
        raise ValueError(
            f"model_from_pretrained_kwargs: dtype={wanted!r} was asked for, but the model was loaded in "
            f"{', '.join(map(str, sorted(found, key=str)))}. Leave dtype out, or convert the model and pass it as "
            "override_model."
        )


def check_model_and_sae(model: SplicedModel, sae: TrainingSAE[Any], cfg: E2ESAERunnerConfig) -> None:
    """Run a few tokens through the model, as the config wants it run, and refuse an SAE that does not fit the hook.

    Raises:
        ValueError: `SplicedModel.check` or `check_kl_top_k` refuses the model, `d_in` does not match the hook,
            `hook_head_index` has no head to choose, the context is longer than the model's, or `checkpoint_blocks` has no
            block to work on.
    """
    model.recompute_blocks(cfg.checkpoint_blocks)
    check_context(model.model, cfg.context_size)
    shape = tuple(model.check(min(8, cfg.context_size)).shape[2:])
    if cfg.objective.kl_top_k is not None:
        check_kl_top_k(model, cfg.objective.kl_top_k)
    width = math.prod(shape)
    if cfg.hook_head_index is not None:
        if len(shape) != 2:
            raise ValueError(
                f"hook_head_index={cfg.hook_head_index} needs a hook with heads, such as blocks.0.attn.hook_z; "
                f"{cfg.hook_name!r} has activations of shape [batch, pos, {', '.join(map(str, shape))}]."
            )
        if not 0 <= cfg.hook_head_index < shape[0]:
            raise ValueError(
                f"hook_head_index={cfg.hook_head_index} is out of range: {cfg.hook_name!r} has {shape[0]} heads."
            )
        width = shape[1]
    if sae.cfg.d_in != width:
        raise ValueError(
            f"sae.d_in={sae.cfg.d_in} does not match {cfg.hook_name!r}, whose activations have "
            f"{' x '.join(map(str, shape))} dimensions. Set sae.d_in={width}"
            + (", or hook_head_index to train on one head." if len(shape) == 2 and cfg.hook_head_index is None else ".")
        )


@contextmanager
def reading_dataset(dataset: Any, name: str) -> Iterator[None]:
    """Turn what the host makes of a dataset without rows (a bare `StopIteration`; an empty `override_dataset` counts as
    none) into an error that says so. Its warning of too few samples compares rows with tokens; the token stream says when
    an epoch begins."""
    try:
        if hasattr(dataset, "__len__") and not len(dataset):
            raise StopIteration
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The training dataset contains fewer samples")
            yield
    except StopIteration:
        raise ValueError(f"{name} has no rows, so the dataset ran out before one batch. Use one with data.") from None


@contextmanager
def quiet_override_warning(active: bool, what: tuple[str, ...] = ("model",)) -> Iterator[None]:
    """The host warns that an overridden model (or dataset) is not reproducible; ours was loaded from the config."""
    host_logger = logging.getLogger("sae_lens")

    def not_about_that(record: logging.LogRecord) -> bool:
        return not any(f"passed in a {each}" in record.getMessage() for each in what)

    if active:
        host_logger.addFilter(not_about_that)
    try:
        yield
    finally:
        if active:
            host_logger.removeFilter(not_about_that)
