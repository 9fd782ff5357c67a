"""Where checkpoints are found: folders, single files, pairs, the Hub, Weights & Biases."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import wandb
import yaml
from convert_runs import HOOK, authors_config
from hub_sae_files import no_pauses as no_pauses
from hub_sae_files import stop
from hub_saes import texts_of
from hub_server import Fault, HubServer
from hub_server import hub_fixture as hub_fixture
from huggingface_hub import constants
from wandb import errors

from e2e_sae_plugin.convert import convert
from e2e_sae_plugin.convert.convert import convert_each
from e2e_sae_plugin.convert.sources import Choice, choose, source_files
from e2e_sae_plugin.hub.calls import HubError
from e2e_sae_plugin.hub.download import DamagedDownloadError

RUN = ["samples_8.pt", "samples_100.pt", "samples_20.pt", "final_config.yaml", "notes.txt"]
PAIRS = ["local_similar_ce_layer_2.pt", "local_similar_ce_layer_2.yaml", "README.md", "e2e_similar_l0_layer_6.yaml",
         "e2e_similar_l0_layer_6.pt"]  # fmt: skip


def chosen(names: list[str], wanted: str | None = None, samples: Any = None) -> list[tuple[str, str]]:
    return [(choice.checkpoint, choice.config) for choice in choose(names, wanted, samples, "here")]


def test_of_a_run_the_longest_trained_one_is_taken_unless_another_is_named():
    assert chosen(RUN) == [("samples_100.pt", "final_config.yaml")]
    assert chosen(RUN, samples=20) == [("samples_20.pt", "final_config.yaml")]
    assert [name for name, _ in chosen(RUN, samples="all")] == ["samples_8.pt", "samples_20.pt", "samples_100.pt"]
    assert chosen(RUN, "samples_8.pt") == chosen(RUN, "samples_8") == [("samples_8.pt", "final_config.yaml")]
    assert Choice("a/samples_20.pt", "").samples == 20
    assert Choice("e2e_similar_l0_layer_6.pt", "").samples is None


def test_pairs_are_all_taken_or_one_by_name():
    both = [(f"{name}.pt", f"{name}.yaml") for name in ("e2e_similar_l0_layer_6", "local_similar_ce_layer_2")]
    assert chosen(PAIRS) == both
    assert chosen(PAIRS, "e2e_similar_l0_layer_6") == both[:1]


def test_a_folder_below_is_chosen_from_as_if_it_were_the_source():
    below = [f"runs/a/{name}" for name in RUN]
    assert (
        chosen(below, "runs/a") == chosen(below, "runs/a/") == [("runs/a/samples_100.pt", "runs/a/final_config.yaml")]
    )
    assert chosen(below, "runs/a/samples_8") == [("runs/a/samples_8.pt", "runs/a/final_config.yaml")]


@pytest.mark.parametrize(
    ("names", "wanted", "samples", "message"),
    [
        (RUN, None, 9, r"here has no samples_9\.pt\. It has N = \[8, 20, 100\] \(--samples\)"),
        (RUN, "samples_8", 8, "names one checkpoint, so samples=8"),
        (RUN, "samples_9", None, "no checkpoint 'samples_9' in here. It has samples_100, samples_20, samples_8"),
        (PAIRS, None, "all", r"--samples\) is for runs"),
        (["a.pt"], None, None, r"a\.pt in here has neither a\.yaml nor final_config\.yaml beside it"),
        (["samples_8.pt"], None, None, r"samples_8\.pt in here has neither"),
        (["a.yaml"], None, None, "nothing to convert in here"),
        ([], "a", None, "It has none"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_refused(names: list[str], wanted: str | None, samples: Any, message: str):
    with pytest.raises(ValueError, match=message):
        chosen(names, wanted, samples)


# Files on disk.


def state(value: float = 1.0, place: str = "blocks-1-hook_resid_pre.") -> dict[str, Any]:
    return {
        f"{place}encoder.0.weight": torch.full((6, 4), value),
        f"{place}encoder.0.bias": torch.zeros(6),
        f"{place}decoder.weight": torch.eye(4, 6),
        f"{place}decoder.bias": torch.zeros(4),
    }


CONFIG = yaml.dump(authors_config("e2e", saes__dict_size_to_input_ratio=1.5))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "final_config.yaml").write_text(CONFIG)
    for n in (8, 20, 100):
        torch.save(state(float(n)), folder / f"samples_{n}.pt")
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for n, name in enumerate(("local_similar_ce_layer_2", "e2e_similar_l0_layer_6")):
        torch.save(state(float(n), place=""), folder / f"{name}.pt")
        (folder / f"{name}.yaml").write_text(CONFIG)
    return folder


def trained_for(found: list[Any]) -> list[float]:
    return [each.sae.W_enc[0, 0].item() for each in found]


def came_from(found: Any) -> dict[str, Any]:
    return found.sae.cfg.metadata.to_dict()["converted_from"]


def test_a_run_is_converted_at_one_or_all_of_its_checkpoints(run: Path):
    assert trained_for(convert(run)) == [100]
    assert trained_for(convert(run, samples=8)) == [8]
    assert trained_for(convert(str(run / "samples_20.pt"))) == [20]
    found = convert(run, samples="all")
    assert trained_for(found) == [8, 20, 100]
    assert [each.name for each in found] == [f"{HOOK}-samples_{n}" for n in (8, 20, 100)]
    assert came_from(found[0])["source"] == "run/samples_8.pt"


def test_pairs_are_converted_under_their_names(pairs: Path, tmp_path: Path):
    found = convert(pairs, tmp_path / "out")
    assert [each.name for each in found] == ["e2e_similar_l0_layer_6", "local_similar_ce_layer_2"]
    assert (tmp_path / "out" / "local_similar_ce_layer_2" / "cfg.json").is_file()
    assert trained_for(convert(pairs / "e2e_similar_l0_layer_6")) == [1]
    assert "samples" not in came_from(found[0])


def test_positions_are_chosen_by_hook(run: Path):
    second = "blocks.2.hook_resid_pre"
    config = authors_config("local", [HOOK, second], saes__dict_size_to_input_ratio=1.5)
    (run / "final_config.yaml").write_text(yaml.dump(config))
    torch.save({**state(1.0), **state(2.0, "blocks-2-hook_resid_pre.")}, run / "samples_100.pt")
    assert trained_for(convert(run, positions=[second])) == [2]
    assert trained_for(convert(run, positions=[second], samples="all")) == [2]  # the others have none there
    with pytest.raises(
        ValueError, match=r"No checkpoint has an SAE at blocks\.9 \(--position\)\. There are \['blocks\.1"
    ):
        convert(run, positions=["blocks.9"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent", "There is no .*absent'. Expected a run's folder"),
        ("run/final_config.yaml", "is no .pt file"),
        ("run/samples_9.pt", "There is no"),
        (".", "nothing to convert"),
        ("hf:only-an-owner", "is not understood. Expected hf:OWNER/REPO"),
        ("wandb:project/run", "is not understood. Expected wandb:ENTITY/PROJECT/RUN"),
    ],
)
def test_sources_that_are_none_are_refused(source: str, message: str, run: Path):
    given = source if ":" in source else run.parent / source
    with pytest.raises(ValueError, match=message):
        convert(given)


@pytest.mark.parametrize("settings", [{"samples": 0}, {"samples": True}, {"samples": "last"}, {"positions": HOOK}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], run: Path):
    with pytest.raises(ValueError, match=r"samples \(--samples\) must be|positions must be a list"):
        convert(run, **settings)


# The Hub.

REPO, NAME = "a/b", "e2e_similar_l0_layer_6"


@pytest.fixture
def published(hub: HubServer, pairs: Path) -> str:
    """A repository with the pairs; its commit."""
    files = {file.name: file.read_bytes() for file in sorted(pairs.iterdir())}
    return hub.create(REPO, {"README.md": b"SAEs", **files}).branches["main"]


def pt_of(value: float) -> bytes:
    buffer = io.BytesIO()
    torch.save(state(float(value), place=""), buffer)
    return buffer.getvalue()


def cached(*suffixes: str) -> list[str]:
    return [path.name for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*") if path.suffix in suffixes]


def test_a_repository_is_converted_whole_or_one_by_name(hub: HubServer, published: str):
    found = convert("hf:a/b")
    assert [each.name for each in found] == [NAME, "local_similar_ce_layer_2"]
    assert trained_for(found) == [1, 0]
    assert [came_from(each)["source"] for each in found] == [f"hf:a/b@{published}/{each.name}.pt" for each in found]
    for source in (f"hf:a/b/{NAME}", f"hf:a/b/{NAME}.pt"):
        assert [each.name for each in convert(source)] == [NAME]
    assert hub.count("get_file") == 3  # the configs are equal, so one file; the cache has the rest


def test_of_a_repository_only_what_is_named_is_fetched(hub: HubServer, published: str):
    assert trained_for(convert(f"hf:a/b/{NAME}")) == [1]
    fetched = [request.path.rsplit("/")[-1] for request in hub.requests if request.endpoint == "get_file"]
    assert fetched == [f"{NAME}.yaml", f"{NAME}.pt"]  # in this order: a checkpoint is never cached without its config


def test_branches_tags_pull_requests_and_commits(hub: HubServer, published: str):
    repository = hub.repositories[REPO]
    repository.branches["feature/x"] = repository.tags["v1.0"] = published
    request = repository.open_pull_request(published)
    newer = hub.commit(REPO, {f"{NAME}.pt": pt_of(5)})
    for revision in ("v1.0", "feature%2Fx", request, published):
        (found,) = convert(f"hf:a/b@{revision}/{NAME}")
        assert trained_for([found]) == [1], revision
        assert came_from(found)["source"] == f"hf:a/b@{published}/{NAME}.pt"
        assert len(convert(f"hf:a/b@{revision}")) == 2
    (found,) = convert(f"hf:a/b/{NAME}")
    assert trained_for([found]) == [5]
    assert came_from(found)["source"] == f"hf:a/b@{newer}/{NAME}.pt"


def test_all_files_are_of_one_commit(hub: HubServer, published: str):
    found = convert_each("hf:a/b")
    first = next(found)
    hub.commit(REPO, {"local_similar_ce_layer_2.pt": pt_of(5)})
    assert trained_for([first, *found]) == [1, 0]


def test_a_run_in_a_folder_of_a_repository(hub: HubServer, run: Path):
    hub.create(REPO, {f"runs/x/{file.name}": file.read_bytes() for file in sorted(run.iterdir())})
    assert trained_for(convert("hf:a/b/runs/x")) == [100]
    assert trained_for(convert("hf:a/b/runs/x", samples="all")) == [8, 20, 100]
    assert trained_for(convert("hf:a/b/runs/x/samples_8")) == [8]


@pytest.mark.parametrize(
    ("source", "missing", "message"),
    [
        (
            "hf:a/none",
            "repository",
            "Could not convert 'hf:a/none': there is no such repository, or this token may not",
        ),
        ("hf:a/b@v9", "revision", "Could not convert 'hf:a/b@v9': the repository has no such revision"),
        (f"hf:a/b@{'f' * 40}", "revision", "no such revision"),
    ],
)
def test_what_the_hub_has_not_is_said(source: str, missing: str, message: str, hub: HubServer, published: str):
    with pytest.raises(HubError, match=message) as caught:
        convert(source)
    assert caught.value.missing == missing
    assert hub.count("get_file") == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:a/b/e2e", rf"no checkpoint 'e2e' in hf:a/b/e2e\. It has {NAME}, local_similar_ce_layer_2\."),
        ("hf:a/--b", "a/--b"),
        ("hf:a/b@../main", r"'\.\.' is no revision"),
        ("hf:a/b@", "is not understood"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_fetched(
    source: str, message: str, hub: HubServer, published: str
):
    with pytest.raises(ValueError, match=message):
        convert(source)
    assert hub.count("get_file") == 0


@pytest.mark.parametrize("suffix", [".pt", ".yaml"])
@pytest.mark.parametrize("what", ["corrupt", "truncate", 503])
def test_a_file_that_came_wrong_is_fetched_again(what: Any, suffix: str, hub: HubServer, published: str):
    hub.faults.append(Fault("get_file", what, path_contains=f"{NAME}{suffix}"))
    assert trained_for(convert(f"hf:a/b/{NAME}")) == [1]
    assert hub.faults == []


@pytest.mark.parametrize("suffix", [".pt", ".yaml"])
def test_a_file_that_is_always_damaged_is_refused_and_not_kept(
    suffix: str, hub: HubServer, published: str, tmp_path: Path
):
    hub.faults.append(Fault("get_file", "corrupt", times=None, path_contains=f"{NAME}{suffix}"))
    with pytest.raises(DamagedDownloadError, match=rf"{NAME}{suffix} of a/b at commit {published} is damaged: its "):
        convert(f"hf:a/b/{NAME}", tmp_path / "out")
    assert cached(suffix) == []
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    assert trained_for(convert(f"hf:a/b/{NAME}")) == [1]


def test_a_checkpoint_damaged_in_the_cache_is_found(hub: HubServer, published: str):
    convert(f"hf:a/b/{NAME}")
    (path,) = Path(constants.HF_HUB_CACHE).rglob(f"snapshots/*/{NAME}.pt")
    path.write_bytes(pt_of(9))  # a sound file, but another
    assert trained_for(convert(f"hf:a/b/{NAME}")) == [1]
    path.write_bytes(pt_of(9))
    stop(hub)
    with pytest.raises(DamagedDownloadError, match="Load it again when the Hub can be reached"):
        convert(f"hf:a/b/{NAME}")


def test_a_server_that_is_down_is_said_and_the_cache_used(
    hub: HubServer, published: str, caplog: pytest.LogCaptureFixture
):
    stop(hub)
    for source in ("hf:a/b", f"hf:a/b@{published}"):
        with pytest.raises(HubError, match=rf"no answer from {hub.url}") as caught:
            convert(source)
        assert caught.value.may_pass
    hub.start()
    convert(f"hf:a/b/{NAME}")
    stop(hub)
    for source in (f"hf:a/b/{NAME}", f"hf:a/b@{published}/{NAME}", "hf:a/b", f"hf:a/b@{published}"):
        caplog.clear()
        (found,) = convert(source)
        assert trained_for([found]) == [1]
        assert came_from(found)["source"] == f"hf:a/b@{published}/{NAME}.pt"
        (said,) = [text for text in caplog.messages if "taken" in text]
        assert f"no answer from {hub.url}" in said, source
    with pytest.raises(ValueError, match=r"no checkpoint 'local.*' in hf:.* as far as the cache has it\. It has e2e_"):
        convert("hf:a/b/local_similar_ce_layer_2")


def test_offline_by_choice(hub: HubServer, published: str, monkeypatch: pytest.MonkeyPatch):
    convert(f"hf:a/b/{NAME}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert trained_for(convert("hf:a/b")) == [1]
    with pytest.raises(HubError, match="Could not convert 'hf:a/c': HF_HUB_OFFLINE is set, so the Hub is not asked"):
        convert("hf:a/c")
    assert len(hub.requests) == before


@pytest.mark.parametrize("endpoint", ["repo_info", "listing", "head_file", "get_file"])
@pytest.mark.parametrize("status", [401, 403, 500])
def test_no_token_is_told(status: int, endpoint: str, hub: HubServer, published: str, caplog: pytest.LogCaptureFixture):
    place, skip = ("repo_info", 1) if endpoint == "listing" else (endpoint, 0)  # the second look at the repository
    hub.faults.append(Fault(place, status, times=None, skip=skip, message="your header was Bearer {token}"))
    with caplog.at_level(logging.INFO), pytest.raises(HubError, match="<token>") as caught:
        convert("hf:a/b")
    assert not [text for text in [*texts_of(caught.value), *caplog.messages] if "hf_good" in text]
    hub.faults.clear()


# Weights & Biases.


class RemoteFile:
    """What wandb's API gives of a run's file."""

    def __init__(self, name: str, path: Path, error: Exception | None = None):
        self.name, self.path, self.error = name, path, error
        self.roots: list[Path] = []

    def download(self, root: str, replace: bool) -> Any:
        assert replace
        if self.error is not None:
            raise self.error
        self.roots.append(Path(root))
        target = Path(root) / self.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.path.read_bytes())
        return target.open()


def api_of(run: Path, **errors_of: Exception) -> Any:
    files = [RemoteFile(file.name, file, errors_of.get(file.stem)) for file in run.iterdir()]
    return SimpleNamespace(run=Mock(return_value=SimpleNamespace(files=lambda: files)), files=files)


def test_a_wandb_run_is_fetched_file_by_file_and_cleaned_away(run: Path):
    api = api_of(run)
    (found,) = convert("wandb:sparsify/gpt2/abc123", wandb_api=api)
    api.run.assert_called_once_with("sparsify/gpt2/abc123")
    assert trained_for([found]) == [100]
    assert came_from(found)["source"] == "wandb:sparsify/gpt2/abc123/samples_100.pt"
    fetched = {file.name: file.roots for file in api.files if file.roots}
    assert set(fetched) == {"samples_100.pt", "final_config.yaml"}
    assert not any(root.exists() for roots in fetched.values() for root in roots)
    assert trained_for(convert("wandb:a/b/c", wandb_api=api, samples="all")) == [8, 20, 100]


def test_a_config_saved_from_a_temporary_folder_is_found(run: Path):
    api = api_of(run)
    for file in api.files:
        if file.name == "final_config.yaml":
            file.name = "tmp/tmpx1/final_config.yaml"
    assert trained_for(convert("wandb:a/b/c", wandb_api=api)) == [100]


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (errors.CommError("Could not find run <a/b/c>"), ValueError, "'wandb:a/b/c': there is no such run or file"),
        (ValueError("Could not find run"), ValueError, "'wandb:a/b/c': Could not find run"),
        (errors.AuthenticationError("bad key"), ValueError, "refuses the login: bad key"),
        (errors.UsageError("no key"), ValueError, "refuses the login: no key"),
        (errors.CommError("connection reset"), OSError, "'wandb:a/b/c' cannot be fetched: connection reset"),
        (OSError(28, "No space left on device"), OSError, "No space left"),
    ],
    ids=range(6),
)  # fmt: skip
def test_what_wandb_refuses_is_said(error: Exception, expected: type[Exception], message: str, run: Path):
    with pytest.raises(expected, match=message):
        convert("wandb:a/b/c", wandb_api=SimpleNamespace(run=Mock(side_effect=error)))
    with pytest.raises(expected, match=message):
        convert("wandb:a/b/c", wandb_api=api_of(run, samples_100=error))


def test_without_a_wandb_login_nothing_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wandb, "login", lambda **settings: settings["prompt"])
    monkeypatch.setattr(wandb, "Api", lambda: pytest.fail("asked without a login"))
    with pytest.raises(ValueError, match=r"there is no Weights & Biases login. Run `wandb login`"):
        next(iter(source_files("wandb:a/b/c")))
