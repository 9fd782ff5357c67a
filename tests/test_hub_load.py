"""SAEs from the Hub: as SAELens loads them, at any revision, and what is not there."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_sae_files import CFG, ID, flipped, is_of, snapshot
from hub_sae_files import files as files
from hub_sae_files import no_pauses as no_pauses
from hub_sae_files import other_files as other_files
from hub_saes import REPO
from hub_server import Fault, HubServer
from hub_server import hub_fixture as hub_fixture
from huggingface_hub import constants
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from e2e_sae_plugin.comparison.subjects import load_subjects
from e2e_sae_plugin.finetune.start import load_sae, same_weights
from e2e_sae_plugin.hub import download
from e2e_sae_plugin.hub.calls import HubError
from e2e_sae_plugin.hub.download import DamagedDownloadError
from e2e_sae_plugin.hub.load import load_pretrained

# As SAELens loads it.


def test_equals_saelens_and_says_where_from(hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, files)
    ours, theirs = load_pretrained(REPO, ID), SAE.from_pretrained(REPO, ID)
    assert type(ours) is type(theirs)
    assert same_weights(ours, theirs)
    assert ours.cfg.metadata.loaded_from == {
        "repo_id": REPO, "sae_id": ID, "revision": "main", "commit": hub.repositories[REPO].branches["main"],
    }  # fmt: skip
    cfg = ours.cfg.to_dict()
    del cfg["metadata"]["loaded_from"]
    assert cfg == theirs.cfg.to_dict()


def test_dtype_and_device_are_as_in_saelens(hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, files)
    ours, theirs = load_pretrained(REPO, ID, dtype="bfloat16"), SAE.from_pretrained(REPO, ID, dtype="bfloat16")
    assert same_weights(ours, theirs)
    assert (ours.W_dec.dtype, ours.cfg.dtype) == (torch.bfloat16, theirs.cfg.dtype)


def test_it_is_saved_and_loaded_again(hub: HubServer, files: dict[str, bytes], tmp_path: Path):
    hub.create(REPO, files)
    sae = load_pretrained(REPO, ID)
    sae.save_model(tmp_path / "saved")
    again = SAE.load_from_disk(tmp_path / "saved")
    assert same_weights(again, sae)
    assert again.cfg.metadata.loaded_from == sae.cfg.metadata.loaded_from


def test_a_release_of_saelens_at_a_revision(hub: HubServer, files: dict[str, bytes], other_files: dict[str, bytes]):
    folder = "blocks.6.hook_resid_pre"
    repo_id = "jbloom/GPT2-Small-SAEs-Reformatted"
    moved = {name.replace(ID, folder): body for name, body in files.items()}
    first = hub.create(repo_id, moved).branches["main"]
    hub.commit(repo_id, {name.replace(ID, folder): body for name, body in other_files.items()})
    old = load_pretrained("gpt2-small-res-jb", folder, revision=first)
    new, theirs = load_pretrained("gpt2-small-res-jb", folder), SAE.from_pretrained("gpt2-small-res-jb", folder)
    assert (is_of(old, files), is_of(new, other_files)) == (True, True)
    assert new.cfg.to_dict()["metadata"].items() >= theirs.cfg.to_dict()["metadata"].items()
    assert old.cfg.metadata.loaded_from["repo_id"] == repo_id


def test_the_repository_itself_can_be_the_folder(hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, {Path(name).name: body for name, body in files.items()})
    assert is_of(load_pretrained(REPO), files)
    assert is_of(load_pretrained(REPO, "."), files)
    assert is_of(SAE.from_pretrained(REPO, "."), files)


# Revisions.


def test_branches_tags_pull_requests_and_commits(
    hub: HubServer, files: dict[str, bytes], other_files: dict[str, bytes]
):
    repository = hub.create(REPO, files)
    first = repository.branches["main"]
    repository.branches["exp/1"] = repository.tags["v1"] = first
    hub.commit(REPO, other_files)
    request = repository.open_pull_request(first)
    for name in ("exp/1", "v1", request, first):
        sae = load_pretrained(REPO, ID, revision=name)
        assert is_of(sae, files), name
        assert sae.cfg.metadata.loaded_from == {"repo_id": REPO, "sae_id": ID, "revision": name, "commit": first}
    assert is_of(load_pretrained(f"{REPO}@v1", ID), files)
    assert is_of(load_pretrained(f"{REPO}@v1", ID, revision="v1"), files)
    assert is_of(load_sae(f"{REPO}@v1", ID), files)
    assert is_of(load_pretrained(REPO, ID), other_files)
    with pytest.raises(ValueError, match="someone/saes@v1 and revision='v2' do not agree"):
        load_pretrained(f"{REPO}@v1", ID, revision="v2")


def test_all_files_are_of_one_commit(
    hub: HubServer, files: dict[str, bytes], other_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    hub.create(REPO, files)
    fetch = download.fetch

    def slow_fetch(resolved: Any, filename: str, **settings: Any) -> Path:
        path = fetch(resolved, filename, **settings)
        if filename == CFG:
            hub.commit(REPO, other_files)
        return path

    monkeypatch.setattr(download, "fetch", slow_fetch)
    assert is_of(load_pretrained(REPO, ID), files)
    monkeypatch.undo()


def test_a_commit_that_is_cached_is_not_asked_for(hub: HubServer, files: dict[str, bytes]):
    commit = hub.create(REPO, files).branches["main"]
    load_pretrained(REPO, ID)
    before = len(hub.requests)
    assert is_of(load_pretrained(REPO, ID, revision=commit), files)
    assert len(hub.requests) == before


def test_force_download_fetches_again(hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, files)
    load_pretrained(REPO, ID)
    before = hub.count("get_file")
    assert is_of(load_pretrained(REPO, ID, force_download=True), files)
    assert hub.count("get_file") == before + len(files)


# What is not there.


def test_the_only_sae_needs_no_id_and_several_are_listed(hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, files)
    sae = load_pretrained(REPO)
    assert sae.cfg.metadata.loaded_from["sae_id"] == ID
    hub.commit(REPO, {name.replace(ID, f"more/{i:02}"): body for i in range(25) for name, body in files.items()})
    hub.commit(REPO, {"broken/cfg.json": b"{}"})
    with pytest.raises(
        ValueError, match=r"'someone/saes' needs a sae_id\. It has 26: layer_1, .*more/18, and 6 more\."
    ):
        load_pretrained(REPO)
    with pytest.raises(HubError, match=r"there is no such file.*Did you mean 'layer_1'\? It has 26: layer_1") as caught:
        load_pretrained(REPO, "layer1")
    assert caught.value.missing == "file"
    hub.create("someone/text", {"README.md": b"hello"})
    with pytest.raises(ValueError, match=r"It holds no SAE in SAELens's format \(cfg\.json beside sae_weights"):
        load_pretrained("someone/text")


def test_missing_repositories_revisions_and_ids(hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, files)
    with pytest.raises(HubError, match="load the SAE layer_1 of someone/none: there is no such repository") as caught:
        load_pretrained("someone/none", ID)
    assert caught.value.missing == "repository"
    for name in ("v3", "f" * 40):
        with pytest.raises(HubError, match="no such revision") as caught:
            load_pretrained(REPO, ID, revision=name)
        assert caught.value.missing == "revision"
    hub.create("google/gemma-scope-2b-pt-res", {"layer_0/params.npz": b"1"})
    with (
        pytest.warns(UserWarning, match="registered in the official pretrained SAEs list"),
        pytest.raises(HubError, match=r"not in SAELens's own format\. SAELens reads it as the release 'gemma-scope-2b"),
    ):
        load_pretrained("google/gemma-scope-2b-pt-res", "layer_0")


@pytest.mark.parametrize(
    ("what", "settings", "message"),
    [
        ("gpt2-small-res-jp", {}, "SAELens has no release 'gpt2-small-res-jp'.*Did you mean 'gpt2-small-res-jb'"),
        ("gpt2-small-res-jb", {}, r"needs a sae_id\. It has 13: blocks\.0"),
        ("gpt2-small-res-jb", {"sae_id": "blocks.6.resid_pre"}, r"Did you mean 'blocks\.6\.hook_resid_pre'"),
        ("gpt2-small-res-jb", {"layer": 6}, "layer can only be given for 'e2e-sae-gpt2-small'"),
        ("gemma-scope-2b-pt-res", {"sae_id": "embedding/width_4k/average_l0_6", "revision": "v2"}, "branch main only"),
        (
            "gemma-scope-2b-pt-res",
            {"sae_id": "embedding/width_4k/average_l0_6", "token": "hf_x"},
            "reader takes the token",
        ),
        ("folder", {}, r"'folder' is a folder\. Use load_sae"),
        (REPO, {"sae_id": ID, "dtype": "float"}, "dtype='float' is not known. Expected one of float32"),
        (REPO, {"sae_id": "../x"}, "no file or folder in a repository"),
        (REPO, {"sae_id": ID, "revision": "../main"}, "'../main' is no revision"),
        (REPO + "@", {"sae_id": ID}, "do not agree"),
        ("a/b/c", {"sae_id": ID}, "a/b/c"),
    ],
)
def test_refused_before_anything_is_asked(
    what: str, settings: dict[str, Any], message: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    repository = hub.create(REPO)
    repository.branches["v2"] = repository.branches["main"]
    with pytest.raises(ValueError, match=message):
        load_pretrained(what, **settings)
    assert hub.count("get_file") == 0


# Other formats.


RELEASE = "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109"


@pytest.fixture
def other_format(hub: HubServer) -> tuple[str, str, str]:
    """A release that `dictionary_learning` trained, small: its repository, an id in it, and the file of the weights."""
    listed = get_pretrained_saes_directory()[RELEASE]
    sae_id, folder = next(iter(listed.saes_map.items()))
    trainer = {
        "dict_class": "AutoEncoderTopK",
        "layer": 5,
        "k": 2,
        "activation_dim": 4,
        "dict_size": 8,
        "lm_name": "x/y",
    }
    state = {"encoder.weight": torch.rand(8, 4), "decoder.weight": torch.rand(4, 8), "bias": torch.rand(4)}
    state["encoder.bias"] = torch.rand(8)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    config = json.dumps({"trainer": trainer, "buffer": {"ctx_len": 8}}).encode()
    hub.create(listed.repo_id, {f"{folder}/ae.pt": buffer.getvalue(), f"{folder}/config.json": config})
    return listed.repo_id, sae_id, f"{folder}/ae.pt"


def test_a_release_in_another_format(hub: HubServer, other_format: tuple[str, str, str], monkeypatch: Any):
    repo_id, sae_id, name = other_format
    hub.faults.append(Fault("get_file", "corrupt", path_contains=name))
    first = load_pretrained(RELEASE, sae_id)
    assert hub.faults == []
    theirs = SAE.from_pretrained(RELEASE, sae_id)
    assert same_weights(first, theirs)
    assert first.cfg.metadata.loaded_from == {
        "repo_id": repo_id, "sae_id": sae_id, "revision": "main", "commit": hub.repositories[repo_id].branches["main"],
    }  # fmt: skip
    weights = snapshot(hub, repo_id) / name
    for _ in range(2):
        weights.write_bytes(flipped(weights.read_bytes()))
        assert same_weights(load_pretrained(RELEASE, sae_id), theirs)
    weights.write_bytes(flipped(weights.read_bytes()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DamagedDownloadError, match="Load it again when the Hub can be reached"):
        load_pretrained(RELEASE, sae_id)
    assert not weights.exists()


@pytest.mark.parametrize("fault", [Fault("get_file", 503, times=None), Fault("repo_info", 401, times=None)])
def test_another_format_from_a_hub_that_fails(fault: Fault, hub: HubServer, other_format: tuple[str, str, str]):
    hub.faults.append(dataclasses.replace(fault))
    with pytest.raises(HubError, match=f"Could not load the SAE {re.escape(other_format[1])} of {RELEASE}"):
        load_pretrained(RELEASE, other_format[1])


@pytest.mark.parametrize("device", ["gpu", "meta", torch.device("meta"), 3.5])
def test_a_device_that_is_not_here_is_refused_and_removes_nothing(hub: HubServer, files: dict[str, bytes], device: Any):
    hub.create(REPO, files)
    load_pretrained(REPO, ID)
    n = len(hub.requests)
    with pytest.raises(ValueError, match="device="):
        load_pretrained(REPO, ID, device=device)
    assert len(hub.requests) == n
    hub.stop()
    assert is_of(load_pretrained(REPO, ID, device=torch.device("cpu"), dtype=torch.float32), files)


def test_the_only_sae_of_a_revision_needs_no_id_anywhere(hub: HubServer, files: dict[str, bytes]):
    hub.create(REPO, files)
    (found,) = load_subjects([f"{REPO}@main"])
    assert is_of(found.sae, files)
    assert is_of(load_sae(f"{REPO}@main"), files)
    with pytest.raises(ValueError, match=f"sae_id='{ID}'"):
        load_pretrained(f"{REPO}@main:{ID}")
