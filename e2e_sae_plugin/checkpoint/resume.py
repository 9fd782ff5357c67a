"""Which checkpoint a run goes on from, and whether it is this run's."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import NoneType
from typing import Any

from e2e_sae_plugin.checkpoint.folder import (
    E2E_CFG_FILENAME,
    MANIFEST_FILENAME,
    DamagedCheckpointError,
    read_manifest,
    verify_checkpoint,
)
from e2e_sae_plugin.checkpoint.identity import identity_differences
from e2e_sae_plugin.checkpoint.run_folder import RunFolder, visible_folders
from e2e_sae_plugin.config import E2ESAERunnerConfig

logger = logging.getLogger(__name__)

AUTO = "auto"

# Where a run is written, on what it runs, how it reports, how it is guarded: none of it is part of what is computed.
MAY_DIFFER = frozenset(
    {
        "act_store_device", "checkpoint_every_minutes", "checkpoint_path", "device", "hub_checkpoints", "hub_private",
        "hub_revision", "hub_sae_id", "keep_checkpoints", "llm_device", "push_to_hub",
        "logger", "max_skipped_steps", "n_checkpoints", "output_path", "overwrite_output", "resume_from_checkpoint",
        "sae_lens_training_version", "sae_lens_version", "save_final_checkpoint", "verbose",
        # Buffers and batches of the host's that are not used here, the micro-batch, which changes rounding alone, and what
        # changes memory alone.
        "activations_mixing_fraction", "dead_feature_threshold", "llm_compilation_mode", "n_batches_in_buffer",
        "prefetch_llm_batches", "store_batch_size_prompts", "checkpoint_blocks",
        # Who computes it.
        "shard_dictionary",
        "sae.device",
    }
)  # fmt: skip
_ABSENT = "(absent)"


def config_differences(saved: dict[str, Any], cfg: E2ESAERunnerConfig) -> list[str]:
    """Settings of a saved `e2e_runner_cfg.json` that make it another run than `cfg`'s, as "name: saved -> now"."""
    then, now = _flat(saved), _flat(_as_json(cfg.to_dict()))
    defaults = _flat(_as_json({**_defaults(cfg), "sae": _defaults(cfg.sae), "objective": _defaults(cfg.objective)}))
    for name in now.keys() - then.keys() & defaults.keys():
        then[name] = defaults[name]  # of a version that had no such field yet
    return [
        f"{name}: {then.get(name, _ABSENT)!r} -> {now.get(name, _ABSENT)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name, _ABSENT) != now.get(name, _ABSENT)
    ]


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config))


def _defaults(config: Any) -> dict[str, Any]:
    simple = (bool, int, float, str, NoneType)
    return {field.name: field.default for field in dataclasses.fields(config) if isinstance(field.default, simple)}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if prefix + key in MAY_DIFFER or (prefix == "sae." and key == "metadata"):
            continue
        if isinstance(value, dict) and prefix == "":
            flat |= _flat(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_saved_config(path: Path) -> dict[str, Any]:
    """The content of an `e2e_runner_cfg.json`.

    Raises:
        DamagedCheckpointError: it is no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{str(path)!r} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"{str(path)!r} is damaged: it should hold a JSON object.")
    return content


def find_checkpoint(cfg: E2ESAERunnerConfig, identity: dict[str, str | None]) -> Path | None:
    """The checkpoint that `cfg.resume_from_checkpoint` means, whole and of this run; None to start anew.

    `"auto"` is the newest one below `checkpoint_path`, of any earlier start of this run; what is damaged is passed over
    with a warning.

    Raises:
        DamagedCheckpointError: the folder that was named is not there, no checkpoint, or not whole.
        ValueError: it belongs to another run (the differences are listed), or to a finished one.
    """
    if cfg.resume_from_checkpoint is None:
        return None
    if cfg.resume_from_checkpoint == AUTO:
        return _newest(cfg, identity)
    folder = Path(cfg.resume_from_checkpoint)
    try:
        manifest = verify_checkpoint(folder)
    except DamagedCheckpointError as error:
        inside = [
            entry for path in (folder, *visible_folders(folder)) for entry in RunFolder(path, keep=0).checkpoints()
        ]
        inside.sort(key=lambda entry: entry[1]["saved_at"], reverse=True)
        hint = f" The newest checkpoint inside it is {str(inside[0][0])!r}." if inside else ""
        raise DamagedCheckpointError(f"resume_from_checkpoint: {error}{hint}") from None
    if manifest["kind"] == "final":
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} holds the finished SAE of its run, so there is nothing to go on with. "
            "Load it with sae_lens.SAE.load_from_disk, or start another run from its weights with from_pretrained_path."
        )
    differences = config_differences(read_saved_config(folder / E2E_CFG_FILENAME), cfg)
    differences += identity_differences(manifest, identity)
    if differences:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} is of another run than this config's:\n  "
            + "\n  ".join(differences)
            + "\nUse the config that it was made with (its e2e_runner_cfg.json), or start a new run from its weights with "
            "from_pretrained_path."
        )
    return folder


def run_folder_of(cfg: E2ESAERunnerConfig, resumed_from: Path | None) -> RunFolder | None:
    """Where this run's checkpoints go: beside the one that it goes on from, where that lies below `checkpoint_path`."""
    if cfg.checkpoint_path is None:
        return None
    path = Path(cfg.checkpoint_path)
    if resumed_from is not None and resumed_from.resolve().parent.parent == path.resolve().parent:
        path = resumed_from.parent
    return RunFolder(path, keep=cfg.keep_checkpoints)


def check_identity(folder: Path, identity: dict[str, str | None]) -> None:
    """The same for what is only known once the model is loaded.

    Raises:
        ValueError: the checkpoint was made with another model or another given SAE.
    """
    differences = identity_differences(read_manifest(folder), identity)
    if differences:
        raise ValueError(f"The checkpoint {str(folder)!r} is of another run: {'; '.join(differences)}.")


def _newest(cfg: E2ESAERunnerConfig, identity: dict[str, str | None]) -> Path | None:
    assert cfg.checkpoint_path is not None  # checked by the config
    base = Path(cfg.checkpoint_path).parent  # SAELens gives every start of a run a folder of its own
    found: list[tuple[str, int, Path]] = []
    damaged: list[str] = []
    for path in [path for run in visible_folders(base) for path in visible_folders(run)]:
        try:
            manifest = read_manifest(path)
        except DamagedCheckpointError as error:
            if (path / MANIFEST_FILENAME).exists() or (path / E2E_CFG_FILENAME).exists():
                damaged.append(str(error))
            continue
        if manifest["kind"] != "final":
            found.append((manifest["saved_at"], manifest["n_training_steps"], path))
    others: list[tuple[Path, list[str]]] = []
    chosen: Path | None = None
    for _, _, path in sorted(found, reverse=True):
        try:
            manifest = verify_checkpoint(path, only=E2E_CFG_FILENAME)
            differences = config_differences(read_saved_config(path / E2E_CFG_FILENAME), cfg)
            differences += identity_differences(manifest, identity)
            if differences:
                others.append((path, differences))
                continue
            verify_checkpoint(path)
        except DamagedCheckpointError as error:
            damaged.append(str(error))
            continue
        chosen = path
        break
    if damaged and chosen is None:
        raise DamagedCheckpointError(
            "resume_from_checkpoint='auto' finds damaged checkpoints alone, and does not start anew over them:\n  "
            + "\n  ".join(damaged)
            + "\nMove them away to start anew."
        )
    for error in damaged:
        logger.warning("Passed over: %s", error)
    if chosen is not None:
        return chosen
    if others:
        logger.warning(
            "resume_from_checkpoint='auto': %d checkpoint(s) below %s are of other runs; the newest, %s, differs in %s.",
            len(others), base, others[0][0], "; ".join(others[0][1]),
        )  # fmt: skip
    logger.warning("resume_from_checkpoint='auto': no checkpoint of this run below %s, so it starts anew.", base)
    return None
