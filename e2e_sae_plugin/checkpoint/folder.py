"""One checkpoint on disk: written aside, synced, renamed; a manifest of sizes and SHA-256 sums says whether it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

MANIFEST_FILENAME = "manifest.json"
E2E_CFG_FILENAME = "e2e_runner_cfg.json"
FORMAT = 1
PARTIAL_SUFFIX, REPLACED_SUFFIX = ".partial", ".replaced"

_PROCESS = uuid.uuid4().hex[:8]

CheckpointKind = Literal["milestone", "rolling", "final"]
"""`milestone`: one of `n_checkpoints`, kept; `rolling`: by the clock or at a stop, the newest few are kept; `final`: the
finished SAE, which no run can go on from."""


class DamagedCheckpointError(ValueError):
    """A checkpoint that is not whole; the message lists what is wrong with it, file by file."""


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes `target`'s place once it is whole and on disk.

    A reader sees the old `target` or the new one, never a part; an error leaves the old one. Only between two renames,
    when a folder of that name is replaced, is neither there, and `recover` puts the old one back.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    mark = _owner_mark()
    temporary = parent / f".{target.name}.{mark}{PARTIAL_SUFFIX}"
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        replaced = parent / f".{target.name}.{mark}{REPLACED_SUFFIX}"
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        sync(parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def whole_files(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write files into, which are moved into `folder` once all of them are whole and on disk.

    Args:
        folder: gets the files; what else it holds stays.
        last: the file that is moved last, and whose old version goes first: who sees it sees all the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".files.{_owner_mark()}{PARTIAL_SUFFIX}"
    temporary.mkdir()
    try:
        yield temporary
        written = sorted(temporary.iterdir(), key=lambda path: path.name == last)
        for path in written:
            sync(path)
        (folder / last).unlink(missing_ok=True)
        for path in written:
            path.replace(folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new content."""
    with whole_files(path.parent, last=path.name) as folder:
        (folder / path.name).write_text(text)


def recover(parent: Path) -> None:
    """Clear away what killed processes left in `parent`: half-written folders; a replaced one whose place is empty comes
    back. What a living process, or one on another machine, is writing stays."""
    for path in sorted(parent.glob(f".*{REPLACED_SUFFIX}")):
        place = parent / path.name[1:].removesuffix(REPLACED_SUFFIX).rpartition(".")[0]
        if _is_abandoned(path) and not place.exists():
            path.rename(place)
    for path in [*parent.glob(f".*{REPLACED_SUFFIX}"), *parent.glob(f".*{PARTIAL_SUFFIX}")]:
        if _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _owner_mark() -> str:
    """Who is writing, in the name of a temporary folder."""
    return f"{_host()}+{os.getpid()}+{_PROCESS}+{uuid.uuid4().hex[:8]}"


def _host() -> str:
    return "".join(character if character.isalnum() else "-" for character in socket.gethostname())


def _is_abandoned(temporary: Path) -> bool:
    host, pid, process, _ = [*temporary.stem.rpartition(".")[2].split("+"), "", "", "", ""][:4]
    if host != _host() or not pid.isdigit():
        return False
    if int(pid) == os.getpid():  # ours, or of a container that had the same number before it was restarted
        return process != _PROCESS
    try:
        os.kill(int(pid), 0)  # no signal: only whether there is such a process
    except ProcessLookupError:
        return True
    except OSError:
        pass  # somebody else's, and alive
    return False


def discard(folder: Path) -> None:
    """Remove a folder; a reader sees it whole or not at all."""
    hidden = folder.parent / f".{folder.name}.{_owner_mark()}{PARTIAL_SUFFIX}"
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, kind: CheckpointKind, details: dict[str, Any]) -> None:
    """Write the manifest of the files that are in `folder` now; nothing may be added after it."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(folder.iterdir())
    }
    saved_at = datetime.now(UTC).isoformat()
    manifest = {"format": FORMAT, "kind": kind, "saved_at": saved_at, **details, "files": files}
    manifest["sha256"] = _content_digest(manifest)
    (folder / MANIFEST_FILENAME).write_text(json.dumps(manifest, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, without looking at the files that it lists.

    Raises:
        DamagedCheckpointError: there is none, or it is not what was written.
    """
    path = folder / MANIFEST_FILENAME
    if not folder.is_dir():
        raise DamagedCheckpointError(f"There is no checkpoint folder {str(folder)!r}.")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DamagedCheckpointError(f"The checkpoint folder {str(folder)!r} cannot be read: permission denied.")
    if not path.is_file():
        pickled = (
            " It looks like one of SAELens's own, which hold pickles and the data's place only roughly: start a new "
        )
        pickled += "run from its weights, with from_pretrained_path."
        raise DamagedCheckpointError(
            f"{str(folder)!r} is no checkpoint of this package: it has no {MANIFEST_FILENAME}."
            + (pickled if (folder / "trainer_state.pt").exists() else "")
        )
    try:
        manifest = json.loads(path.read_text())
        digest = manifest.pop("sha256")
        intact = digest == _content_digest(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{str(path)!r} is damaged: {error!r}.") from None
    if not intact:
        raise DamagedCheckpointError(f"{str(path)!r} is damaged: it is not what was written (its own sum differs).")
    if manifest["format"] != FORMAT:
        raise DamagedCheckpointError(
            f"{str(folder)!r} has checkpoint format {manifest['format']!r}, but this version of the package reads format "
            f"{FORMAT}. Resume it with the version that wrote it ({manifest.get('e2e_sae_plugin_version')})."
        )
    return manifest


def verify_checkpoint(folder: Path, only: str | None = None) -> dict[str, Any]:
    """Compare every file, or one of them, with the manifest and return the manifest.

    Raises:
        DamagedCheckpointError: lists each file that is missing, has another size or another SHA-256 sum.
    """
    manifest = read_manifest(folder)
    files = manifest["files"].items()
    problems = [
        problem for name, entry in files if only in (None, name) and (problem := _problem(folder / name, entry))
    ]
    if problems:
        raise DamagedCheckpointError(f"The checkpoint {str(folder)!r} is damaged: {'; '.join(problems)}.")
    return manifest


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if not os.access(path, os.R_OK):
        return f"{path.name} cannot be read: permission denied"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{path.name} has {size:,} bytes instead of {entry['bytes']:,}"
    if file_digest(path) != entry["sha256"]:
        return f"{path.name} has the right size but other bytes (its SHA-256 sum differs)"
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
