"""What a push leaves behind when the Hub fails, call by call: all of it, or nothing, and the repeat succeeds."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hub_saes import HOOK, REPO, an_sae, texts_of
from hub_server import Fault, HubServer, environment, impatient, online
from hub_server import hub_fixture as hub_fixture
from marks import slow_except
from sae_lens import SAE

from e2e_sae_plugin.hub import calls
from e2e_sae_plugin.hub.calls import HubError
from e2e_sae_plugin.hub.upload import Push, push_to_hub

TOKEN = "hf_good"
UPLOADING = ("validate_yaml", "preupload", "lfs_batch", "lfs_put", "lfs_verify", "commit")
TO_NEW = ("repo_info", "create_repo", *UPLOADING)
TO_EXISTING = ("repo_info", "head_file", "get_file", *UPLOADING)
REFUSALS = (401, 403, 404, 409)
PASSING = (429, 500, 503, "drop", "hang")
DONE_BUT = ("drop_after", "fail_after")


@pytest.fixture(autouse=True)
def _no_waits(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch, hub)
    monkeypatch.setattr(calls, "PAUSES_SECONDS", (0.0, 0.0, 0.0))


def existing(hub: HubServer) -> None:
    """A repository with a person's README and another SAE."""
    push_to_hub({"older": an_sae(seed=7)}, REPO)
    card = hub.files(REPO)["README.md"]
    mark = b"<!-- e2e-sae-plugin: begin"
    hub.commit(REPO, {"README.md": card.replace(mark, b"Hands off.\n\n" + mark, 1)})


def push(revision: str | None = None) -> Push:
    return push_to_hub({"a": an_sae(), "b": an_sae("standard", 1)}, REPO, revision=revision, token=TOKEN)


def complete(hub: HubServer, revision: str = "main") -> bool:
    files = hub.files(REPO, revision)
    card = files.get("README.md", b"").decode()
    return all(f"{name}/sae_weights.safetensors" in files and f"| {name} |" in card for name in "ab")


def expected_to_succeed(endpoint: str, what: Any, times: int | None) -> bool:
    """What happens once and may pass is no reason to fail; what is refused, or never passes, is."""
    if what in REFUSALS:
        return False
    # Done each time, whatever the answer says; and what has been uploaded is not verified a second time.
    return times == 1 or what in DONE_BUT or endpoint == "lfs_verify"


WHAT = (*REFUSALS, *PASSING)
CASES = [
    *itertools.product(["new"], TO_NEW, WHAT, [1, None]),
    *itertools.product(["existing"], TO_EXISTING, WHAT, [1, None]),
    *itertools.product(["branch"], ["create_branch"], WHAT, [1, None]),
    *itertools.product(["new"], ["create_repo", "lfs_put", "commit"], DONE_BUT, [1, None]),
    *itertools.product(["existing"], ["lfs_put", "commit"], DONE_BUT, [1, None]),
    *itertools.product(["branch"], ["create_branch", "commit"], DONE_BUT, [1, None]),
]
CASES = [case for case in CASES if case[1:3] != ("repo_info", 404)]  # that is how a new repository begins
# All of them are tried by `make faults`; these by every run of the tests.
ALWAYS = [
    case for case in CASES if case[2:] in ((401, 1), (503, 1), (500, None), ("drop_after", 1), ("fail_after", None))
]


@pytest.mark.parametrize(
    ("start", "endpoint", "what", "times"),
    [
        pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.exhaustive, id="-".join(map(str, case)))
        for case in CASES
    ],
)
def test_all_or_nothing(
    hub: HubServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
    start: str, endpoint: str, what: Any, times: int | None,
):  # fmt: skip
    caplog.set_level(logging.INFO)  # below it, the client logs whatever a server says
    revision = "dev" if start == "branch" else None
    if start != "new":
        existing(hub)
    before, n_requests = hub.snapshot(), len(hub.requests)
    hub.faults.append(Fault(endpoint, what, times=times, message="no {token} for you"))
    error: Exception | None = None
    try:
        push(revision)
    except HubError as raised:
        error = raised
    assert any(request.endpoint == endpoint for request in hub.requests[n_requests:]), "the fault was not tried"
    if error is not None:
        assert hub.snapshot() == before
        assert "Could not" in str(error)
    else:
        assert complete(hub, revision or "main")
    assert (error is None) == expected_to_succeed(endpoint, what, times), error
    hub.faults.clear()
    n_commits = len(hub.repositories[REPO].commits) if REPO in hub.repositories else 1
    uploaded = list(hub.uploads)
    again = push(revision)
    assert complete(hub, revision or "main")
    assert again.is_new_commit == (error is not None)
    assert len(hub.repositories[REPO].commits) == n_commits + again.is_new_commit
    assert not set(hub.uploads[len(uploaded) :]) & {each for each in uploaded if each in hub.blobs and error is None}
    if start != "new":
        assert b"Hands off." in hub.files(REPO, revision or "main")["README.md"]
        assert "older/cfg.json" in hub.files(REPO, revision or "main")
    for name in ("a", "b") if revision is None else ():
        SAE.from_pretrained(REPO, name)
    leaks = [text for text in (*texts_of(error), caplog.text, *capfd.readouterr()) if TOKEN in text]
    assert leaks == []


@pytest.mark.parametrize("what", slow_except([401, 404, 500, "drop"], 401, 404))
def test_xet_storage_that_fails(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: Any):
    online(monkeypatch, hub, tmp_path / "xet", xet=True)
    hub.faults.append(Fault("xet_token", what, times=None, message="no {token} for you"))
    with pytest.raises(HubError) as caught:
        push()
    assert hub.count("xet_token") > 0
    assert hub.repositories == {}
    assert not any(TOKEN in text for text in texts_of(caught.value))
    hub.upload_mode = lambda _path, _size: "regular"
    hub.faults.clear()
    push()
    assert complete(hub)


def test_someone_else_commits_in_between(hub: HubServer):
    existing(hub)
    hub.faults.append(Fault("commit", 412))
    push()
    assert complete(hub)


def test_always_someone_else(hub: HubServer):
    existing(hub)
    before = hub.snapshot()
    hub.faults.append(Fault("commit", 412, times=None))
    with pytest.raises(HubError, match="Others have committed"):
        push()
    assert hub.snapshot() == before


def test_two_pushes_at_once(hub: HubServer):
    existing(hub)
    errors: list[BaseException] = []

    def one(name: str) -> None:
        try:
            push_to_hub({name: an_sae(seed=ord(name))}, REPO)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    card = hub.files(REPO)["README.md"].decode()
    assert all(f"{name}/cfg.json" in hub.files(REPO) and f"| {name} |" in card for name in "xyz")


def test_interrupted_by_the_keyboard(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls, "SILENCE_SECONDS", None)  # or it would be over at once, see `impatient`
    hub.faults.append(Fault("commit", "hang"))

    def interrupt() -> None:
        while hub.count("commit") == 0:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        push()
    assert hub.repositories == {}
    push()
    assert complete(hub)


def test_the_server_is_gone(hub: HubServer):
    hub.stop()
    with pytest.raises(HubError, match="no answer from"):
        push()
    hub.start()
    push()
    assert complete(hub)


def test_nobody_is_logged_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    online(monkeypatch, hub, tmp_path / "nobody", token=None)
    with pytest.raises(HubError, match="hf auth login"):
        push_to_hub(an_sae(), REPO)
    assert hub.requests == []


def test_a_token_that_is_not_valid(hub: HubServer):
    with pytest.raises(HubError, match="does not accept the token"):
        push_to_hub(an_sae(), REPO, token="hf_revoked")
    assert hub.repositories == {}


def test_somebody_elses_repository(hub: HubServer):
    hub.create("other/saes")
    before = hub.snapshot()
    with pytest.raises(HubError, match="may not do that"):
        push_to_hub(an_sae(), "other/saes")
    assert hub.snapshot() == before


@pytest.mark.slow
def test_killed_while_it_commits(hub: HubServer, tmp_path: Path):
    an_sae().save_inference_model(tmp_path / "sae")
    hub.faults.append(Fault("commit", "hang"))
    command = [sys.executable, "-W", "ignore", "-m", "e2e_sae_plugin", "push", REPO, str(tmp_path / "sae")]
    process = subprocess.Popen(command, env=environment(hub, tmp_path / "home"), cwd=tmp_path)
    while hub.count("commit") == 0:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert set(hub.files(REPO)) == {".gitattributes"}
    n_uploads = len(hub.uploads)
    variables = environment(hub, tmp_path / "home")
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(hub.uploads) == n_uploads > 0
    SAE.from_pretrained(REPO, HOOK)
