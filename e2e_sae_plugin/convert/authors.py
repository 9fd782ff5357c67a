"""The authors' config files: what their YAML says, in the dialects that it has had."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml


class NoCounterpartError(ValueError):
    """Part of a run that cannot be had here; the message names it."""


# What their config classes have had over time. All but a few say how often something was logged or saved.
KNOWN = {
    "": {
        "act_frequency_n_tokens", "adam_beta1", "batch_size", "collect_act_frequency_every_n_samples",
        "collect_output_metrics_every_n_samples", "cooldown_samples", "effective_batch_size", "eval_data",
        "eval_every_n_samples", "eval_n_samples", "log_every_n_grad_steps", "loss", "lr", "lr_schedule", "max_grad_norm",
        "min_lr_factor", "n_samples", "saes", "save_dir", "save_every_n_samples", "seed", "tlens_model_name",
        "tlens_model_path", "train_data", "wandb_project", "wandb_run_name", "wandb_run_name_prefix", "warmup_samples",
    },
    "saes": {
        "dict_size_to_input_ratio", "k", "pretrained_sae_paths", "retrain_saes", "sae_positions", "sae_position_name",
        "sae_position_names", "type_of_sparsifier",
    },
    "train_data": {
        "column_name", "dataset_name", "is_tokenized", "n_ctx", "seed", "split", "streaming", "tokenizer_name",
    },
}  # fmt: skip
# The newest name first.
_POSITIONS = ("sae_positions", "sae_position_names", "sae_position_name")


@dataclass(frozen=True)
class AuthorsConfig:
    """A config of theirs; what only some runs need is read where it is needed, with `number` and the like."""

    content: Mapping[str, Any]
    """All of it."""
    positions: tuple[str, ...]
    """Names of hooks, or parts of names: their SAEs are at all hooks that contain one."""
    model_name: str | None
    """TransformerLens's name; None for a model of their own."""

    def section(self, name: str) -> Mapping[str, Any]:
        """`saes`, `train_data` or `loss`; empty where there is none."""
        return _mapping(self.content.get(name), name)

    def unknown_keys(self) -> list[str]:
        """What no version of their config has had, outside the loss (where it is refused)."""
        return [
            f"{where}.{key}".lstrip(".")
            for where, known in KNOWN.items()
            for key, value in (self.section(where) if where else self.content).items()
            if key not in known and value is not None
        ]

    def json_ready(self) -> dict[str, Any]:
        """The whole of it, to keep. Of absolute paths only the last part stays: metadata get published, and a path says
        who trained it where."""
        return json.loads(json.dumps(_without_folders(self.content), default=str))


def read_config(path: Path) -> AuthorsConfig:
    """Read a `final_config.yaml`, or the `.yaml` beside a published SAE.

    Raises:
        ValueError: it is missing, is no YAML mapping, says not where the SAEs sit, or is of a codebook.
    """
    if not path.is_file():
        raise ValueError(f"There is no config {str(path)!r}, which says what the checkpoint is of.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not valid YAML: {error}") from None
    if not isinstance(content, Mapping) or not isinstance(content.get("saes"), Mapping):
        raise ValueError(
            f"{path.name} is no config of an SAE run: it has no section 'saes'. Expected the final_config.yaml of the "
            "authors' run_train_tlens_saes.py."
        )
    saes = content["saes"]
    kind = saes.get("type_of_sparsifier")
    if kind not in (None, "sae"):
        raise ValueError(
            f"{path.name}: saes.type_of_sparsifier is {kind!r}, which SAELens has no architecture for. Expected 'sae'."
        )
    if saes.get("k") is not None:
        raise ValueError(f"{path.name}: saes.k={saes['k']!r} is a setting of codebooks, which SAELens has not.")
    name = content.get("tlens_model_name")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{path.name}: tlens_model_name must be a model's name, got {name!r}.")
    return AuthorsConfig(content, _positions(saes, path.name), name)


def _positions(saes: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = next((saes[name] for name in _POSITIONS if saes.get(name) is not None), None)
    positions = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else ()
    if not positions or not all(isinstance(position, str) and position for position in positions):
        raise ValueError(f"{where}: saes.sae_positions must be the name of a hook or a list of names, got {given!r}.")
    return positions


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise NoCounterpartError(f"{name} must be a mapping, got {value!r}")
    return value


def number(section: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number of a config; YAML reads `5e-4`, without a dot, as a string.

    Raises:
        NoCounterpartError: it is missing without a default, or is none.
    """
    value = section.get(key)
    if value is None and default is not None:
        return float(default)
    try:
        read = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        read = math.nan
    if not math.isfinite(read):
        raise NoCounterpartError(f"{key} must be a number, got {value!r}")
    return read


def whole(section: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The same for a whole number."""
    read = number(section, key, default)
    if not read.is_integer():
        raise NoCounterpartError(f"{key} must be a whole number, got {section[key]!r}")
    return int(read)


def text(section: Mapping[str, Any], key: str) -> str:
    """The same for a name."""
    value = section.get(key)
    if not isinstance(value, str) or not value:
        raise NoCounterpartError(f"{key} must be a name, got {value!r}")
    return value


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~/")) or value[1:3] in (":\\", ":/")):
        return PurePosixPath(value.replace("\\", "/")).name
    return value
