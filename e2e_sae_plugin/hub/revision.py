"""Which commit of a Hub repository is meant, and where the cache has its files."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants

from e2e_sae_plugin.hub.calls import HubError, hub_call, pause_before_next_try
from e2e_sae_plugin.hub_names import check_repo_id

logger = logging.getLogger(__name__)

MAIN = "main"
ANSWER_SECONDS = 10.0
"""How long the Hub may take to say which commit a revision is."""
TRIES_BESIDE_CACHE = 2
"""How often it is asked that where the cache has the revision too."""
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Resolved:
    """A repository at one commit."""

    repo_id: str
    revision: str
    """The branch, tag, `refs/pr/N` or commit that was asked for."""
    commit: str
    """40 hexadecimal digits."""
    is_offline: bool = False
    """Only the cache is looked at: the Hub could not be reached, or HF_HUB_OFFLINE is set."""

    def __str__(self) -> str:
        return f"{self.repo_id} at commit {self.commit[:12]}"

    @property
    def snapshot(self) -> Path:
        """Where the cache has the commit's files; it need not exist."""
        return cache_of(self.repo_id) / "snapshots" / self.commit

    def cached(self, filename: str) -> Path | None:
        """A file that the cache has."""
        path = self.snapshot / relative_path(filename)
        return path if path.is_file() else None


def resolve(
    repo_id: str, revision: str | None = None, *, token: str | bool | None = None, doing: str | None = None
) -> Resolved:
    """Which commit a revision is, so that all files of one load are of one state of the repository.

    Where the Hub cannot be reached, or HF_HUB_OFFLINE is set, the commit that the cache has for the revision is taken, and
    a warning (a line of information, where it was set) says so. A Hub that refuses is believed. A whole commit hash is what
    it is, and nobody is asked.

    Args:
        repo_id: `owner/name`.
        revision: a branch, a tag, `refs/pr/N` or a commit; default `"main"`.
        token: as in `huggingface_hub`; default: the one logged in with.
        doing: what for, for the error: "load the SAE x of owner/name".

    Raises:
        HubError: the Hub refuses or has no such repository or revision; or it cannot be reached, and the cache does not have
            the revision.
        ValueError: a name that the Hub does not allow.
    """
    revision = MAIN if revision is None else revision
    doing = doing or f"find {revision!r} of {repo_id}"
    check_repo_id(repo_id)
    if not revision or revision.startswith("/") or ".." in revision:
        raise ValueError(f"{revision!r} is no revision. Expected a branch, a tag, refs/pr/N or a commit.")
    told_to_be_offline = constants.is_offline_mode()
    is_commit = COMMIT.fullmatch(revision) is not None
    if is_commit and not told_to_be_offline:
        return Resolved(repo_id, revision, revision)
    cached = revision if is_commit else _cached_commit(repo_id, revision)
    here = f"The cache ({constants.HF_HUB_CACHE})"
    if told_to_be_offline:
        if cached is None or not Resolved(repo_id, revision, cached).snapshot.is_dir():
            raise HubError(
                f"Could not {doing}: HF_HUB_OFFLINE is set, so the Hub is not asked, and the cache "
                f"({constants.HF_HUB_CACHE}) does not have {revision!r} of {repo_id}. Unset it, or load it once with a "
                "connection."
            )
        logger.info("HF_HUB_OFFLINE is set: %s of %s is taken from the cache, at commit %s.", revision, repo_id, cached)
        return Resolved(repo_id, revision, cached, is_offline=True)
    try:
        return Resolved(repo_id, revision, _ask_for_commit(repo_id, revision, token, doing, cached is not None))
    except HubError as error:
        if not error.may_pass:
            raise
        problem = error
    if cached is None:
        raise HubError(
            f"{problem} {here} does not have {revision!r} of {repo_id} either.",
            status=problem.status, may_pass=True, pause=problem.pause,
        )  # fmt: skip
    logger.warning(
        "%s %s has %r of %s as it was at commit %s: that is taken. There may be a newer one.",
        problem, here, revision, repo_id, cached,
    )  # fmt: skip
    return Resolved(repo_id, revision, cached, is_offline=True)


def remember(resolved: Resolved) -> None:
    """Note in the cache, as the Hub's client does, which commit the revision is. After the files, so that without a Hub a
    commit is not taken of which there is nothing."""
    path = cache_of(resolved.repo_id) / "refs" / resolved.revision
    if resolved.is_offline or resolved.revision == resolved.commit:
        return
    try:
        if not path.is_file() or path.read_text() != resolved.commit:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(resolved.commit)
    except OSError as error:
        logger.debug("The cache cannot be written to: %s", error)


def _ask_for_commit(repo_id: str, revision: str, token: str | bool | None, doing: str, is_cached: bool) -> str:
    n_tries = 1
    while True:
        try:
            info = hub_call(doing, HfApi().model_info, repo_id, revision=revision, timeout=ANSWER_SECONDS, token=token)
            break
        except HubError as error:
            # With a copy at hand nobody should wait for minutes.
            enough = is_cached and (n_tries >= TRIES_BESIDE_CACHE or (error.pause or 0) > ANSWER_SECONDS)
            if enough or not pause_before_next_try(error, n_tries):
                raise
            n_tries += 1
    if not info.sha or not COMMIT.fullmatch(info.sha):
        raise HubError(f"Could not {doing}: the Hub does not say which commit {revision!r} of {repo_id} is.")
    return info.sha


def cache_of(repo_id: str) -> Path:
    return Path(constants.HF_HUB_CACHE, "models--" + repo_id.replace("/", "--"))


def _cached_commit(repo_id: str, revision: str) -> str | None:
    """The commit that the cache has for a branch, tag or pull request, with at least some of its files."""
    try:
        commit = (cache_of(repo_id) / "refs" / revision).read_text().strip()
    except OSError:
        return None
    known = COMMIT.fullmatch(commit) and Resolved(repo_id, revision, commit).snapshot.is_dir()
    return commit if known else None


def relative_path(filename: str) -> PurePosixPath:
    """Raises ValueError for what would lead out of the repository."""
    path = PurePosixPath(filename)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{filename!r} is no file or folder in a repository.")
    return path
