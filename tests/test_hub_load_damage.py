"""Files from the Hub that are not what they should be: fetched again or refused, and never left in the cache."""

from __future__ import annotations

from typing import Any

import pytest
from hub_sae_files import CFG, ID, SUMS, WEIGHTS, cached_bodies, flipped, is_of, snapshot, stop, with_sums
from hub_sae_files import files as files
from hub_sae_files import no_pauses as no_pauses
from hub_sae_files import other_files as other_files
from hub_saes import REPO
from hub_server import Fault, HubServer
from hub_server import hub_fixture as hub_fixture
from sae_lens import SAE

from e2e_sae_plugin.hub.download import DamagedDownloadError
from e2e_sae_plugin.hub.load import load_pretrained


@pytest.mark.parametrize("name", [CFG, WEIGHTS])
def test_a_file_that_came_damaged_is_fetched_again(
    name: str, hub: HubServer, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
):
    hub.create(REPO, files)
    hub.faults.append(Fault("get_file", "corrupt", path_contains=name))
    assert is_of(load_pretrained(REPO, ID), files)
    assert hub.faults == []
    assert f"{name} of {REPO} at commit" in caplog.text
    assert "It is fetched once more." in caplog.text


@pytest.mark.parametrize("name", [CFG, WEIGHTS])
@pytest.mark.parametrize("etags", ["digest", "opaque"])
def test_a_file_that_is_always_damaged_is_refused(etags: Any, name: str, hub: HubServer, files: dict[str, bytes]):
    hub.etags = etags
    commit = hub.create(REPO, with_sums(files)).branches["main"]
    hub.faults.append(Fault("get_file", "corrupt", times=None, path_contains=name))
    with pytest.raises(DamagedDownloadError) as caught:
        load_pretrained(REPO, ID)
    text = str(caught.value)
    assert f"{name} of {REPO} at commit {commit} is damaged: its " in text
    assert "sum is" in text
    assert "It was removed from the cache." in text
    assert set(cached_bodies()) <= set(with_sums(files).values())
    assert not (snapshot(hub) / name).is_symlink()
    hub.faults.clear()
    assert is_of(load_pretrained(REPO, ID), files)


@pytest.mark.parametrize("etags", ["digest", "opaque"])
def test_a_file_damaged_in_the_cache_is_found(etags: Any, hub: HubServer, files: dict[str, bytes]):
    hub.etags = etags
    hub.create(REPO, with_sums(files, mark="*"))
    load_pretrained(REPO, ID)
    weights = snapshot(hub) / WEIGHTS
    weights.write_bytes(flipped(weights.read_bytes()))
    assert not is_of(SAE.from_pretrained(REPO, ID), files)  # the host does not notice
    stop(hub)
    with pytest.raises(DamagedDownloadError, match="Load it again when the Hub can be reached"):
        load_pretrained(REPO, ID)
    assert not weights.exists()
    hub.start()
    assert is_of(load_pretrained(REPO, ID), files)
    assert weights.read_bytes() == files[WEIGHTS]


def test_without_sums_there_is_nothing_to_compare(hub: HubServer, files: dict[str, bytes]):
    hub.etags = "opaque"
    hub.create(REPO, files)
    assert is_of(load_pretrained(REPO, ID), files)


def test_a_damaged_file_that_nothing_is_known_of_is_removed_if_it_cannot_be_read(
    hub: HubServer, files: dict[str, bytes]
):
    hub.etags = "opaque"
    hub.create(REPO, {**files, CFG: files[CFG][:-20]})
    with pytest.raises(DamagedDownloadError, match="cannot be read"):
        load_pretrained(REPO, ID)
    assert not (snapshot(hub) / CFG).exists()


def test_a_list_of_sums_that_is_damaged_itself(hub: HubServer, files: dict[str, bytes]):
    hub.etags = "opaque"
    hub.create(REPO, with_sums(files))
    hub.faults.append(Fault("get_file", "corrupt", path_contains=SUMS))
    assert is_of(load_pretrained(REPO, ID), files)
    assert hub.faults == []
    hub.commit(REPO, {SUMS: b"no sums\n"})
    with pytest.raises(DamagedDownloadError, match=r"checksums\.sha256 has the line 'no sums'"):
        load_pretrained(REPO, ID)
    wrong = with_sums({name: flipped(body) for name, body in files.items()})[SUMS]
    hub.commit(REPO, {SUMS: wrong + b"\n" + b"0" * 64 + b"  another_file\n"})
    with pytest.raises(DamagedDownloadError, match=r"checksums\.sha256 says"):
        load_pretrained(REPO, ID)


def test_copies_instead_of_links_are_compared_with_the_list(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: False)
    hub.create(REPO, with_sums(files))
    assert is_of(load_pretrained(REPO, ID), files)
    weights = snapshot(hub) / WEIGHTS
    assert not weights.is_symlink()
    weights.write_bytes(flipped(files[WEIGHTS]))
    assert is_of(load_pretrained(REPO, ID), files)
