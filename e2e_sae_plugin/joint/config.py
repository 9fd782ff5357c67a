"""`MultiE2ESAERunnerConfig`: several SAEs in one run, together or side by side."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import TrainingSAEConfig

from e2e_sae_plugin.architectures import NAMES_EVERY_LOSS, TOKEN_SEPARABLE, WITH_AUXILIARY
from e2e_sae_plugin.config import E2ESAERunnerConfig, read_yaml, require_known_keys
from e2e_sae_plugin.config_values import plain, require_writable
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.sweep.config import NAME, SPARSITY_FIELD, SweepMember
from e2e_sae_plugin.sweep.shared_settings import shared_settings

RESERVED = re.compile(
    r"sweep(-\d+-of-\d+)?|metrics\.jsonl|sae_set\.json|joint\.csv|sweep\.csv|multi_runner_cfg\.json", re.IGNORECASE
)
"""What a run puts beside its SAEs' folders, in the output or with the checkpoints."""

Mode = Literal["joint", "greedy", "independent"]

OWN_KEYS = (
    "saes", "hook_names", "hook_head_indices", "mode", "frozen", "agreement", "objective", "output_path", "checkpoint_path",
)  # fmt: skip

_SINGLE = ("sae", "hook_name", "hook_head_index", "from_pretrained_path")
"""Fields of a run with one SAE that have another name here."""


class MultiE2ESAERunnerConfig:
    """Several SAEs at several hook points of one model, named as in SAELens's `MultiSAETrainingRunnerConfig`.

    Args:
        saes: the training config of each SAE, by a name of yours: a `TrainingSAEConfig`, or a mapping with its fields and
            `architecture`.
        hook_names: the hook of each, by the same names; one string for all with `mode="independent"`.
        hook_head_indices: the head of each that reads one head of its hook alone, as in SAELens.
        mode: `"joint"` (default): all are in one spliced pass, each reads what the ones before it wrote, and all are trained
            together under one objective. `"greedy"`: one after the other in the model's order, each with the ones before
            it finished and in the pass. `"independent"`: each as if alone, on one clean pass, as in a sweep.
        frozen: finished SAEs that are in the pass and not trained, by name: folders, or `owner/name:id` on the Hub. Their
            metadata say where they sit. With one SAE in `saes`, that is one trainable SAE among frozen ones. For `"joint"`
            and `"greedy"`.
        agreement: weight, default 0, of `||f_i(a_hat) - f_i(a)||^2`, the squared difference between the features of an SAE
            on the spliced and on the clean model, summed over features and averaged over tokens and over the SAEs that
            read what a trained one wrote. It teaches an SAE to write what the SAEs after it understand. For `"joint"`; for
            `"greedy"`, where those after an SAE are not there yet, only with frozen ones.
        objective: as `E2ESAERunnerConfig.objective`; downstream terms count from the first SAE in the pass, and `mse` of
            each SAE compares what it writes with what it reads there. Default: the KL alone.
        output_path: gets one SAE folder per name, `sae_set.json` that names them, and `joint.csv` with what they cost.
        checkpoint_path: gets the checkpoints, of all SAEs at once; None for none. Default: `<output_path>-checkpoints`.
        **shared: every other field of `E2ESAERunnerConfig`, the same for all. `local_first` trains each SAE by itself for
            that share of the tokens, locally and on the clean model.

    Raises:
        ValueError: names that do not match, SAEs that overlap at one hook, a setting that means nothing in the mode, or what
            `E2ESAERunnerConfig` refuses.
    """

    def __init__(
        self,
        saes: Mapping[str, TrainingSAEConfig | Mapping[str, Any]],
        hook_names: Mapping[str, str] | str,
        *,
        hook_head_indices: Mapping[str, int | None] | None = None,
        mode: Mode = "joint",
        frozen: Mapping[str, str | Path] | None = None,
        agreement: float = 0.0,
        objective: Objective | Mapping[str, Any] | str | None = None,
        output_path: str | Path = "output",
        checkpoint_path: str | Path | None = "auto",
        **shared: Any,
    ):
        mode, agreement, shared = plain(mode), plain(agreement), plain(shared)
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {list(get_args(Mode))}, got {mode!r}.")
        for key in _SINGLE:
            if key in shared:
                raise ValueError(
                    f"{key} is for one SAE. With several, give saes, hook_names, hook_head_indices or frozen."
                )
        require_known_keys(shared, {*E2ESAERunnerConfig.__dataclass_fields__} - {*_SINGLE}, "the run")
        self.mode: Mode = mode
        self.saes = {name: _as_dict(name, sae) for name, sae in _mapping("saes", saes).items()}
        self.frozen = plain(_mapping("frozen", frozen or {}))
        self.hook_names = self._hooks(plain(hook_names))
        self.hook_head_indices = plain(_mapping("hook_head_indices", hook_head_indices or {}))
        self.objective = _objective(objective)
        self.agreement = agreement
        for name, path in (("output_path", output_path), ("checkpoint_path", checkpoint_path)):
            if not isinstance(path, str | os.PathLike) or not str(path):
                if name == "checkpoint_path" and path is None:
                    continue
                raise ValueError(f"{name} of several SAEs must name a folder, got {path!r}.")
        self.output_path = str(output_path)
        if checkpoint_path == "auto":
            checkpoint_path = f"{self.output_path}-checkpoints"
        self.checkpoint_path = None if checkpoint_path is None else str(checkpoint_path)
        if isinstance(shared.get("logger"), LoggingConfig):
            shared["logger"] = dataclasses.asdict(shared["logger"])
        self.shared = shared_settings(shared, prefix="", what="a run of several SAEs")
        self._check_names()
        self._check_mode()
        self.members()  # refuses what the configs refuse
        self._check_micro_batches()
        require_writable(self.to_dict())

    def _hooks(self, given: Mapping[str, str] | str) -> dict[str, str]:
        if isinstance(given, str):
            return dict.fromkeys(self.saes, given)
        hooks = dict(_mapping("hook_names", given))
        if set(hooks) != set(self.saes):
            raise ValueError(
                f"hook_names must have the names of saes, {sorted(self.saes)}; got {sorted(hooks)}. Too many: "
                f"{sorted(set(hooks) - set(self.saes))}; missing: {sorted(set(self.saes) - set(hooks))}."
            )
        return hooks

    def _check_names(self) -> None:
        if not self.saes:
            raise ValueError("saes is empty: name at least one SAE with its training config.")
        seen_names: dict[str, str] = {}
        for name in [*self.saes, *self.frozen]:
            if not isinstance(name, str):
                raise ValueError(
                    f"The SAE {name!r} must have a text for a name, got {type(name).__name__}: quote it in YAML."
                )
            if not NAME.fullmatch(name):
                raise ValueError(f"The SAE {name!r} names a folder: expected letters, digits and + - _ . alone.")
            if RESERVED.fullmatch(name):
                raise ValueError(
                    f"The SAE {name!r} has the name of a file or folder of the run itself. Call it something else."
                )
            other = seen_names.setdefault(name.casefold(), name)
            if other != name:
                raise ValueError(
                    f"The SAEs {other!r} and {name!r} would share a folder on some file systems. Rename one."
                )
        if both := sorted(set(self.saes) & set(self.frozen)):
            raise ValueError(f"{both} are in saes, to be trained, and in frozen. Give each SAE once.")
        if unknown := sorted(set(self.hook_head_indices) - set(self.saes)):
            raise ValueError(f"hook_head_indices has names that saes has not: {unknown}.")
        if self.mode != "independent":
            seen: dict[str, str] = {}
            for name, hook in self.hook_names.items():
                if hook in seen:
                    raise ValueError(
                        f"The SAEs {seen[hook]!r} and {name!r} overlap: both sit at hook {hook!r}. SAEs that are spliced "
                        "together need a hook of their own each. Leave one of them out, or set mode='independent'."
                    )
                seen[hook] = name

    def _check_mode(self) -> None:
        agreement = self.agreement
        if isinstance(agreement, bool) or not isinstance(agreement, int | float) or not 0 <= agreement < math.inf:
            raise ValueError(f"agreement must be a finite weight >= 0, got {agreement!r}.")
        if self.mode == "independent":
            for name, value in (("frozen", self.frozen), ("agreement", agreement)):
                if value:
                    raise ValueError(
                        f"{name}={value!r} has no effect with mode='independent', where each SAE is alone in its pass. "
                        "Leave it out, or use mode='joint'."
                    )
            return
        if self.mode == "greedy" and agreement > 0 and not self.frozen:
            raise ValueError(
                f"agreement={agreement!r} has no effect with mode='greedy', where the SAEs that would read what one writes "
                "are not there yet while it is trained. Set it to 0, name frozen SAEs behind, or use mode='joint'."
            )
        if len(self.saes) + len(self.frozen) < 2:
            raise ValueError(
                f"mode={self.mode!r} splices several SAEs together, and there is one alone. Give further saes or frozen "
                "ones, or train it by itself: E2ESAERunnerConfig, or mode='independent'."
            )
        if not self.objective.needs_spliced_pass:
            raise ValueError(
                f"mode={self.mode!r} needs an objective with a spliced pass: kl or beta above 0, got kl=0 and beta=0. For "
                "local training use mode='independent'."
            )
        if self.objective.balance_kl:
            raise ValueError(
                "objective.balance_kl scales the KL to the squared error of one SAE, and means nothing where several share "
                "the KL. Leave it out, and give kl and mse weights."
            )
        reasons = {
            "patience_evaluations": "the run goes to its end",
            "checkpoint_blocks": "a block with an SAE in it cannot be computed twice",
            "compile_sae": "its SAEs' inputs have gradients",
        }
        for name, instead in reasons.items():
            value = self.shared.get(name)
            if value not in (None, 0, False):
                raise ValueError(f"{name}={value!r} is not supported with mode={self.mode!r}: {instead}. Leave it out.")
        for name, sae in self.saes.items():
            if sae.get("architecture") == "matryoshka_batchtopk":
                raise ValueError(
                    f"saes.{name}: a Matryoshka SAE asks for a spliced pass for each of its levels, which means nothing "
                    f"with mode={self.mode!r}. Use another architecture, or mode='independent'."
                )

    def _check_micro_batches(self) -> None:
        """The SAEs run within the model's pass, so those that need the whole step's tokens need them in one pass."""
        if self.mode == "independent":
            return
        for name, member in self.members().items():
            cfg, architecture = member.config, member.config.sae.architecture()
            step, micro = cfg.step_size_prompts, cfg.micro_batch_size_prompts
            fixed_weight = self.objective.auxiliary is not None or self.objective.mse > 0
            if architecture in TOKEN_SEPARABLE or (architecture in ("topk", "abstopk", "gated") and fixed_weight):
                continue
            if micro < step:
                cure = "" if architecture == "batchtopk" else ", or give objective.auxiliary a weight"
                raise ValueError(
                    f"saes.{name}: architecture {architecture!r} needs all of a step's tokens at once, but "
                    f"store_batch_size_prompts={cfg.store_batch_size_prompts} lets {micro} of its {step} sequences through "
                    f"the model at a time. Set store_batch_size_prompts={step} or more, or lower train_batch_size_tokens"
                    f"{cure}."
                )

    # What the runner asks.

    @property
    def verbose(self) -> bool:
        """Default True."""
        return self.shared.get("verbose", E2ESAERunnerConfig.verbose)

    @property
    def checkpoint_every_minutes(self) -> float | None:
        """Default 15."""
        return self.shared.get("checkpoint_every_minutes", E2ESAERunnerConfig.checkpoint_every_minutes)

    def members(self) -> dict[str, SweepMember]:
        """The SAEs that are trained, by name, each with the config of its own run."""
        found: dict[str, SweepMember] = {}
        kind = self.objective.kind if self.mode == "independent" else f"{self.mode}-{self.objective.kind}"
        for name, sae in self.saes.items():
            hook = self.hook_names[name]
            config = self._member_config(name, sae, hook)
            sparsity = float(getattr(config.sae, SPARSITY_FIELD.get(config.sae.architecture(), ""), 0))
            found[name] = SweepMember(name, kind, sparsity, config.seed, hook, config)
        return found

    def _member_config(self, name: str, sae: Mapping[str, Any], hook: str) -> E2ESAERunnerConfig:
        settings = {
            **self.shared,
            "sae": dict(sae),
            "objective": self._objective_of(sae).to_dict(),
            "hook_name": hook,
            "hook_head_index": self.hook_head_indices.get(name),
            "output_path": str(Path(self.output_path) / name),
            "checkpoint_path": None,  # those of all SAEs are written at once
            "checkpoint_every_minutes": None,
            "verbose": False,
        }
        try:
            return E2ESAERunnerConfig.from_dict(settings)
        except ValueError as error:
            raise ValueError(f"saes.{name}: {error}") from error

    def _objective_of(self, sae: Mapping[str, Any]) -> Objective:
        """A weight for auxiliary terms is for those SAEs that have one."""
        others_have = any(str(each.get("architecture")) in WITH_AUXILIARY for each in self.saes.values())
        if others_have and str(sae.get("architecture")) in NAMES_EVERY_LOSS - WITH_AUXILIARY:
            return dataclasses.replace(self.objective, auxiliary=None)
        return self.objective

    def stage(self, name: str, frozen: Mapping[str, str]) -> MultiE2ESAERunnerConfig:
        """The joint run that trains one SAE of a greedy one."""
        stage: MultiE2ESAERunnerConfig = object.__new__(MultiE2ESAERunnerConfig)
        stage.__dict__.update(self.__dict__)
        stage.mode, stage.saes, stage.frozen = "joint", {name: self.saes[name]}, {**self.frozen, **frozen}
        stage.hook_names = {name: self.hook_names[name]}
        stage.hook_head_indices = {key: value for key, value in self.hook_head_indices.items() if key == name}
        if self.checkpoint_path is not None:
            stage.checkpoint_path = str(Path(self.checkpoint_path) / name)
        return stage

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return {
            "saes": {name: dict(sae) for name, sae in self.saes.items()},
            "hook_names": dict(self.hook_names),
            "hook_head_indices": dict(self.hook_head_indices),
            "mode": self.mode,
            "frozen": dict(self.frozen),
            "agreement": self.agreement,
            "objective": self.objective.to_dict(),
            "output_path": self.output_path,
            "checkpoint_path": self.checkpoint_path,
            **self.shared,
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> MultiE2ESAERunnerConfig:
        """Read a mapping as in a YAML file: the arguments of this class.

        Raises:
            ValueError: an unknown or missing key, or what the class refuses.
        """
        settings = dict(settings)
        require_known_keys(settings, {*OWN_KEYS, *E2ESAERunnerConfig.__dataclass_fields__}, "the run")
        for name in ("saes", "hook_names"):
            if name not in settings:
                raise ValueError(f"The run has no {name!r}. With saes, hook_names says where each of them sits.")
        return cls(**settings)

    @classmethod
    def load(cls, path: Path) -> MultiE2ESAERunnerConfig:
        """Read a YAML (or JSON) file.

        Raises:
            ValueError: there is no such file, it is no mapping, or `from_dict` refuses it.
        """
        return cls.from_dict(read_yaml(path))


def _mapping(name: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a mapping from the SAEs' names, got {given!r}.")
    return given


def _as_dict(name: str, sae: TrainingSAEConfig | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(sae, TrainingSAEConfig):
        return {key: plain(value) for key, value in sae.to_dict().items() if key != "metadata"}
    if not isinstance(sae, Mapping):
        raise ValueError(f"saes.{name} must be a training config of SAELens, or a mapping of its fields; got {sae!r}.")
    return plain(sae)


def _objective(given: Objective | Mapping[str, Any] | str | None) -> Objective:
    if given is None:
        return Objective()
    return given if isinstance(given, Objective) else Objective.from_dict(given)
