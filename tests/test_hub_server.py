"""The Hub of the tests, driven by the real client: what other tests rely on when they name a fault or count requests."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from helpers import runner_config, training_sae
from hub_client import client_httpx
from hub_server import Fault, HubServer, environment, loopback_only, online
from hub_server import hub_fixture as hub_fixture
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    create_repo,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from sae_lens import SAE
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface
from time_limits import hang_seconds

httpx = client_httpx()
REPO = "someone/saes"
FILES = {"a/cfg.json": b'{"k": 1}', "a/w.safetensors": bytes(range(256)) * 40, "empty.safetensors": b""}
CARD = b"---\nlibrary_name: saelens\n---\n# Card\n"


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi()


def commit(api: HfApi, files: dict[str, bytes], **settings: Any) -> Any:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(REPO, operations, commit_message="title", **settings)


def status_of(failure: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return failure.value.response.status_code


def test_a_commit_holds_what_was_sent_and_a_second_one_sends_nothing(hub: HubServer, api: HfApi):
    api.create_repo(REPO)
    initial = hub.repositories[REPO].branches["main"]
    assert set(hub.files(REPO)) == {".gitattributes"}
    done = commit(api, {**FILES, "README.md": CARD}, parent_commit=initial)
    made = hub.repositories[REPO].commits[done.oid]
    assert (made.parent, made.message, made.lfs) == (initial, "title", {"a/w.safetensors"})
    assert hub.files(REPO) == {**FILES, "README.md": CARD, ".gitattributes": made.files[".gitattributes"]}
    asked = ["create_repo", "validate_yaml", "preupload", "lfs_batch", "lfs_put", "lfs_verify", "commit"]
    assert [request.endpoint for request in hub.requests] == asked
    assert [request.authorized for request in hub.requests] == [name != "lfs_put" for name in asked]
    assert {request.status for request in hub.requests} == {200}
    assert "hf_good" not in repr(hub.requests)

    before = hub.snapshot()
    assert commit(api, FILES).oid == done.oid  # no change, so no commit
    assert (hub.count("commit"), hub.count("lfs_put")) == (1, 1)
    commit(api, {"copy.safetensors": FILES["a/w.safetensors"]})
    assert len(hub.uploads) == 1, "the storage has these bytes already"
    assert hub.snapshot() != before
    api.create_commit(REPO, [CommitOperationDelete("a/", is_folder=True)], commit_message="less")
    assert set(hub.files(REPO)) == {".gitattributes", "README.md", "empty.safetensors", "copy.safetensors"}
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.delete_file("a/cfg.json", REPO)
    titles = [entry.title for entry in api.list_repo_commits(REPO)]
    assert titles == ["less", "title", "title", "initial commit"]


def test_a_commit_on_an_older_head_is_refused(hub: HubServer, api: HfApi):
    old = hub.create(REPO).branches["main"]
    hub.commit(REPO, {"x.txt": b"x"})
    before = hub.snapshot()
    with pytest.raises(HfHubHTTPError) as failure:
        commit(api, FILES, parent_commit=old)
    assert status_of(failure) == 412
    assert hub.snapshot() == before


@pytest.mark.parametrize("etags", ["digest", "opaque"])
def test_downloads_and_listings(hub: HubServer, api: HfApi, etags: Any):
    hub.create(REPO, files={**FILES, "b/ö x#1.txt": b"odd"})
    hub.etags, hub.page_size = etags, 2
    folder = Path(snapshot_download(REPO))
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == hub.files(
        REPO
    )
    assert hub.count("tree") == 4  # 5 files and 2 folders, 2 a page
    head = hub.repositories[REPO].commits[hub.repositories[REPO].branches["main"]]
    tag = get_hf_file_metadata(hf_hub_url(REPO, "a/w.safetensors")).etag
    [weights, a] = api.get_paths_info(REPO, ["a/w.safetensors", "a", "missing"])
    assert (weights.path, a.path) == ("a/w.safetensors", "a")
    siblings = {s.rfilename: s for s in api.model_info(REPO, files_metadata=True).siblings or []}
    if etags == "digest":
        assert tag == head.digest("a/w.safetensors")
        lfs = siblings["a/w.safetensors"].lfs
        assert lfs is not None
        assert lfs.sha256 == tag
        assert get_hf_file_metadata(hf_hub_url(REPO, "a/cfg.json")).etag == siblings["a/cfg.json"].blob_id
    else:
        assert tag is not None
        assert len(tag) < 40
        assert siblings["a/w.safetensors"].lfs is None
    assert [entry.path for entry in api.list_repo_tree(REPO, "a")] == ["a/cfg.json", "a/w.safetensors"]
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "a/none.json")


def test_branches_and_tags(hub: HubServer, api: HfApi):
    first = hub.create(REPO, files={"x.txt": b"1"}).branches["main"]
    api.create_branch(REPO, branch="dev/1")
    commit(api, {"x.txt": b"2"}, revision="dev/1")
    api.create_tag(REPO, tag="v1", revision="dev/1")
    wanted = {"main": b"1", "dev/1": b"2", "v1": b"2", first: b"1", first[:8]: b"1"}
    for revision, content in wanted.items():
        assert Path(hf_hub_download(REPO, "x.txt", revision=revision)).read_bytes() == content
    assert {branch.name for branch in api.list_repo_refs(REPO).branches} == {"main", "dev/1"}
    with pytest.raises(HfHubHTTPError) as failure:
        api.create_branch(REPO, branch="dev/1")
    assert status_of(failure) == 409
    api.create_branch(REPO, branch="old", revision=first)
    assert hub.files(REPO, "old") == hub.files(REPO, "main")
    api.delete_branch(REPO, branch="dev/1")
    with pytest.raises(HfHubHTTPError, match="default branch"):
        api.delete_branch(REPO, branch="main")
    with pytest.raises(RevisionNotFoundError):
        commit(api, {"y.txt": b""}, revision="dev/1")
    assert set(hub.repositories[REPO].branches) == {"main", "old"}


def test_anybody_may_propose_a_change(hub: HubServer, api: HfApi, monkeypatch: pytest.MonkeyPatch):
    hub.create(REPO, files={"x.txt": b"1"})
    hub.tokens["hf_other"] = "other"
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    done = commit(api, {"x.txt": b"2"}, create_pr=True)
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert (hub.files(REPO)["x.txt"], hub.files(REPO, "refs/pr/1")["x.txt"]) == (b"1", b"2")
    assert Path(hf_hub_download(REPO, "x.txt", revision="refs/pr/1")).read_bytes() == b"2"
    assert [d.title for d in api.get_repo_discussions(REPO)] == ["title"]
    assert [ref.name for ref in api.list_repo_refs(REPO, include_pull_requests=True).pull_requests or []] == [
        "refs/pr/1"
    ]
    assert api.create_pull_request(REPO, "another").num == 2
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    commit(api, {"x.txt": b"3"}, revision="refs/pr/1")
    assert hub.files(REPO, "refs/pr/1")["x.txt"] == b"3"


def test_who_may_do_what(hub: HubServer, api: HfApi, monkeypatch: pytest.MonkeyPatch):
    api.create_repo(REPO, private=True)
    hub.commit(REPO, {"x.txt": b"1"})
    hub.tokens |= {"hf_other": "other"}
    hub.organisations["lab"] = {"other"}
    before = hub.snapshot()
    for token, status, user in (("hf_other", 404, "other"), (None, 401, None), ("hf_bad", 401, None)):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            monkeypatch.delenv("HF_TOKEN")
        invisible = HfHubHTTPError if token == "hf_bad" else RepositoryNotFoundError
        for action in (
            lambda: api.model_info(REPO), lambda: commit(api, FILES), lambda: api.delete_repo(REPO),
            lambda: get_hf_file_metadata(hf_hub_url(REPO, "x.txt")),
        ):  # fmt: skip
            with pytest.raises(invisible) as failure:
                action()
            assert status_of(failure) == status
            assert isinstance(failure.value, RepositoryNotFoundError) == (token != "hf_bad")
        with pytest.raises(HfHubHTTPError) as failure:
            api.create_repo("someone/new")
        assert status_of(failure) == (403 if user else 401)
    assert hub.snapshot() == before
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    api.create_repo("lab/saes")
    hub.create("someone/public")
    with pytest.raises(HfHubHTTPError) as failure:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="someone/public")
    assert status_of(failure) == 403
    assert api.whoami()["name"] == "other"
    assert [entry["name"] for entry in api.whoami()["orgs"]] == ["lab"]


def test_creating_and_deleting(hub: HubServer, api: HfApi):
    assert create_repo(REPO) == api.create_repo(REPO, exist_ok=True) == f"{hub.url}/{REPO}"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(REPO)
    api.delete_repo(REPO)
    assert hub.repositories == {}
    api.delete_repo(REPO, missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)


RESULT = "results: [{task: {type: t}, dataset: {name: d, type: d}, metrics: [{type: l0, value: 1.5}]}]"


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("tags: [a]\nlicense: mit\nbase_model: openai-community/gpt2\nmodel-index: [{name: n, " + RESULT + "}]", None),
        ("a: [", "YAML Metadata Error"),
        ("- a list", "must be a mapping"),
        ("tags: [a]\ntags: [b]", "duplicated mapping key"),
        ("tags: one", '"tags" must be an array'),
        ("tags: [1]", '"tags" must be'),
        ("license: {a: b}", '"license" must be'),
        ("library_name: 3", '"library_name" must be a string'),
        ("base_model: /home/me/model", '"base_model" with value "/home/me/model"'),
        ("model-index: {name: n}", '"model-index" must be an array'),
        ("model-index: [{" + RESULT + "}]", '"model-index[0].name" is required'),
        ("model-index: [{name: n}]", '"model-index[0].results" must be an array'),
        ("model-index: [{name: n, " + RESULT.replace("name: d, ", "") + "}]", "results[0].dataset.name"),
        ("model-index: [{name: n, " + RESULT.replace("task: {type: t}, ", "") + "}]", "results[0].task"),
        ("model-index: [{name: n, " + RESULT.replace(", value: 1.5", "") + "}]", "metrics[0].value"),
    ],
)  # fmt: skip
def test_cards_are_checked(hub: HubServer, api: HfApi, metadata: str, problem: str | None):
    hub.create(REPO)
    text = f"---\n{metadata}\n---\n# Title\n"
    if problem is None:
        ModelCard(text).validate()
        commit(api, {"README.md": text.encode()})
        return
    with pytest.raises(ValueError, match="Invalid metadata in README") as failure:
        commit(api, {"README.md": text.encode()})
    assert problem in str(failure.value)
    assert hub.count("commit") == 0


def test_the_client_can_have_a_card_checked(hub: HubServer):
    with pytest.raises(ValueError, match="must be a string or a list of strings"):
        ModelCard("---\nlicense: {a: b}\n---\n").validate()
    assert [(request.endpoint, request.status) for request in hub.requests] == [("validate_yaml", 400)]


def test_the_hub_checks_a_card_once_more_at_the_commit(hub: HubServer, api: HfApi):
    hub.create(REPO)
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        commit(api, {"README.md": b"no metadata"})
    with pytest.raises(HTTPError) as failure:
        raw_commit(hub, {"key": "file", "value": {"path": "README.md", "content": "LS0tCmE6IFsKLS0tCg=="}})
    assert failure.value.code == 400
    failure.value.close()


def raw_commit(hub: HubServer, *items: dict[str, Any]) -> None:
    lines = [{"key": "header", "value": {"summary": "raw"}}, *items]
    body = "\n".join(map(json.dumps, lines)).encode()
    headers = {"Authorization": "Bearer hf_good"}
    urllib.request.urlopen(urllib.request.Request(f"{hub.url}/api/models/{REPO}/commit/main", body, headers)).close()


def test_lfs_files_must_be_there_and_be_what_they_say(hub: HubServer):
    hub.create(REPO)
    before = hub.snapshot()
    oid = "0" * 64
    with pytest.raises(HTTPError) as failure:
        raw_commit(hub, {"key": "lfsFile", "value": {"path": "w", "algo": "sha256", "oid": oid, "size": 1}})
    assert failure.value.code == 400
    failure.value.close()
    with pytest.raises(HTTPError) as failure:
        urllib.request.urlopen(urllib.request.Request(f"{hub.url}/lfs/{oid}", b"x", method="PUT"))
    assert failure.value.code == 400
    failure.value.close()
    assert (hub.blobs, hub.uploads) == ({}, [oid])
    assert hub.snapshot() == before


def test_with_xet_on_regular_uploads_work_and_lfs_ones_do_not(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    online(monkeypatch, hub, tmp_path / "home", xet=True)
    hub.create(REPO)
    (tmp_path / "saes").mkdir()
    (tmp_path / "saes/w.safetensors").write_bytes(b"weights")
    with pytest.raises(ConnectionError):
        HfApi().upload_folder(folder_path=tmp_path / "saes", repo_id=REPO)
    assert hub.count("xet_token") == 1
    hub.upload_mode = lambda _path, _size: "regular"
    hub.faults.append(Fault("commit", 500, times=3))
    HfApi().upload_folder(folder_path=tmp_path / "saes", repo_id=REPO)
    assert hub.files(REPO)["w.safetensors"] == b"weights"
    assert hub.waits == [1, 2, 4]


def test_saelens_uploads_and_loads(hub: HubServer, tmp_path: Path):
    trained = training_sae(runner_config("topk"))
    trained.save_inference_model(str(tmp_path / "sae"))
    upload_saes_to_huggingface({"layer_1": tmp_path / "sae"}, REPO, show_progress=False)
    assert {"README.md", "layer_1/cfg.json", "layer_1/sae_weights.safetensors"} <= set(hub.files(REPO))
    loaded = SAE.from_pretrained(REPO, "layer_1")
    expected = SAE.load_from_disk(str(tmp_path / "sae")).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name])


def test_another_process(hub: HubServer, tmp_path: Path):
    program = (
        f"import huggingface_hub as h; h.create_repo({REPO!r}); print(h.hf_hub_download({REPO!r}, '.gitattributes'))"
    )
    variables = environment(hub, tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=variables,
        capture_output=True,
        text=True,
        timeout=hang_seconds(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home/hub")
    assert REPO in hub.repositories


def test_a_mistake_of_the_server_itself_is_not_hidden(hub: HubServer, api: HfApi):
    hub.create(REPO).branches["main"] = "no such commit"
    with pytest.raises(HfHubHTTPError, match="see its `errors`"):
        api.model_info(REPO)
    assert "KeyError: 'no such commit'" in hub.errors.pop()


def test_other_machines_are_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    refused = loopback_only(monkeypatch)
    for url in ("http://example.org", "http://93.184.216.34"):
        with pytest.raises(RuntimeError, match="only this machine"):
            httpx.get(url, trust_env=False)
    assert refused == ["example.org", "93.184.216.34"]


def test_the_client_is_as_it_was_afterwards(tmp_path: Path):
    before = dict(vars(constants))
    with pytest.MonkeyPatch.context() as monkeypatch, HubServer() as server:
        online(monkeypatch, server, tmp_path)
        assert server.url == constants.ENDPOINT
        assert HfApi().endpoint == server.url
    assert dict(vars(constants)) == before
    assert constants.HF_HUB_OFFLINE
