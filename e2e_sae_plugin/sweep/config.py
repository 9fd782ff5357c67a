"""`SweepConfig`: which SAEs a sweep trains."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, cast

from e2e_sae_plugin.config import (
    RECIPE_LOCAL_FIRST,
    E2ESAERunnerConfig,
    read_numbers,
    read_yaml,
    recipe_decay_steps,
    require_known_keys,
)
from e2e_sae_plugin.config_values import read_fields
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.sweep.shared_settings import shared_settings

logger = logging.getLogger(__name__)

SPARSITY_FIELD = {
    "standard": "l1_coefficient",
    "gated": "l1_coefficient",
    "jumprelu": "l0_coefficient",
    "topk": "k",
    "abstopk": "k",
    "batchtopk": "k",
    "matryoshka_batchtopk": "k",
    "matching_pursuit": "max_iterations",
}
"""What `sparsities` means, by architecture."""

OWN_FIELDS = frozenset(
    {
        "objective", "local_first", "sae", "lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps",
        "n_restart_cycles", "adam_beta1", "adam_beta2", "max_grad_norm", "b_dec_init_method", "frozen_parameters",
        "keep_decoder_norms", "dead_feature_window", "feature_sampling_window", "dead_feature_threshold", "autocast",
        "patience_evaluations", "max_skipped_steps", "checkpoint_blocks",
    }
)  # fmt: skip
"""Fields that may differ between the SAEs of a sweep. All others say what model, data and batches are, which are shared."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class SweepKind:
    """One kind of SAE: an objective with the sparsities that it is trained at.

    Args:
        objective: what is minimised; as `E2ESAERunnerConfig.objective`.
        sparsities: values of the architecture's sparsity setting (`l1_coefficient`, `l0_coefficient`, `k`, …).
        settings: other fields of the config that this kind has to itself (`OWN_FIELDS`), for instance `lr`; those below
            `sae` are added to the base's.
    """

    objective: Objective
    sparsities: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read_fields(self)


@dataclass(frozen=True)
class SweepMember:
    """One SAE of a sweep."""

    name: str
    kind: str
    sparsity: float
    seed: int
    hook_name: str
    config: E2ESAERunnerConfig


class SideBySide(Protocol):
    """What says which SAEs are trained side by side, and where they go: `SweepConfig`, for one."""

    @property
    def output_path(self) -> str | Path:
        """Gets one folder for each."""
        ...

    @property
    def checkpoint_path(self) -> str | Path | None:
        """Gets the checkpoints of all."""
        ...

    @property
    def checkpoint_every_minutes(self) -> float | None:
        """None for none by the clock."""
        ...

    @property
    def verbose(self) -> bool:
        """Whether to show progress."""
        ...

    def members(self) -> dict[str, SweepMember]:
        """The SAEs by name."""
        ...


@dataclass(frozen=True)
class SweepConfig:
    """A grid of SAEs that are trained side by side, on one stream of tokens with one clean pass per batch.

    Each SAE is the one that `E2ESAETrainingRunner` trains with its own config (`members`) on the same data.

    Args:
        base: the settings that all share, such as the config of a single run. Its objective and sparsity are replaced by the
            kinds', its seed and hook by `seeds` and `hook_names`.
        kinds: the objectives with their sparsities, by the name that reports will show.
        output_path: gets one SAE folder per member, named as in `members`.
        seeds: of the SAEs' initial weights. Default: the base's.
        hook_names: where SAEs are trained. Default: the base's hook.
        checkpoint_path: gets the sweep's checkpoints; None for none. Default: `<output_path>-checkpoints`.

    Raises:
        ValueError: a grid without members, two of the same name, settings that are not a kind's own, or what
            `E2ESAERunnerConfig` refuses.
    """

    base: Mapping[str, Any] | E2ESAERunnerConfig
    kinds: Mapping[str, SweepKind]
    output_path: str | Path
    seeds: Sequence[int] | None = None
    hook_names: Sequence[str] | None = None
    checkpoint_path: str | Path | None = "auto"

    def __post_init__(self) -> None:
        read_fields(self)
        paths = {"output_path": self.output_path}
        if self.checkpoint_path is not None:
            paths["checkpoint_path"] = self.checkpoint_path
        for name, value in paths.items():
            if not isinstance(value, str | os.PathLike) or value == "":
                raise ValueError(f"{name} of a sweep must name a folder, got {value!r}.")
        if self.checkpoint_path == "auto":
            object.__setattr__(self, "checkpoint_path", f"{Path(self.output_path)}-checkpoints")
        object.__setattr__(self, "base", self._checked_base())
        if not self.kinds:
            raise ValueError("A sweep needs at least one kind: an objective with its sparsities.")
        for name, values in (("seeds", self.seeds), ("hook_names", self.hook_names)):
            if values is None:
                continue
            if isinstance(values, str) or not isinstance(values, Sequence) or _repeats(values):
                raise ValueError(f"{name} of a sweep must be a list without repetitions, got {values!r}.")
            if not values:
                raise ValueError(f"{name} of a sweep is empty: leave it out for the base's, or name at least one.")
        for name, kind in self.kinds.items():
            self._check_kind(name, kind)
        self.members()  # refuses what the configs refuse

    def _checked_base(self) -> dict[str, Any]:
        """The base as a dict of its own, without what the sweep says for each SAE."""
        base = shared_settings(self.base, prefix="base.", what="a sweep")
        if isinstance(self.base, Mapping):  # of a config, whose fields all have a value, nothing is known to be meant
            self._warn_of_what_the_grid_sets(base)
        return _without_recipe_start(base) if "objective" in base else base

    def _warn_of_what_the_grid_sets(self, base: dict[str, Any]) -> None:
        """A base may be the file of a single run, whose objective and sparsity say nothing here."""
        sae = base.get("sae") or {}
        sparsity = SPARSITY_FIELD.get(sae.get("architecture", ""))
        replaced = ["objective"] if "objective" in base else []
        if "seed" in base and self.seeds is not None:
            replaced.append("seed")
        if sparsity in sae:
            replaced.append(f"sae.{sparsity}")
        for name in replaced:
            logger.warning("base.%s is not used: the sweep sets it for each SAE.", name)

    def _check_kind(self, name: str, kind: SweepKind) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(f"The kind {name!r} names folders: expected letters, digits and + - _ . alone.")
        if isinstance(kind.sparsities, str) or not isinstance(kind.sparsities, Sequence):
            raise ValueError(f"kinds.{name}.sparsities must be a list, got {kind.sparsities!r}.")
        for value in kind.sparsities:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"kinds.{name}.sparsities must be finite numbers, got {value!r}.")
        if not kind.sparsities or _repeats(kind.sparsities):
            raise ValueError(f"kinds.{name}.sparsities must be a list without repetitions, got {kind.sparsities!r}.")
        require_known_keys(kind.settings, {f.name for f in fields(E2ESAERunnerConfig)}, f"kinds.{name}")
        if not isinstance(kind.settings.get("sae") or {}, Mapping):
            raise ValueError(f"kinds.{name}.sae must be a mapping, got {kind.settings['sae']!r}.")
        for key in kind.settings:
            if key not in OWN_FIELDS:
                raise ValueError(
                    f"kinds.{name} sets {key!r}, which all SAEs of a sweep share. Set it in base; a kind can have its own "
                    f"{sorted(OWN_FIELDS)}."
                )

    @property
    def checkpoint_every_minutes(self) -> float | None:
        """The base's; default 15."""
        return self._base.get("checkpoint_every_minutes", E2ESAERunnerConfig.checkpoint_every_minutes)

    @property
    def verbose(self) -> bool:
        """The base's; default True."""
        return self._base.get("verbose", E2ESAERunnerConfig.verbose)

    @property
    def _base(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self.base)  # since `__post_init__`

    def members(self) -> dict[str, SweepMember]:
        """The SAEs by name: `<kind>-<sparsity>-seed<seed>`, after the hook where there are several."""
        base = self._base
        found: dict[str, SweepMember] = {}
        hooks = list(self.hook_names or [base.get("hook_name", "")])
        for seed in self.seeds or [base.get("seed", 42)]:
            for hook in hooks:
                for kind_name, kind in self.kinds.items():
                    for sparsity in kind.sparsities:
                        place = f"{hook}-" if len(hooks) > 1 else ""
                        name = f"{place}{kind_name}-{sparsity:g}-seed{seed}"
                        if name in found:
                            raise ValueError(f"Two SAEs of the sweep would be named {name!r}.")
                        config = self._config(base, name, kind, sparsity, seed, hook)
                        found[name] = SweepMember(name, kind_name, sparsity, seed, hook, config)
        return found

    def _config(
        self, base: dict[str, Any], name: str, kind: SweepKind, sparsity: float, seed: int, hook: str
    ) -> E2ESAERunnerConfig:
        sae = {**(base.get("sae") or {}), **(kind.settings.get("sae") or {})}
        sparsity_field = SPARSITY_FIELD.get(sae.get("architecture", ""))
        if sparsity_field is None:
            raise ValueError(
                f"base.sae.architecture={sae.get('architecture')!r} has no sparsity setting that a sweep knows. Expected "
                f"one of {sorted(SPARSITY_FIELD)}."
            )
        sae[sparsity_field] = int(sparsity) if sparsity == int(sparsity) and sparsity_field in _WHOLE else sparsity
        try:
            return E2ESAERunnerConfig.from_dict(
                {
                    **base,
                    **kind.settings,
                    "sae": sae,
                    "objective": kind.objective.to_dict(),
                    "seed": seed,
                    "hook_name": hook,
                    "output_path": str(Path(self.output_path) / name),
                    "checkpoint_path": None,  # the sweep's are written for all at once
                    "checkpoint_every_minutes": None,
                    "verbose": False,
                }
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SweepConfig:
        """Read a mapping as in a sweep's YAML file: the fields of this class; below each kind its `objective`,
        `sparsities` and own settings.

        Raises:
            ValueError: an unknown or missing key, or what the classes refuse.
        """
        settings = dict(settings)
        require_known_keys(settings, {f.name for f in fields(cls)}, "the sweep")
        for name in ("base", "kinds", "output_path"):
            if name not in settings:
                raise ValueError(f"The sweep has no {name!r}.")
            if name != "output_path" and not isinstance(settings[name], Mapping):
                raise ValueError(f"{name} of the sweep must be a mapping, got {settings[name]!r}.")
        kinds: dict[str, SweepKind] = {}
        for name, given in settings["kinds"].items():
            if isinstance(given, Mapping):
                require_known_keys(given, {*OWN_FIELDS, "sparsities", *_SHARED}, f"kinds.{name}")
            if not isinstance(given, Mapping) or not {"objective", "sparsities"} <= set(given):
                missing = {"objective", "sparsities"} - set(given if isinstance(given, Mapping) else ())
                raise ValueError(
                    f"kinds.{name} must be a mapping with an objective and sparsities; {' and '.join(sorted(missing))} "
                    f"missing in {given!r}."
                )
            own = {key: value for key, value in given.items() if key not in ("objective", "sparsities")}
            sparsities: Any = given["sparsities"]
            if isinstance(sparsities, list | tuple):
                sparsities = tuple(float(v) if isinstance(v, str) and _is_number(v) else v for v in sparsities)
            kinds[str(name)] = SweepKind(_read_objective(name, given["objective"]), sparsities, own)
        return cls(**{**settings, "kinds": kinds})

    @classmethod
    def load(cls, path: Path) -> SweepConfig:
        """Read a YAML (or JSON) file.

        Raises:
            ValueError: there is no such file, it is no mapping, or `from_dict` refuses it.
        """
        return cls.from_dict(read_yaml(path))


_SHARED = {f.name for f in fields(E2ESAERunnerConfig)}  # known, and refused with another message
_WHOLE = ("k", "max_iterations")


def _without_recipe_start(base: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a config filled in for its own objective, as each kind has another: `local_first` and its decay."""
    is_recipe = base["objective"] == Objective.finetune().to_dict() and base.get("local_first") == RECIPE_LOCAL_FIRST
    if not is_recipe:
        return base
    tokens = base.get("training_tokens", E2ESAERunnerConfig.training_tokens)
    step_tokens = base.get("train_batch_size_tokens", E2ESAERunnerConfig.train_batch_size_tokens)
    decay_steps = recipe_decay_steps(tokens // max(step_tokens, 1))
    filled_in = {"local_first": RECIPE_LOCAL_FIRST, "lr_decay_steps": decay_steps}
    return {name: value for name, value in base.items() if name not in filled_in or value != filled_in[name]}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _repeats(values: Sequence[Any]) -> bool:
    return any(value in values[:index] for index, value in enumerate(values))


def _read_objective(kind: str, given: Any) -> Objective:
    if isinstance(given, Objective):
        return given
    if not isinstance(given, str | Mapping):
        raise ValueError(f"kinds.{kind}.objective must be a name or a mapping, got {given!r}.")
    try:
        return Objective.from_dict(given if isinstance(given, str) else read_numbers(given, Objective, "objective"))
    except ValueError as error:
        raise ValueError(f"kinds.{kind}: {error}") from error
