"""Loading from a Hub that fails, refuses or is away: an error or the cache with a word about it, and never a token told."""

from __future__ import annotations

import logging
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_sae_files import CFG, ID, SPARSITY, SUMS, WEIGHTS, is_of, snapshot, stop, with_sums
from hub_sae_files import files as files
from hub_sae_files import no_pauses as no_pauses
from hub_sae_files import other_files as other_files
from hub_saes import REPO, texts_of
from hub_server import Fault, HubServer, impatient, online
from hub_server import hub_fixture as hub_fixture
from huggingface_hub import constants
from sae_lens import SAE
from safetensors.torch import save

from e2e_sae_plugin.hub.calls import HubError
from e2e_sae_plugin.hub.download import fetch_if_there, resolve
from e2e_sae_plugin.hub.load import load_pretrained


@pytest.mark.parametrize("what", ["truncate", "short", "drop", 500, 503, 429])
@pytest.mark.parametrize("name", [CFG, WEIGHTS])
def test_a_passing_fault_is_got_over(what: Any, name: str, hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, files)
    hub.faults.append(Fault("get_file", what, path_contains=name))
    if what == "short":  # as long as the server says: the client cannot know that it would be different next time
        with pytest.raises(HubError, match=f"Could not fetch {name}"):
            load_pretrained(REPO, ID)
    assert is_of(load_pretrained(REPO, ID), files)
    assert hub.faults == []


@pytest.mark.parametrize("endpoint", ["repo_info", "head_file", "get_file"])
@pytest.mark.parametrize("what", [500, 503, "drop"])
def test_a_lasting_fault_is_an_error(what: Any, endpoint: str, hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, files)
    fault = Fault(endpoint, what, times=None, path_contains="" if endpoint == "repo_info" else WEIGHTS)
    hub.faults.append(fault)
    with pytest.raises(HubError, match="Could not") as caught:
        load_pretrained(REPO, ID)
    assert caught.value.may_pass
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    hub.faults.clear()
    assert is_of(load_pretrained(REPO, ID), files)


@pytest.mark.parametrize("endpoint", ["head_file", "get_file"])
@pytest.mark.parametrize("name", [SPARSITY, SUMS])
def test_an_outage_is_not_taken_for_a_missing_file(name: str, endpoint: str, hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, with_sums({**files, SPARSITY: save({"sparsity": torch.zeros(4)})}))
    hub.faults.append(Fault(endpoint, 503, times=None, path_contains=name))
    with pytest.raises(HubError, match=f"Could not fetch {name}.*HTTP 503"):
        load_pretrained(REPO, ID)
    with pytest.raises(HubError):
        fetch_if_there(resolve(REPO), name)


def test_a_missing_file_is_remembered(hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, files)
    resolved = resolve(REPO)
    assert fetch_if_there(resolved, SPARSITY) is None
    before = len(hub.requests)
    assert fetch_if_there(resolved, SPARSITY) is None
    assert len(hub.requests) == before


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_not_answered_from_the_cache(status: int, hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, files)
    load_pretrained(REPO, ID)
    hub.faults.append(Fault("repo_info", status, times=None))
    with pytest.raises(HubError) as caught:
        load_pretrained(REPO, ID)
    assert (caught.value.status, caught.value.may_pass) == (status, False)
    assert hub.count("repo_info") == 2  # one for each load: a refusal is not repeated


def test_a_private_repository(hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hub.create(REPO, files, private=True)
    assert is_of(load_pretrained(REPO, ID, token="hf_good"), files)
    for token in (None, "hf_of_nobody"):
        online(monkeypatch, hub, tmp_path / "new-home", token=token)
        with pytest.raises(HubError, match=r"there is no such repository|does not accept the token"):
            load_pretrained(REPO, ID)
    assert is_of(load_pretrained(REPO, ID, token="hf_good"), files)


def test_a_server_that_is_down_is_said_and_the_cache_used(
    hub: HubServer, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
):
    commit = hub.create(REPO, files).branches["main"]
    load_pretrained(REPO, ID)
    stop(hub)
    caplog.clear()
    sae = load_pretrained(REPO, ID)
    assert is_of(sae, files)
    assert sae.cfg.metadata.loaded_from["commit"] == commit
    said = [record for record in caplog.records if commit in record.getMessage()]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert f"no answer from {hub.url}" in said[0].getMessage()
    assert sum("Trying again" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(HubError, match=f"layer_2/cfg.json.*the Hub could not be reached.*It has 1: {ID}"):
        load_pretrained(REPO, "layer_2")
    with pytest.raises(HubError, match="Leave out force_download"):
        load_pretrained(REPO, ID, force_download=True)
    for repo_id, name in (("someone/else", None), (REPO, "v2")):
        with pytest.raises(HubError, match=r"no answer from .*The cache .* does not have '") as caught:
            load_pretrained(repo_id, ID, revision=name)
        assert caught.value.may_pass


def test_offline_by_choice(
    hub: HubServer, files: dict[str, bytes], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    commit = hub.create(REPO, files).branches["main"]
    load_pretrained(REPO, ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    with caplog.at_level(logging.INFO):
        for name in (None, commit):
            assert is_of(load_pretrained(REPO, ID, revision=name), files)
        assert is_of(load_pretrained(REPO), files)
    assert "HF_HUB_OFFLINE is set: main of someone/saes is taken from the cache, at commit" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    for name in ("v2", "f" * 40):
        with pytest.raises(
            HubError, match=r"HF_HUB_OFFLINE is set, so the Hub is not asked, and the cache .* does not have"
        ):
            load_pretrained(REPO, ID, revision=name)
    assert len(hub.requests) == before


def test_what_saelens_fetched_is_used_offline(hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    hub.create(REPO, files)
    SAE.from_pretrained(REPO, ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_of(load_pretrained(REPO, ID), files)


def test_what_was_fetched_here_saelens_uses_offline(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    hub.create(REPO, files)
    load_pretrained(REPO, ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_of(SAE.from_pretrained(REPO, ID), files)


def test_a_listing_that_hangs(hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    impatient(monkeypatch, hub)
    hub.create(REPO, files)
    hub.faults.append(Fault("repo_info", "hang", times=None, skip=1))
    with pytest.raises(HubError, match=r"list the files.*no answer"):
        load_pretrained(REPO)


@pytest.mark.parametrize("endpoint", ["repo_info", "get_file"])
def test_a_server_that_hangs(endpoint: str, hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    hub.create(REPO, files)
    impatient(monkeypatch, hub)
    hub.faults.append(Fault(endpoint, "hang", times=None))
    with pytest.raises(HubError, match="no answer from") as caught:
        load_pretrained(REPO, ID)
    assert caught.value.may_pass
    hub.faults.clear()
    load_pretrained(REPO, ID)
    hub.faults.append(Fault("repo_info", "hang", times=None))
    assert is_of(load_pretrained(REPO, ID), files)


def test_a_full_disk(hub: HubServer, files: dict[str, bytes]):
    """Files cannot grow beyond a limit, which the system reports as it does a full disk."""
    hub.create(REPO, files)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(files[WEIGHTS]) - 1, limits[1]))
    try:
        with pytest.raises(HubError, match=f"Could not fetch {WEIGHTS} of {REPO}.*: File too large") as caught:
            load_pretrained(REPO, ID)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not caught.value.may_pass
    assert not (snapshot(hub) / WEIGHTS).exists()
    assert is_of(load_pretrained(REPO, ID), files)


def test_a_cache_that_cannot_be_written_to(hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, files)
    Path(constants.HF_HUB_CACHE).parent.mkdir(parents=True, exist_ok=True)
    Path(constants.HF_HUB_CACHE).write_text("a file where the cache should be")
    with pytest.raises(HubError, match=f"Could not fetch {CFG}") as caught:
        load_pretrained(REPO, ID)
    assert not caught.value.may_pass


@pytest.mark.parametrize("endpoint", ["repo_info", "head_file", "get_file", "listing"])
@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_no_token_is_told(
    status: int, endpoint: str, hub: HubServer, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
):
    token = "secret-token-of-no-known-form"
    hub.tokens[token] = "someone"
    hub.create(REPO, files)
    listing = endpoint == "listing"  # the second look at the repository
    place, skip = ("repo_info", 1) if listing else (endpoint, 0)
    hub.faults.append(Fault(place, status, times=None, skip=skip, message="your header was Bearer {token}"))
    # The client's transport logs whole answers at the level below.
    with caplog.at_level(logging.INFO), pytest.raises(HubError) as caught:
        load_pretrained(REPO, None if listing else ID, token=token)
    assert "<token>" in str(caught.value)
    assert not [text for text in texts_of(caught.value) if token in text]
    assert not [record for record in caplog.records if token in record.getMessage()]


@pytest.mark.parametrize(("name", "body"), [(CFG, b'{"architecture": "topk", "metadata": {}}'), (WEIGHTS, None)])
def test_what_saelens_cannot_load_is_named(name: str, body: bytes | None, hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, {**files, name: save({"W_dec": torch.zeros(3, 4)}) if body is None else body})
    with pytest.raises(ValueError, match="SAELens cannot load layer_1 of someone/saes at commit"):
        load_pretrained(REPO, ID)
    assert (snapshot(hub) / name).exists()  # it is what the Hub has
