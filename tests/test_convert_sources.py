"""Where checkpoints are found: folders, single files, pairs, the Hub, Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import wandb
import yaml
from convert_runs import HOOK, authors_config
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from wandb import errors

from e2e_sae_plugin.convert import convert, sources
from e2e_sae_plugin.convert.sources import Choice, choose, source_files

COMMIT = "c0ffee" * 6 + "c0ff"
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


@pytest.fixture
def hub(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A repository with the pairs; the list is what was asked of it."""
    asked: list[Any] = []

    def list_files(repo_id: str, revision: str | None) -> tuple[str, list[str]]:
        asked.append((repo_id, revision))
        return COMMIT, ["README.md", *sorted(file.name for file in pairs.iterdir())]

    def fetch(repo_id: str, filenames: list[str], revision: str) -> list[Path]:
        asked.append((repo_id, *filenames, revision))
        return [pairs / name for name in filenames]

    monkeypatch.setattr(sources, "list_files", list_files)
    monkeypatch.setattr(sources, "fetch", fetch)
    return asked


@pytest.mark.parametrize(
    ("source", "revision", "n"),
    [
        ("hf:a/b", None, 2),
        ("hf:a/b@v1.0", "v1.0", 2),
        ("hf:a/b/e2e_similar_l0_layer_6", None, 1),
        ("hf:a/b/e2e_similar_l0_layer_6.pt", None, 1),
        ("hf:a/b@v1.0/e2e_similar_l0_layer_6", "v1.0", 1),
        ("hf:a/b@refs/pr/1/e2e_similar_l0_layer_6", "refs/pr/1", 1),
        ("hf:a/b@feature%2Fx", "feature/x", 2),
    ],
)
def test_hub_sources_are_fetched_at_one_commit(source: str, revision: str | None, n: int, hub: list[Any]):
    found = convert(source)
    assert len(found) == n
    assert hub[0] == ("a/b", revision)
    assert hub[1] == ("a/b", "e2e_similar_l0_layer_6.pt", "e2e_similar_l0_layer_6.yaml", COMMIT)
    assert came_from(found[0])["source"] == f"hf:a/b@{COMMIT}/e2e_similar_l0_layer_6.pt"


def test_a_name_that_the_repository_has_not_is_refused_before_anything_is_fetched(hub: list[Any]):
    with pytest.raises(ValueError, match=r"no checkpoint 'e2e' in hf:a/b/e2e\. It has e2e_similar_l0_layer_6, local"):
        convert("hf:a/b/e2e")
    assert len(hub) == 1


def of_hub(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("said the Hub", response=Mock(headers={}))


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (of_hub(RepositoryNotFoundError), ValueError, "there is no repository a/b, or it is private"),
        (of_hub(RevisionNotFoundError), ValueError, "a/b has no such revision"),
        (of_hub(RemoteEntryNotFoundError), ValueError, "said the Hub"),
        (of_hub(HfHubHTTPError), OSError, "'hf:a/b' cannot be fetched: said the Hub"),
        (LocalEntryNotFoundError("no network"), OSError, "cannot be fetched, and is not in the cache: no network"),
        (ConnectionError(), OSError, "cannot be fetched: ConnectionError"),
        (OSError(28, "No space left on device"), OSError, "No space left"),
    ],
    ids=range(7),
)
def test_what_the_hub_refuses_is_said(
    raised: Exception, expected: type[Exception], message: str, hub: list[Any], monkeypatch: pytest.MonkeyPatch
):
    for function in ("fetch", "list_files"):
        with monkeypatch.context() as patch:
            patch.setattr(sources, function, Mock(side_effect=raised))
            with pytest.raises(expected, match=message):
                convert("hf:a/b")


def test_offline_the_real_client_is_an_oserror():
    with pytest.raises(OSError, match=r"'hf:a/b' cannot be fetched: .*offline"):
        convert("hf:a/b")


def test_an_illegal_repository_name_is_a_valueerror():
    with pytest.raises(ValueError, match="hf:a/--b"):
        convert("hf:a/--b")


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
