"""Checkpoints of a whole sweep: every SAE's at one step, and where the shared stream stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from e2e_sae_plugin.checkpoint.folder import DamagedCheckpointError, verify_checkpoint
from e2e_sae_plugin.checkpoint.run_folder import RunFolder
from e2e_sae_plugin.sweep.member import MemberRunner
from e2e_sae_plugin.sweep.stream import SharedBatches

SWEEP_FOLDER = "sweep"
STATE_FILENAME, TENSORS_FILENAME = "sweep_state.json", "stream.safetensors"
KEPT = 2


class SweepCheckpoints:
    """Written last, the sweep's own checkpoint names those of its SAEs, which are from the same step.

    Args:
        path: gets a folder for each SAE and one for the sweep.
        part: names the part of the sweep that this process trains.
    """

    def __init__(self, path: Path, part: str):
        self.path = path
        self.own = RunFolder(path / f"{SWEEP_FOLDER}{part}", KEPT)

    def of(self, name: str) -> RunFolder:
        """Where one SAE's checkpoints go."""
        return RunFolder(self.path / name, KEPT)

    def write(self, batches: SharedBatches, training: Mapping[str, MemberRunner], round_number: int) -> Path:
        """Checkpoints of the SAEs that are training, then the sweep's.

        Raises:
            OSError, SafetensorError: they cannot be written; the one before stays whole.
        """
        members: dict[str, dict[str, Any]] = {}
        for name, member in training.items():
            assert member.trainer is not None
            folder = str(member.trainer.n_training_samples)
            member.trainer.save_checkpoint(folder, kind="rolling")
            reader = member.trainer.data_provider
            members[name] = {"checkpoint": folder, "place": reader.place}  # pyright: ignore[reportAttributeAccessIssue]
        state, tensors = batches.state()

        def fill(folder: Path) -> None:
            text = json.dumps({"members": members, "batches": state, "round": round_number}, indent=1)
            (folder / STATE_FILENAME).write_text(text + "\n")
            save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS_FILENAME)

        return self.own.write(str(round_number), "rolling", {"n_training_steps": round_number}, fill)

    def newest(self) -> Path | None:
        """The newest whole checkpoint all of whose SAEs' are whole too."""
        for path, _ in self.own.checkpoints():
            try:
                verify_checkpoint(path)
                for name, entry in self.members(path).items():
                    verify_checkpoint(self.path / name / entry["checkpoint"])
            except DamagedCheckpointError:
                continue
            return path
        return None

    def members(self, checkpoint: Path) -> dict[str, dict[str, Any]]:
        """By name: the SAE's `checkpoint` folder and its `place` in the stream."""
        return json.loads((checkpoint / STATE_FILENAME).read_text())["members"]

    def round_number(self, checkpoint: Path) -> int:
        return json.loads((checkpoint / STATE_FILENAME).read_text())["round"]

    def resume_stream(self, checkpoint: Path, batches: SharedBatches) -> None:
        """Put the stream where it stood.

        Raises:
            ValueError: the data is not what it was.
        """
        state = json.loads((checkpoint / STATE_FILENAME).read_text())["batches"]
        batches.resume(state, load_file(checkpoint / TENSORS_FILENAME))
