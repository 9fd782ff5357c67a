"""All the checkpoints of one run: writing one, keeping the newest few, finding them again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2e_sae_plugin.checkpoint.folder import (
    CheckpointKind,
    DamagedCheckpointError,
    atomic_folder,
    discard,
    read_manifest,
    recover,
    write_manifest,
)

logger = logging.getLogger(__name__)


class RunFolder:
    """The folder that holds a run's checkpoints, each in a folder of its own.

    Args:
        path: created when the first checkpoint is written.
        keep: how many `rolling` checkpoints stay; `milestone` and `final` ones are never removed.
    """

    def __init__(self, path: Path, keep: int):
        self.path, self.keep = path, keep

    def write(self, name: str, kind: CheckpointKind, details: dict[str, Any], fill: Callable[[Path], None]) -> Path:
        """Have `fill` write its files into a new checkpoint, then remove the oldest rolling ones.

        Raises:
            OSError: it could not be written; what was there before is still there.
        """
        target = self.path / name
        with atomic_folder(target) as folder:
            fill(folder)
            write_manifest(folder, kind, details)
        rolling = [path for path, manifest in self.checkpoints() if manifest["kind"] == "rolling"]
        for path in rolling[self.keep :]:
            discard(path)
        return target

    def clean(self) -> None:
        """Clear away what killed processes of this run, under whatever start's name, have left half done."""
        for folder in visible_folders(self.path.parent):
            recover(folder)

    def checkpoints(self) -> list[tuple[Path, dict[str, Any]]]:
        """Every checkpoint with a readable manifest, and that manifest; the newest first."""
        found: list[tuple[Path, dict[str, Any]]] = []
        for path in visible_folders(self.path):
            try:
                found.append((path, read_manifest(path)))
            except DamagedCheckpointError as error:
                logger.debug("%s", error)
        return sorted(found, key=lambda entry: _age(entry[1]), reverse=True)


def _age(manifest: dict[str, Any]) -> tuple[str, int]:
    return manifest["saved_at"], manifest["n_training_steps"]


def visible_folders(parent: Path) -> list[Path]:
    """The folders in `parent`, without those that are being written; none where `parent` is not a folder."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
