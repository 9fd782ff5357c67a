"""Files of one commit of a Hub repository, compared with the sums that the Hub and the repository give for them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download

from e2e_sae_plugin.checkpoint.folder import file_digest
from e2e_sae_plugin.hub import calls
from e2e_sae_plugin.hub.calls import HubError, hub_call, pause_before_next_try, persistent_hub_call
from e2e_sae_plugin.hub.revision import COMMIT, cache_of, relative_path
from e2e_sae_plugin.hub.revision import Resolved as Resolved
from e2e_sae_plugin.hub.revision import resolve as resolve
from e2e_sae_plugin.hub.sae_folder import CHECKSUMS_FILENAME

logger = logging.getLogger(__name__)

TRIES_OF_FILE = 2
"""The client itself tries some of what may pass several times."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUM_LINE = re.compile(r"(?P<sum>[0-9a-fA-F]{64}) [ *](?P<name>.+)")


class DamagedDownloadError(ValueError):
    """A file that is not what the Hub or the repository says it is. It is no longer in the cache."""


def fetch(resolved: Resolved, filename: str, *, token: str | bool | None = None, force: bool = False) -> Path:
    """One file, from the cache or the Hub, compared with the Hub's digest of it where the cache knows that.

    A file that is not what it should be is removed and fetched once more.

    Args:
        force: fetch it though the cache has it.

    Raises:
        HubError: there is no such file, repository or commit; the Hub refuses or cannot be reached; or the disk is full.
        DamagedDownloadError: what comes is wrong a second time, or there is no Hub to fetch it from again.
    """
    path = _download(resolved, filename, token, force)
    problem = _difference_from_digest(path)
    if problem is None:
        return path
    path = _fetch_again(resolved, filename, path, problem, token)
    if problem := _difference_from_digest(path):
        raise _refused(resolved, filename, path, problem)
    return path


def fetch_if_there(
    resolved: Resolved, filename: str, *, token: str | bool | None = None, force: bool = False
) -> Path | None:
    """`fetch` of a file that need not be there. None only where the Hub says that it has none, now or when it was asked
    before of the same commit; a Hub that fails or cannot be reached is an error.

    Raises:
        HubError, DamagedDownloadError: as `fetch`.
    """
    if not force and (cache_of(resolved.repo_id) / ".no_exist" / resolved.commit / relative_path(filename)).is_file():
        return None
    try:
        return fetch(resolved, filename, token=token, force=force)
    except HubError as error:
        if error.missing != "file":
            raise
    return None


def fetch_folder(
    resolved: Resolved,
    folder: str,
    filenames: Sequence[str],
    optional: Sequence[str] = (),
    *,
    token: str | bool | None = None,
    force: bool = False,
) -> dict[str, Path]:
    """Files of one folder, compared also with its `checksums.sha256` (as `sha256sum` writes it) where it has one.

    Args:
        folder: in the repository; `"."` for its root.
        filenames: what must be there.
        optional: what need not. Without a Hub to ask, of these what the cache has.

    Returns:
        What is there, by name.

    Raises:
        HubError, DamagedDownloadError: as `fetch`; the sums of `checksums.sha256` are treated as the Hub's are.
    """

    def place(name: str) -> str:
        return str(PurePosixPath(folder, name))

    found = {name: fetch(resolved, place(name), token=token, force=force) for name in filenames}
    for name in (*optional, CHECKSUMS_FILENAME):
        # Whoever filled the cache may never have asked for them.
        known = not resolved.is_offline or resolved.cached(place(name))
        path = fetch_if_there(resolved, place(name), token=token, force=force) if known else None
        if path is not None:
            found[name] = path
    listed = found.pop(CHECKSUMS_FILENAME, None)
    if listed is None:
        return found
    try:
        sums = read_checksums(listed)
        is_suspect = bool(_differing(found, sums))
    except DamagedDownloadError:
        if resolved.is_offline:
            raise
        sums, is_suspect = {}, True
    if is_suspect and not resolved.is_offline:
        listed = fetch(resolved, place(CHECKSUMS_FILENAME), token=token, force=True)
        sums = read_checksums(listed)
    for name, problem in _differing(found, sums).items():
        found[name] = _fetch_again(resolved, place(name), found[name], problem, token)
    for name, problem in _differing(found, sums).items():
        discard(listed)
        raise _refused(resolved, place(name), found[name], problem)
    return found


def list_files(resolved: Resolved, *, token: str | bool | None = None) -> list[str]:
    """Every file of the repository at the commit; without a Hub to ask, those that the cache has.

    Raises:
        HubError: as `fetch`.
    """
    if resolved.is_offline:
        paths = (path for path in resolved.snapshot.rglob("*") if path.is_file())
        return sorted(path.relative_to(resolved.snapshot).as_posix() for path in paths)
    info = persistent_hub_call(
        f"list the files of {resolved}",
        HfApi().model_info,  # the client's own listing of files waits for ever
        resolved.repo_id,
        revision=resolved.commit,
        timeout=calls.SILENCE_SECONDS,
        token=token,
    )
    return [file.rfilename for file in info.siblings or []]


def check_cached(resolved: Resolved, prefix: str) -> None:
    """Compare files that the cache has already, those at or below `prefix`, with the Hub's digests.

    Raises:
        DamagedDownloadError: names the first that differs; all that differ are removed from the cache.
    """
    top = resolved.snapshot / relative_path(prefix)
    problems: list[DamagedDownloadError] = []
    for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
        if path.is_file() and (problem := _difference_from_digest(path)):
            problems.append(_refused(resolved, path.relative_to(resolved.snapshot).as_posix(), path, problem))
    if problems:
        raise problems[0]


def read_checksums(path: Path) -> dict[str, str]:
    """File name -> SHA-256 sum in hexadecimal, of lines as `sha256sum` writes them.

    Raises:
        DamagedDownloadError: a line of another form. The file is removed from the cache.
    """
    sums: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        if not line.strip():
            continue
        entry = _SUM_LINE.fullmatch(line)
        if entry is None:
            discard(path)
            raise DamagedDownloadError(
                f"{path.name} has the line {line[:100]!r}; expected '<SHA-256 in hexadecimal>  <file>'. It was removed from "
                "the cache. Load it again; if it stays so, tell the repository's owner."
            )
        sums[entry["name"].removeprefix("./")] = entry["sum"].lower()
    return sums


def discard(path: Path) -> None:
    """Remove a file from the cache: the links to its content, and the content.

    Raises:
        OSError: the cache cannot be written to.
    """
    cache = Path(constants.HF_HUB_CACHE).resolve()
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink(missing_ok=True)
        path = target
    if cache in path.resolve().parents:
        path.unlink(missing_ok=True)


def _download(resolved: Resolved, filename: str, token: str | bool | None, force: bool) -> Path:
    doing = f"fetch {filename} of {resolved}"
    n_tries = 0
    while not resolved.is_offline:
        n_tries += 1
        try:
            path = hub_call(
                doing, hf_hub_download, resolved.repo_id, filename,
                revision=resolved.commit, token=token, force_download=force,
            )  # fmt: skip
            return Path(path)
        except HubError as error:
            if n_tries >= TRIES_OF_FILE or not pause_before_next_try(error, n_tries):
                raise
    path = resolved.cached(filename)
    why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the Hub could not be reached"
    if force:
        raise HubError(f"Could not {doing} anew: {why}. Leave out force_download to take what the cache has.")
    if path is None:
        raise HubError(
            f"Could not {doing}: {why}, and the cache ({constants.HF_HUB_CACHE}) does not have it. Load it once with a "
            "connection."
        )
    return path


def _fetch_again(resolved: Resolved, filename: str, path: Path, problem: str, token: str | bool | None) -> Path:
    error = _refused(resolved, filename, path, problem)
    if resolved.is_offline:
        raise error
    logger.warning("%s of %s: %s. It is fetched once more.", filename, resolved, problem)
    return _download(resolved, filename, token, force=True)


def _refused(resolved: Resolved, filename: str, path: Path, problem: str) -> DamagedDownloadError:
    try:
        discard(path)
        removed = "It was removed from the cache."
    except OSError as error:
        removed = (
            f"It could not be removed from the cache ({error.strerror}): delete {str(path)!r} and what it links to."
        )
    advice = (
        "Load it again when the Hub can be reached."
        if resolved.is_offline
        else "Load it again later or through another network; if it stays so, tell the repository's owner."
    )
    return DamagedDownloadError(
        f"{filename} of {resolved.repo_id} at commit {resolved.commit} is damaged: {problem}. {removed} {advice}"
    )


def _difference_from_digest(path: Path) -> str | None:
    """How a cached file differs from the Hub's digest of it, which names the blob that it is a link to.

    Nothing is known where the cache holds copies instead of links, or where a mirror's ETags are something else.
    """
    digest = Path(os.readlink(path)).name if path.is_symlink() else ""
    if _SHA256.fullmatch(digest):
        return _difference(path, digest, "the Hub says")
    if COMMIT.fullmatch(digest):
        header = b"blob %d\0" % path.stat().st_size
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()
        return None if found == digest else f"its git SHA-1 sum is {found}, but the Hub says {digest}"
    return None


def _differing(found: Mapping[str, Path], sums: Mapping[str, str]) -> dict[str, str]:
    """The files whose sums are not those listed, with how they differ."""
    differences = {
        name: _difference(path, sums[name], f"{CHECKSUMS_FILENAME} says")
        for name, path in found.items()
        if name in sums
    }
    return {name: problem for name, problem in differences.items() if problem}


def _difference(path: Path, sha256: str, who_says: str) -> str | None:
    found = file_digest(path)
    return None if found == sha256 else f"its SHA-256 sum is {found}, but {who_says} {sha256}"
