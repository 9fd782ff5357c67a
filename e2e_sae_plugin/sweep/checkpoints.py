"""Checkpoints of a whole sweep: every SAE's at one step, and where the shared stream stands."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from e2e_sae_plugin.checkpoint.folder import DamagedCheckpointError, discard, verify_checkpoint
from e2e_sae_plugin.checkpoint.run_folder import RunFolder
from e2e_sae_plugin.sweep.member import MemberRunner
from e2e_sae_plugin.sweep.stream import SharedBatches

logger = logging.getLogger(__name__)

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
        # `write` removes what no checkpoint of a sweep names; counting would take what an older one still does.
        return RunFolder(self.path / name, sys.maxsize)

    def write(self, batches: SharedBatches, training: Mapping[str, MemberRunner], round_number: int) -> Path:
        """Checkpoints of the SAEs that are training, then the sweep's.

        Raises:
            OSError, SafetensorError: they cannot be written; the one before stays whole.
        """
        members: dict[str, dict[str, Any]] = {}
        for name, member in training.items():
            assert member.trainer is not None
            if member.trainer.n_training_steps == 0:  # its estimates are made anew, from the stream's beginning
                continue
            folder = str(member.trainer.n_training_samples)
            member.trainer.save_checkpoint(folder, kind="rolling")
            members[name] = {"checkpoint": folder, "place": member.place}
        state, tensors = batches.state()

        def fill(folder: Path) -> None:
            text = json.dumps({"members": members, "batches": state, "round": round_number}, indent=1)
            (folder / STATE_FILENAME).write_text(text + "\n")
            save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS_FILENAME)

        written = self.own.write(str(round_number), "rolling", {"n_training_steps": round_number}, fill)
        named = {(name, entry["checkpoint"]) for _, found in self._of_all_parts() for name, entry in found.items()}
        for name in training:
            for path, _ in self.of(name).checkpoints():
                if (name, path.name) not in named:
                    discard(path)
        return written

    def _of_all_parts(self) -> Iterator[tuple[Path, dict[str, dict[str, Any]]]]:
        """The checkpoints of every part of the sweep, and the SAEs in them."""
        for folder in sorted(self.path.glob(f"{SWEEP_FOLDER}*")):
            for path, _ in RunFolder(folder, KEPT).checkpoints():
                try:
                    yield path, self.members(path)
                except (OSError, ValueError):  # another process has just removed it, it is damaged, or it is an SAE's
                    continue

    def newest(self, names: Collection[str]) -> Path | None:
        """The newest whole checkpoint in which those of these SAEs that it holds are whole too.

        Raises:
            DamagedCheckpointError: there are damaged ones alone.
        """
        self.own.clean()
        damaged: list[str] = []
        for path, _ in self.own.checkpoints():
            try:
                verify_checkpoint(path)
                for name, entry in self.members(path).items():
                    if name in names:
                        verify_checkpoint(self.path / name / entry["checkpoint"])
            except DamagedCheckpointError as error:
                damaged.append(f"{path}: {error}")
                continue
            for error in damaged:
                logger.warning("Passed over: %s", error)
            return path
        if damaged:
            raise DamagedCheckpointError(
                "The sweep finds damaged checkpoints alone, and does not start anew over them:\n  "
                + "\n  ".join(damaged)
                + "\nMove them away to start anew."
            )
        return None

    def of_another_part(self, names: Collection[str]) -> Path | None:
        """A checkpoint that another part of the sweep has written of one of these SAEs."""
        for path, found in self._of_all_parts():
            if path.parent != self.own.path and not found.keys().isdisjoint(names):
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
