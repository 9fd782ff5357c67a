"""The branch that is pushed to: as it stands at one commit, made where it is missing, taken back if the push fails."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import ModelInfo

from e2e_sae_plugin.hub import calls
from e2e_sae_plugin.hub.calls import HubError, hub_call, persistent_hub_call
from e2e_sae_plugin.hub.revision import MAIN

logger = logging.getLogger(__name__)

INITIAL_FILES = frozenset({".gitattributes"})
"""What the Hub puts into a new repository."""


@dataclass(frozen=True)
class LocalFile:
    """A file that goes up."""

    path: str
    """In the repository."""
    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of_bytes(cls, path: str, content: bytes) -> LocalFile:
        """A file that is in memory."""
        return cls(path, content, len(content), hashlib.sha256(content).hexdigest())

    def git_sha1(self) -> str:
        """What git calls a file of this content."""
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as its tree lists it."""

    size: int | None
    sha256: str | None
    """Of large files."""
    git_sha1: str | None
    """Of small ones; of large ones it is of something else."""

    def equals(self, local: LocalFile) -> bool:
        """Whether the content is the same."""
        if self.size != local.size:
            return False
        return self.sha256 == local.sha256 if self.sha256 is not None else self.git_sha1 == local.git_sha1()


class Target:
    """Where a push goes.

    Args:
        repo_id: `owner/name`.
        revision: a branch, or the `refs/pr/N` of a pull request.
        token: of the user; None for the one that is logged in.
    """

    def __init__(self, repo_id: str, revision: str, token: str | None):
        self.repo_id, self.revision, self.token = repo_id, revision, token
        self.api = HfApi()
        self.head = ""
        """The newest commit of `revision` that is known."""
        self.files: dict[str, RemoteFile] = {}
        """What it holds, by path."""
        self._made_repository = False
        self._branch_made_at: str | None = None

    @property
    def url(self) -> str:
        """Where its files are shown."""
        page = f"{self.api.endpoint}/{self.repo_id}"
        return page if self.revision == MAIN else f"{page}/tree/{self.revision}"

    def look(self) -> bool:
        """Ask for the newest commit; False if there is no such repository or revision.

        Raises:
            HubError: the Hub does not say.
        """
        info = self._info(self.revision)
        if info is not None:
            self._see(info)
        return info is not None

    def _see(self, info: ModelInfo) -> None:
        self.head = str(info.sha)
        self.files = {
            file.rfilename: RemoteFile(file.size, None if file.lfs is None else file.lfs.sha256, file.blob_id)
            for file in info.siblings or []
        }

    def look_or_make(self, private: bool | None) -> None:
        """`look`, with the repository and the branch made where they are missing.

        Raises:
            HubError: they cannot be.
            ValueError: it should be private and is public.
        """
        main = self._info(MAIN) or self._make_repository(private)
        if private and main.private is False:
            raise ValueError(
                f"private=True, but {self.repo_id} is public. Make it private in its settings, or leave private out to "
                "share with everybody. Nothing was sent."
            )
        if self.revision == MAIN:
            self._see(main)
        elif not self.look():
            self._make_branch(str(main.sha))

    def _info(self, revision: str) -> ModelInfo | None:
        doing = f"look at {self.repo_id}" + ("" if revision == MAIN else f" at {revision!r}")
        try:
            # This function of the client's would otherwise switch the connection's own limit off.
            limit = calls.SILENCE_SECONDS
            return persistent_hub_call(
                doing,
                self.api.model_info,
                self.repo_id,
                revision=revision,
                files_metadata=True,
                timeout=limit,
                token=self.token,
            )
        except HubError as error:
            if error.missing in ("repository", "revision"):
                return None
            raise

    def _make_repository(self, private: bool | None) -> ModelInfo:
        doing = f"create the repository {self.repo_id}"
        self._made_repository = True  # unless it is refused: of what fails, only the answer may be missing
        try:
            persistent_hub_call(
                doing, self.api.create_repo, self.repo_id, private=private, exist_ok=True, token=self.token
            )
            info = self._info(MAIN)
        except HubError as error:
            self._made_repository = error.may_pass
            info = self._info(MAIN) if error.may_pass else None
            if info is None:
                raise
        if info is None:
            raise HubError(f"Could not find {self.repo_id} just after it was created. Repeat the push.", may_pass=True)
        logger.info("Created %s.", self.repo_id)
        return info

    def _make_branch(self, start: str) -> None:
        if self.revision.startswith("refs/"):
            raise HubError(
                f"{self.repo_id} has no {self.revision!r}, which is no name for a branch.", missing="revision"
            )
        doing = f"create the branch {self.revision!r} of {self.repo_id}"
        self._branch_made_at = start
        try:
            persistent_hub_call(
                doing, self.api.create_branch, self.repo_id, branch=self.revision, exist_ok=True, token=self.token
            )
        except HubError as error:
            if not error.may_pass or not self.look():
                raise
        if not self.look():
            raise HubError(f"Could not find the branch {self.revision!r} just after it was created.", may_pass=True)

    def holds(self, files: Iterable[LocalFile]) -> bool:
        """Whether `head` has all these files, with this content."""
        return all(file.path in self.files and self.files[file.path].equals(file) for file in files)

    def take_back(self) -> None:
        """Remove the repository or the branch that was made, unless something was committed to it. Never fails."""
        try:
            if self._made_repository:
                self._made_repository, self._branch_made_at = False, None
                what = f"the repository {self.repo_id}"
                info = self._info(MAIN)
                if info is None or not {file.rfilename for file in info.siblings or []} <= INITIAL_FILES:
                    return
                hub_call(f"remove {what}", self.api.delete_repo, self.repo_id, token=self.token)
            elif self._branch_made_at is not None:
                start, self._branch_made_at = self._branch_made_at, None
                what = f"the branch {self.revision!r} of {self.repo_id}"
                if not self.look() or self.head != start:
                    return
                hub_call(f"remove {what}", self.api.delete_branch, self.repo_id, branch=self.revision, token=self.token)
            else:
                return
            logger.warning("Nothing was committed, so %s, made for this push, was removed again.", what)
        except HubError as error:
            logger.warning(
                "What was made for this push, without its SAEs, may stay behind in %s: %s", self.repo_id, error
            )
