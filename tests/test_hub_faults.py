"""Faults on request in the Hub of the tests: each has the effect it promises on the real client, and no other."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hub_client import client_httpx
from hub_server import Fault, HubServer
from hub_server import hub_fixture as hub_fixture
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from time_limits import hang_seconds

httpx = client_httpx()
REPO = "someone/saes"
FILES = {"a/cfg.json": b'{"k": 1}', "a/w.safetensors": bytes(range(256)) * 40}


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi()


def commit(api: HfApi, files: dict[str, bytes]) -> Any:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(REPO, operations, commit_message="title")


@pytest.mark.parametrize(
    ("what", "error", "done"),
    [
        (500, HfHubHTTPError, False),
        (401, HfHubHTTPError, False),
        (404, RepositoryNotFoundError, False),
        ("drop", httpx.RemoteProtocolError, False),
        ("drop_after", httpx.RemoteProtocolError, True),
        ("fail_after", HfHubHTTPError, True),
        ("truncate", httpx.RemoteProtocolError, True),
    ],
)
def test_faults_of_a_commit(hub: HubServer, api: HfApi, what: Any, error: type[Exception], done: bool):
    hub.create(REPO)
    hub.faults.append(Fault("commit", what))
    with pytest.raises(error):
        commit(api, FILES)
    assert ("a/cfg.json" in hub.files(REPO)) == done
    assert hub.faults == []
    status = {"fail_after": 500, "truncate": 200}.get(what, what if isinstance(what, int) else None)
    assert [r.status for r in hub.requests if r.endpoint == "commit"] == [status]
    commit(api, FILES)
    assert hub.files(REPO)["a/cfg.json"] == FILES["a/cfg.json"]


def test_when_a_fault_happens(hub: HubServer, api: HfApi):
    hub.create(REPO, files=FILES)
    hub.faults += [
        Fault("get_file", 503, times=2, skip=1, path_contains="cfg"),
        Fault("head_file", 503, times=None, path_contains="nothing like it"),
    ]
    outcomes: list[str] = []
    for name in ("a/cfg.json", "a/w.safetensors", "a/cfg.json", "a/cfg.json", "a/cfg.json"):
        try:
            hf_hub_download(REPO, name, force_download=True)
            outcomes.append("done")
        except HfHubHTTPError as failure:
            outcomes.append(str(failure.response.status_code))
    assert outcomes == ["done", "done", "503", "503", "done"]
    assert len(hub.faults) == 1


def test_faults_of_a_download(hub: HubServer):
    hub.create(REPO, files=FILES)
    hub.faults.append(Fault("get_file", "short"))
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(REPO, "a/w.safetensors")
    hub.faults.append(Fault("get_file", "corrupt"))
    got = Path(hf_hub_download(REPO, "a/w.safetensors")).read_bytes()
    assert [i for i in range(len(got)) if got[i] != FILES["a/w.safetensors"][i]] == [len(got) // 2]
    hub.faults.append(Fault("head_file", 404, code=""))
    with pytest.raises(LocalEntryNotFoundError):  # no X-Error-Code: for the client the Hub is out of order
        hf_hub_download(REPO, "a/cfg.json")
    hub.faults.append(Fault("head_file", 404))
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "a/cfg.json")


def test_the_client_waits_and_tries_again_without_sleeping(hub: HubServer, api: HfApi, monkeypatch: pytest.MonkeyPatch):
    hub.create(REPO)
    hub.faults += [Fault("preupload", 503, times=2), Fault("preupload", 429)]
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept for {seconds} s"))
    commit(api, FILES)
    assert hub.waits == [1, 2, 1]  # Retry-After: 0, and the client adds one second
    assert [r.status for r in hub.requests if r.endpoint == "preupload"] == [503, 503, 429, 200]


def test_an_error_can_repeat_the_token(hub: HubServer, api: HfApi):
    hub.create(REPO)
    hub.faults.append(Fault("repo_info", 500, message="bad token {token}"))
    with pytest.raises(HfHubHTTPError, match="bad token hf_good"):
        api.model_info(REPO)


def test_a_hanging_server_can_be_left_and_stopped(hub: HubServer):
    hub.create(REPO, files=FILES)
    hub.faults.append(Fault("head_file", "hang", times=None))
    url = hf_hub_url(REPO, "a/cfg.json")
    with pytest.raises(httpx.ReadTimeout):
        get_hf_file_metadata(url, timeout=0.2)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(get_hf_file_metadata, url, timeout=hang_seconds())
        while hub.count("head_file") < 2:
            time.sleep(0.01)
        hub.stop()
        with pytest.raises(httpx.RemoteProtocolError):
            waiting.result(timeout=hang_seconds())
    assert [r.status for r in hub.requests] == [None, None]


def test_a_stopped_server_is_unreachable_and_comes_back(hub: HubServer, api: HfApi):
    hub.create(REPO)
    url = hub.url
    api.model_info(REPO)  # leaves a connection open
    hub.stop()
    for _ in range(2):
        with pytest.raises(httpx.NetworkError):
            api.model_info(REPO)
    assert hub.count("repo_info") == 1
    hub.start()
    assert hub.url == url
    assert api.model_info(REPO).id == REPO


def test_a_truncated_download_goes_on_where_it_stopped(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    hub.create(REPO, files=FILES)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults.append(Fault("get_file", "truncate"))
    path = hf_hub_download(REPO, "a/w.safetensors")
    assert Path(path).read_bytes() == FILES["a/w.safetensors"]
    assert [r.status for r in hub.requests if r.endpoint == "get_file"] == [200, 206]
    assert hub.waits == [1]
    assert hub.faults == []
