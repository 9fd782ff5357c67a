"""Settings that SAEs trained side by side have in common, and those that cannot be meant there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.config_reading import read_numbers, require_known_keys
from e2e_sae_plugin.config_values import plain, require_writable


def shared_settings(given: Mapping[str, Any] | E2ESAERunnerConfig, *, prefix: str, what: str) -> dict[str, Any]:
    """A dict of its own, without where things are saved, which is said for all SAEs at once.

    Args:
        prefix: before the names of settings in messages, for instance `"base."`.
        what: what the SAEs are together, for instance `"a sweep"`.

    Raises:
        ValueError: a setting that is not known, or that would have no effect or is refused for SAEs side by side.
    """
    base = given.to_dict() if isinstance(given, E2ESAERunnerConfig) else plain(given)
    for name in ("checkpoint_path", "output_path", "sae_lens_version"):
        base.pop(name, None)
    where = prefix.rstrip(".") or "config"
    require_known_keys(base, {f.name for f in fields(E2ESAERunnerConfig)}, where)
    base = read_numbers(base, E2ESAERunnerConfig, where)
    for name in ("sae", "logger"):
        if not isinstance(base.get(name) or {}, Mapping):
            raise ValueError(f"{prefix}{name} must be a mapping, got {base[name]!r}.")
    base["logger"] = {"log_to_wandb": False, **(base.get("logger") or {})}  # the host's default is True
    if base["logger"]["log_to_wandb"]:
        raise ValueError(
            f"{prefix}logger.log_to_wandb=True is refused in {what}: its SAEs would write into one run of Weights & "
            "Biases. Each of them writes metrics.jsonl into its folder; set log_to_wandb to False."
        )
    _refuse(base, prefix, what)
    require_writable(base, prefix)
    every = base.get("checkpoint_every_minutes")
    if every is not None and (isinstance(every, bool) or not 0 < every < math.inf):
        raise ValueError(
            f"{prefix}checkpoint_every_minutes must be a finite number above 0, or None for none, got {every!r}."
        )
    return base


def _refuse(base: Mapping[str, Any], prefix: str, what: str) -> None:
    for name in ("resume_from_checkpoint", "adapter", "from_pretrained_path"):
        if base.get(name) not in (None, "none"):
            raise ValueError(f"{prefix}{name}={base[name]!r} is refused in {what}, which trains new SAEs.")
    for name in ("push_to_hub", "hub_private", "hub_revision", "hub_sae_id", "hub_checkpoints"):
        if base.get(name) not in (None, False):
            raise ValueError(
                f"{prefix}{name}={base[name]!r} is refused in {what}, whose SAEs would each make a commit. Share all "
                "of them in one when it is done: e2e-sae push OWNER/NAME FOLDER."
            )
    for name in ("n_checkpoints", "save_final_checkpoint", "keep_checkpoints"):
        if base.get(name) not in (None, getattr(E2ESAERunnerConfig, name)):
            raise ValueError(
                f"{prefix}{name}={base[name]!r} has no effect in {what}, whose checkpoints are written for all its SAEs "
                "at once, by the clock (checkpoint_every_minutes). Leave it out."
            )
