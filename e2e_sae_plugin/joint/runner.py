"""`MultiE2ESAETrainingRunner`: several SAEs in one run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import SAE
from tqdm.auto import tqdm

from e2e_sae_plugin.build import load_model_for
from e2e_sae_plugin.checkpoint.folder import write_whole
from e2e_sae_plugin.checkpoint.identity import run_identity
from e2e_sae_plugin.config_values import require_round_trip
from e2e_sae_plugin.joint.config import MultiE2ESAERunnerConfig
from e2e_sae_plugin.joint.joint_run import JointRun, load_frozen
from e2e_sae_plugin.joint.sae_set import MANIFEST_FILENAME, SAESet, load_sae_set, write_manifest
from e2e_sae_plugin.output_folder import output_is_finished
from e2e_sae_plugin.splice import splice_into
from e2e_sae_plugin.splice.joint import in_execution_order
from e2e_sae_plugin.sweep.runner import SweepRunner
from e2e_sae_plugin.torch_state import own_torch_state

logger = logging.getLogger(__name__)

RUN_FILENAME = "multi_runner_cfg.json"


class MultiE2ESAETrainingRunner:
    """Trains several SAEs in one run, in the place of SAELens's `MultiSAETrainingRunner`.

    Interrupted, run the same again: it goes on where it stood. What is finished stays finished.

    Args:
        cfg: the run.
        override_model: as in `E2ESAETrainingRunner`.
        override_dataset: as in `E2ESAETrainingRunner`.

    Raises:
        ValueError: the config does not fit the model or the data, SAEs overlap at one hook, or another run lies in
            `output_path`.
    """

    @own_torch_state()
    def __init__(self, cfg: MultiE2ESAERunnerConfig, override_model: Any = None, override_dataset: Any = None):
        require_round_trip(cfg)
        self.cfg, self._model, self._dataset = cfg, override_model, override_dataset

    @own_torch_state()
    def run(self) -> SAESet:
        """Train what is not finished; the set of all SAEs, in the model's order, on the CPU.

        Raises:
            NonFiniteError: too many steps in a row were not finite; the SAEs as they were before are in a checkpoint.
            RunInterrupted: a signal came; the run was saved first.
        """
        self._refuse_another_run()
        if self._is_finished():
            text = f"This run is finished: its SAEs are in {self.cfg.output_path}. There is nothing to do."
            tqdm.write(text) if self.cfg.verbose else logger.info("%s", text)
            return load_sae_set(self.cfg.output_path)
        if self.cfg.mode == "independent":
            return self._independent()
        if self.cfg.mode == "greedy":
            return self._greedy()
        JointRun(self.cfg, self._model, self._dataset, self._mark_output).run()
        return load_sae_set(self.cfg.output_path)

    def _is_finished(self) -> bool:
        """Whether all that this run leaves is there, of the model that it would train on."""
        output = Path(self.cfg.output_path)
        identity = run_identity(self._model, None)
        saes = [member.config for member in self.cfg.members().values()]
        return (output / MANIFEST_FILENAME).is_file() and all(output_is_finished(each, identity) for each in saes)

    def _greedy(self) -> SAESet:
        """One joint run for each SAE, with those before it frozen."""
        done: dict[str, str] = {}
        order = self._order()
        if self.cfg.agreement > 0 and not self._is_read(order[0]):
            raise ValueError(
                f"agreement={self.cfg.agreement!r} has no effect: no frozen SAE sits behind {order[0]!r}, the first that is "
                "trained. Set it to 0."
            )
        for number, name in enumerate(order, start=1):
            stage = self.cfg.stage(name, done)
            run = JointRun(stage, self._model, self._dataset, self._mark_output, number)
            run.run()
            self._model, self._dataset = run.model or self._model, run.dataset or self._dataset
            done[name] = str(Path(self.cfg.output_path) / name)
        return load_sae_set(self.cfg.output_path)

    def _order(self) -> list[str]:
        """The SAEs to train, as the model reaches them."""
        if self._model is None:
            first = next(iter(self.cfg.members().values())).config
            self._model = load_model_for(first)
        hooks = self.cfg.hook_names
        splices = {name: splice_into(self._model, hook, needs_downstream=False) for name, hook in hooks.items()}
        return in_execution_order(splices)

    def _is_read(self, first: str) -> bool:
        """Whether a frozen SAE reads what an SAE writes."""
        hooks = {"": self.cfg.hook_names[first]}
        hooks |= {name: str(load_frozen(name, at).cfg.metadata.hook_name) for name, at in self.cfg.frozen.items()}
        splices = {name: splice_into(self._model, hook, needs_downstream=False) for name, hook in hooks.items()}
        return in_execution_order(splices)[-1] != ""

    def _independent(self) -> SAESet:
        saes = SweepRunner(self.cfg, self._model, self._dataset).run()
        self._mark_output()
        failed = [name for name, sae in saes.items() if sae is None]
        if failed:
            raise OSError(f"{len(failed)} SAEs failed, see failed.json in their folders: {', '.join(failed)}.")
        trained: dict[str, SAE[Any]] = {name: sae for name, sae in saes.items() if sae is not None}
        hooks = {name: str(sae.cfg.metadata.hook_name) for name, sae in trained.items()}
        write_manifest(Path(self.cfg.output_path), list(trained), hooks, {"mode": self.cfg.mode})
        return load_sae_set(self.cfg.output_path)

    def _as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.cfg.to_dict()))

    def _refuse_another_run(self) -> None:
        """The SAEs' own configs do not know of each other.

        Raises:
            ValueError: another run of several SAEs lies in the output folder.
        """
        path = Path(self.cfg.output_path) / RUN_FILENAME
        if not path.is_file() or self.cfg.shared.get("overwrite_output"):
            return
        differences = _differences(json.loads(path.read_text()), self._as_json())
        if differences:
            listed = "\n  ".join(differences)
            raise ValueError(
                f"output_path={self.cfg.output_path!r} holds another run of several SAEs. It differs in:\n  {listed}\n"
                "Choose another output_path, or set overwrite_output=True."
            )

    def _mark_output(self) -> None:
        """Say whose folder it is."""
        output = Path(self.cfg.output_path)
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / RUN_FILENAME, json.dumps(self._as_json(), indent=2) + "\n")


_MAY_DIFFER = frozenset({"verbose", "checkpoint_every_minutes", "checkpoint_path", "device", "llm_device", "logger"})
"""What does not change what is trained."""


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    """By the names of settings, those below others with a dot between."""
    found: list[str] = []
    for key in sorted({*theirs, *ours} - (_MAY_DIFFER if not prefix else set())):
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} there, {b!r} here")
    return found
