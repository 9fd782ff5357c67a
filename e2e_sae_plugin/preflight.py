"""What can be known to fail before anything is loaded: the folders, the disk, the shape of the model."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens.saes.sae import TrainingSAE
from transformer_lens.loading_from_pretrained import get_pretrained_model_config
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES
from transformers import AutoConfig

from e2e_sae_plugin.checkpoint.folder import MANIFEST_FILENAME
from e2e_sae_plugin.checkpoint.run_folder import RunFolder
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.metrics_log import METRICS_FILENAME
from e2e_sae_plugin.output_folder import holds_another_run, is_finished
from e2e_sae_plugin.precision import accumulation_dtype

logger = logging.getLogger(__name__)

FLOAT64_ARCHITECTURES = ("batchtopk", "matryoshka_batchtopk")
"""They keep their threshold in float64."""

RESERVE_BYTES = 16 * 2**20
"""Left free beside the weights: configs, sparsity, metrics."""


def check_folders(
    cfg: E2ESAERunnerConfig, sae: TrainingSAE[Any], run_folder: RunFolder | None, resumed_from: Path | None
) -> None:
    """Refuse folders that the run could not write to at its end, or that hold another run.

    Raises:
        ValueError: names the field, the path, and what to do.
    """
    needed: dict[Path, int] = {}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in sae.state_dict().values())
    if cfg.output_path is not None:
        output = Path(cfg.output_path)
        _check_writable("output_path", output)
        _check_not_another_run(cfg, output, resumed_from)
        needed[output] = weights
    if run_folder is not None:
        _check_writable("checkpoint_path", run_folder.path.parent)  # the run's own folder is SAELens's addition
        needed[run_folder.path] = (
            weights * (3 if cfg.patience_evaluations is None else 4) * _n_checkpoints_to_come(cfg, run_folder)
        )  # weights, Adam's two moments, the weights of the lowest KL
    _check_space(needed)


def _check_writable(field: str, path: Path) -> None:
    try:
        there = _nearest_existing(path)
        if not there.is_dir():
            raise ValueError(f"{field}={str(path)!r} cannot be a folder: {str(there)!r} is no folder. Choose another.")
        probe = there / f".write-test-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
        if len(os.fsencode(path.name)) > os.pathconf(there, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        raise ValueError(
            f"{field}={str(path)!r} cannot be written: {error.strerror or error}. Choose another {field}, or change the "
            "folder's permissions."
        ) from None


def _nearest_existing(path: Path) -> Path:
    """The path itself or the first folder above it; a link that leads nowhere counts as there."""
    path = path.absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _check_not_another_run(cfg: E2ESAERunnerConfig, output: Path, resumed_from: Path | None) -> None:
    if (output / MANIFEST_FILENAME).exists():
        raise ValueError(
            f"output_path={str(output)!r} is a checkpoint, which would be damaged. Choose another output_path."
        )
    if (output / METRICS_FILENAME).is_dir():
        raise ValueError(
            f"output_path={str(output)!r} holds a folder named {METRICS_FILENAME}. Choose another output_path."
        )
    if cfg.overwrite_output:
        return
    theirs = holds_another_run(cfg, output)
    if theirs is None and resumed_from is None and is_finished(output):
        theirs = "the finished SAE of this very run, which would be trained again and overwritten."
    if theirs is not None:
        raise ValueError(
            f"output_path={str(output)!r} holds {theirs}\nChoose another output_path, move that folder away, or set "
            "overwrite_output=True (in a file: overwrite_output: true)."
        )
    if resumed_from is None and (output / METRICS_FILENAME).exists():
        logger.warning("%s holds an earlier start of this very run, which did not finish; it begins anew.", output)


def _n_checkpoints_to_come(cfg: E2ESAERunnerConfig, run_folder: RunFolder) -> int:
    """Checkpoints that will lie there beyond those that do: one more than are kept, while the newest is being written."""
    kinds = [manifest["kind"] for _, manifest in run_folder.checkpoints()]
    rolling = max(cfg.keep_checkpoints if cfg.checkpoint_every_minutes is not None else 1, 1) - kinds.count("rolling")
    milestones = cfg.n_checkpoints - kinds.count("milestone")
    return max(rolling, 0) + max(milestones, 0) + int(cfg.save_final_checkpoint) + 1


def _check_space(needed: dict[Path, int]) -> None:
    by_disk: dict[int, list[Path]] = {}
    for path in needed:
        by_disk.setdefault(os.stat(_nearest_existing(path)).st_dev, []).append(path)
    for paths in by_disk.values():
        wanted = sum(needed[path] for path in paths) + RESERVE_BYTES
        free = shutil.disk_usage(_nearest_existing(paths[0])).free
        if free < wanted:
            raise ValueError(
                f"The disk of {' and '.join(repr(str(path)) for path in paths)} has {free / 1e9:.2f} GB free, but the SAE "
                f"and its checkpoints (weights, and the optimizer's two moments) can need {wanted / 1e9:.2f} GB. Free "
                "space, choose another output_path or checkpoint_path, or lower n_checkpoints or keep_checkpoints."
            )


def check_device(cfg: E2ESAERunnerConfig) -> None:
    """Refuse a device that this machine, or this build of torch, does not have.

    Raises:
        ValueError: names the field and the device.
    """
    for field in ("device", "llm_device"):
        check_device_name(field, str(getattr(cfg, field)))
    _check_float64(cfg)


def _check_float64(cfg: E2ESAERunnerConfig) -> None:
    """Refuse what SAELens computes in float64 on the SAE's device, if the device has none (Apple's MPS)."""
    if accumulation_dtype(torch.device(str(cfg.device))) == torch.float64:
        return
    architecture, normalization, dtype = cfg.sae.architecture(), cfg.sae.normalize_activations, str(cfg.sae.dtype)
    needs = (
        ("sae.architecture", architecture, architecture in FLOAT64_ARCHITECTURES),
        ("sae.normalize_activations", normalization, normalization == "covariance_whitening"),
        ("sae.dtype", dtype, "float64" in dtype),
    )
    for field, value, is_needed in needs:
        if is_needed:
            raise ValueError(
                f"{field}={value!r} needs float64, which device={str(cfg.device)!r} does not have. Use device='cpu' or "
                "'cuda', or another architecture, normalization or dtype."
            )


def check_device_name(field: str, device: str) -> None:
    """The same of one device.

    Raises:
        ValueError: names the field and the device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")  # torch goes on for a page
        raise ValueError(
            f"{field}={device!r} cannot be used here: {reason}. Use 'cpu', or a device that is there."
        ) from None


def device_or_default(field: str, device: str | None) -> str:
    """A device that can be used; CUDA where there is one, else the CPU, where none is named.

    Raises:
        ValueError: it cannot be used.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device_name(field, device)
    return device


def check_device_spelling(cfg: E2ESAERunnerConfig) -> None:
    """Refuse a device whose name torch does not know, whether or not this machine has it.

    Raises:
        ValueError: names the field and the device.
    """
    for field in ("device", "llm_device"):
        name = getattr(cfg, field)
        try:
            torch.device("cpu" if name is None else name)
        except RuntimeError:
            raise ValueError(
                f"{field}={str(name)!r} is no name of a device. Expected one that torch.device() takes: cpu, cuda, cuda:1, "
                "mps, ..."
            ) from None


def check_model_shape(cfg: E2ESAERunnerConfig) -> None:
    """Compare hook, width and context with the model's config, which is a small file, before its weights are fetched.

    What the config cannot tell is left to the checks on the loaded model.

    Raises:
        ValueError: the layer does not exist, `sae.d_in` is not the residual stream's width, or the context is too long.
    """
    shape = _shape_from_config(cfg)
    if shape is None:
        return
    n_layers, width, n_ctx = shape
    if n_ctx is not None and cfg.context_size > n_ctx:
        raise ValueError(
            f"context_size={cfg.context_size} is longer than the context of {cfg.model_name!r}, {n_ctx} tokens."
        )
    layer = re.search(r"\.(\d+)(\.|$)", cfg.hook_name)
    if layer is not None and n_layers is not None and int(layer[1]) >= n_layers:
        raise ValueError(
            f"hook_name={cfg.hook_name!r} names layer {layer[1]}, but {cfg.model_name!r} has layers 0 to {n_layers - 1}."
        )
    if re.search(r"hook_resid_(pre|mid|post)$", cfg.hook_name) and width is not None and cfg.sae.d_in != width:
        raise ValueError(
            f"sae.d_in={cfg.sae.d_in} does not match {cfg.hook_name!r}: {cfg.model_name!r} has a residual stream of {width} "
            f"dimensions. Set sae.d_in={width}."
        )


def _shape_from_config(cfg: E2ESAERunnerConfig) -> tuple[int | None, int | None, int | None] | None:
    """(layers, width, context), or None where no config can be had."""
    try:
        if cfg.model_class_name == "HookedTransformer":
            if cfg.model_name not in OFFICIAL_MODEL_NAMES:
                return None  # an alias or a folder: the loader knows what to make of it
            loaded = get_pretrained_model_config(cfg.model_name)
            return loaded.n_layers, loaded.d_model, loaded.n_ctx
        text = AutoConfig.from_pretrained(cfg.model_name).get_text_config()
    except Exception as error:  # whatever is wrong with the model, its loader says it better
        logger.debug("No config of %s before its weights: %s", cfg.model_name, error)
        return None
    return tuple(getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size", "max_position_embeddings"))  # pyright: ignore[reportReturnType]


def check_wandb_login() -> None:
    """Refuse Weights & Biases without credentials, before anything slow happens.

    Raises:
        ValueError: no API key is known and `WANDB_MODE` is not offline or disabled.
    """
    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun") or wandb.run is not None:
        return
    if not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "logger.log_to_wandb is True but there is no Weights & Biases login. Run `wandb login`, set WANDB_API_KEY, set "
            "WANDB_MODE=offline, or switch it off: logger=LoggingConfig(log_to_wandb=False), in a file "
            "logger: {log_to_wandb: false}, as a flag --log_to_wandb false."
        )
