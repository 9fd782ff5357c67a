"""A Hugging Face Hub on this machine, for the tests: its HTTP interface, kept in memory, with faults on request.

    with HubServer() as server:
        server.create("someone/saes", files={"README.md": b"hello"})
        server.faults.append(Fault("commit", 503))

Model repositories only, no Xet storage. Test modules get the fixture `hub` by importing `hub_fixture`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hub_client import environment as environment
from hub_client import impatient as impatient
from hub_client import loopback_only as loopback_only
from hub_client import online as online
from hub_endpoints import HubEndpoints
from hub_http import Fault as Fault
from hub_http import Listener
from hub_http import Request as Request
from hub_repositories import Commit as Commit
from hub_repositories import Etags, Repository, sha256


class HubServer(HubEndpoints):
    """The server and all it knows; a context manager, running inside.

    Attributes:
        tokens: token -> user. Reading needs none; writing needs one whose user owns the namespace (or is in
            `organisations`); private repositories look missing to everybody else.
        upload_mode: whether the Hub wants a file as LFS; empty files never are.
        blobs: LFS storage, SHA-256 -> content. `uploads`: the SHA-256 of every LFS upload that came, repeated ones too.
        etags: `opaque` for a mirror, whose ETags and listings say nothing about a file's content.
        page_size: entries of a page of the listing of files.
        waits: the seconds that `online` kept huggingface_hub from sleeping.
        hanging: addresses of the clients that it leaves without an answer.
        errors: tracebacks of the server's own mistakes.
    """

    def __init__(self, *, etags: Etags = "digest") -> None:
        super().__init__(etags=etags)
        self._listener: Listener | None = None

    # Running

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts, or starts again on the same port with everything that was there."""
        if self._listener is None:
            self.stopping.clear()
            self._listener = Listener(self, self.port)
            self.port = self._listener.server_port
            threading.Thread(target=self._listener.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuses new connections and closes those there are, in the middle of a reply if need be."""
        if self._listener is not None:
            self.stopping.set()
            self._listener.close()
            self._listener = None

    # What tests ask and prepare

    def create(self, repo_id: str, files: Mapping[str, bytes] | None = None, private: bool = False) -> Repository:
        self.repositories[repo_id] = Repository(repo_id, private)
        if files:
            self.commit(repo_id, files)
        return self.repositories[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return dict(self._head(self.repositories[repo_id], revision).files)

    def commit(
        self, repo_id: str, files: Mapping[str, bytes], revision: str = "main", message: str = "someone else's"
    ) -> str:
        """Adds or replaces files behind the clients' backs; returns the new commit's oid."""
        with self.lock:
            repository = self.repositories[repo_id]
            head = self._head(repository, revision)
            lfs = {path for path, content in files.items() if self.mode(path, len(content)) == "lfs"}
            self.blobs |= {sha256(files[path]): files[path] for path in lfs}
            kept = head.lfs - set(files)
            oid = repository.add_commit(head.oid, message, {**head.files, **files}, kept | lfs).oid
            repository.move(revision, oid)
            return oid

    def snapshot(self) -> dict[str, Any]:
        """A description of all repositories, to compare with a later one."""
        with self.lock:
            return {name: repository.description() for name, repository in sorted(self.repositories.items())}

    def count(self, endpoint: str) -> int:
        return sum(request.endpoint == endpoint for request in self.requests)


@pytest.fixture(name="hub")
def hub_fixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A running Hub that this process takes for the Hub, as user `someone`; nothing else may be contacted."""
    from huggingface_hub import close_session

    refused = loopback_only(monkeypatch)
    with HubServer() as server:
        online(monkeypatch, server, tmp_path / "hub-home")
        yield server
        close_session()
    assert refused == []
    assert server.errors == []
