"""Sharing SAEs: what goes up, what stays, and that plain SAELens loads it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runner_config, training_sae
from hub_saes import HOOK, REPO, an_sae
from hub_server import HubServer, online
from hub_server import hub_fixture as hub_fixture
from huggingface_hub import ModelCard
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file, save_file

from e2e_sae_plugin.architectures import TOKEN_SEPARABLE
from e2e_sae_plugin.cli import main
from e2e_sae_plugin.evaluation import Evaluation
from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.hub.calls import HubError
from e2e_sae_plugin.hub.load import load_pretrained
from e2e_sae_plugin.hub.upload import push_to_hub

ARCHITECTURES = sorted({*TOKEN_SEPARABLE, "batchtopk", "matryoshka_batchtopk", "gated"})


def inference_form(sae: TrainingSAE[Any], folder: Path) -> SAE[Any]:
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


def same(first: SAE[Any], second: SAE[Any]) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def an_evaluation(sae: SAE[Any], **metrics: float) -> Evaluation:
    return Evaluation(
        name="a", hook_name=HOOK, architecture=sae.cfg.architecture(), d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae,
        n_tokens=1000, n_sequences=10,
        metrics={name: Estimate(value, value - 0.01, value + 0.01) for name, value in metrics.items()},
        layers={}, l0_counts=torch.ones(4, dtype=torch.long), density=torch.full((sae.cfg.d_sae,), 0.5).double(),
        alive_curve=((1000, sae.cfg.d_sae),), resamples={},
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(hub: HubServer, tmp_path: Path, architecture: str):
    sae = an_sae(architecture)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    push_to_hub(sae, REPO, sae_id="layer_1")
    # The SAE that was given is not changed by what its export folds.
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    expected = inference_form(sae, tmp_path / "folder")
    assert same(SAE.from_pretrained(REPO, "layer_1"), expected)
    loaded = load_pretrained(REPO, "layer_1")
    assert same(loaded, expected)
    x = torch.randn(5, sae.cfg.d_in)
    assert torch.equal(loaded(x), expected(x))


def test_with_xet_on_as_in_production(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hub.upload_mode = lambda _path, _size: "regular"
    online(monkeypatch, hub, tmp_path / "xet", xet=True)
    push_to_hub(an_sae(), REPO)
    assert same(SAE.from_pretrained(REPO, HOOK), inference_form(an_sae(), tmp_path / "folder"))
    assert not push_to_hub(an_sae(), REPO).is_new_commit


def test_all_of_it_in_one_commit(hub: HubServer, tmp_path: Path):
    an_sae(seed=1).save_inference_model(tmp_path / "on_disk")
    save_file({"sparsity": torch.zeros(32)}, tmp_path / "on_disk/sparsity.safetensors")
    saes = {"memory": an_sae(), "disk": tmp_path / "on_disk"}
    evaluation = an_evaluation(an_sae(), ce_loss_increase=0.1, l0=4.0, kl=0.2)
    push = push_to_hub(saes, REPO, evaluations={"memory": evaluation}, commit_message="Both", license="mit")
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2  # the Hub's initial one, and this
    assert repository.commits[str(push.commit)].message.startswith("Both")
    assert set(hub.files(REPO)) == {
        ".gitattributes", "README.md", "figures/pareto.png",
        *(f"memory/{name}" for name in ("cfg.json", "sae_weights.safetensors", "evaluation.json", "checksums.sha256")),
        *(f"disk/{name}" for name in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "checksums.sha256")),
    }  # fmt: skip
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.to_dict()["library_name"] == "saelens"
    assert card.data.to_dict()["license"] == "mit"
    assert "+0.1000" in card.text
    assert "figures/pareto.png" in card.text
    card.validate()
    assert str(push).startswith("Pushed ")
    assert f"to {hub.url}/{REPO}" in str(push)


def test_checksums_are_those_of_sha256sum(hub: HubServer, tmp_path: Path):
    push_to_hub(an_sae(), REPO, sae_id="a")
    for path, content in hub.files(REPO).items():
        if path.startswith("a/"):
            (tmp_path / Path(path).name).write_bytes(content)
    subprocess.run(
        ["sha256sum", "--check", "--strict", "checksums.sha256"], cwd=tmp_path, check=True, capture_output=True
    )


def test_nothing_goes_up_twice(hub: HubServer):
    push_to_hub({"a": an_sae()}, REPO)
    n = len(hub.uploads)
    again = push_to_hub({"a": an_sae()}, REPO)
    assert not again.is_new_commit
    assert {change for change, _ in again.files.values()} == {"unchanged"}
    assert "nothing to do" in str(again)
    more = push_to_hub({"a": an_sae(), "b": an_sae(seed=1)}, REPO)
    assert more.files["a/sae_weights.safetensors"][0] == "unchanged"
    assert more.files["b/sae_weights.safetensors"][0] == "new"
    assert more.files["README.md"][0] == "changed"
    assert len(hub.uploads) == n + 1


def test_what_is_there_stays(hub: HubServer):
    hub.create(
        REPO,
        files={
            "README.md": b"---\nlicense: apache-2.0\ntags: [mine]\n---\n# My SAEs\n\nHands off.\n",
            "notes.txt": b"x",
        },
    )
    push_to_hub({"first": an_sae()}, REPO, evaluations=an_evaluation(an_sae(), ce_loss_increase=0.125, l0=3.0))
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.to_dict()["license"] == "apache-2.0"
    push_to_hub({"second": an_sae(seed=1)}, REPO, license="mit")
    files = hub.files(REPO)
    assert ModelCard(files["README.md"].decode()).data.to_dict()["license"] == "mit"
    assert files["notes.txt"] == b"x"
    card = ModelCard(files["README.md"].decode())
    assert card.text.lstrip().startswith("# My SAEs\n\nHands off.\n")
    assert "| first |" in card.text
    assert "+0.1250" in card.text  # what was measured of the first one is still said
    assert "| second |" in card.text
    assert {"mine", "saelens"} <= set(card.data.to_dict()["tags"])
    assert "first/sae_weights.safetensors" in files


def test_other_weights_under_the_same_id(hub: HubServer):
    first = push_to_hub({"a": an_sae()}, REPO, evaluations=an_evaluation(an_sae(), ce_loss_increase=0.1, l0=3.0))
    before = hub.snapshot()
    with pytest.raises(ValueError, match=r"other SAEs with the ids \['a'\].*overwrite=True"):
        push_to_hub({"a": an_sae(seed=1), "b": an_sae(seed=2)}, REPO)
    assert hub.snapshot() == before
    push = push_to_hub({"a": an_sae(seed=1)}, REPO, overwrite=True)
    assert push.files["a/evaluation.json"][0] == "removed"  # of the weights that were replaced
    assert "a/evaluation.json" not in hub.files(REPO)
    assert "+0.1" not in hub.files(REPO)["README.md"].decode()
    assert first.commit in hub.repositories[REPO].commits


def test_a_file_in_the_place_of_a_folder(hub: HubServer):
    hub.create(REPO, files={"notes": b"x"})
    before = hub.snapshot()
    with pytest.raises(ValueError, match="has a file 'notes'"):
        push_to_hub({"notes/a": an_sae()}, REPO)
    assert hub.snapshot() == before


def test_private(hub: HubServer):
    push_to_hub(an_sae(), REPO, private=True)
    assert hub.repositories[REPO].private
    push_to_hub(an_sae(), REPO, private=True)
    push_to_hub(an_sae(), "someone/public")
    before = hub.snapshot()
    with pytest.raises(ValueError, match="is public"):
        push_to_hub(an_sae(seed=1), "someone/public", private=True, overwrite=True)
    assert hub.snapshot() == before


def test_a_branch(hub: HubServer):
    push_to_hub({"a": an_sae()}, REPO, revision="dev")  # repository and branch are made
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert same(load_pretrained(REPO, "a", revision="dev"), load_pretrained(f"{REPO}@dev", "a"))
    card = hub.files(REPO, "dev")["README.md"].decode()
    assert 'load_pretrained("someone/saes", "a", revision="dev")' in card
    push_to_hub({"b": an_sae(seed=1)}, REPO, revision="dev")
    assert {"a/cfg.json", "b/cfg.json"} < set(hub.files(REPO, "dev"))


def test_a_pull_request(hub: HubServer):
    hub.create("other/saes", files={"README.md": b"# Theirs\n"})
    before = hub.files("other/saes")
    push = push_to_hub({"a": an_sae()}, "other/saes", create_pr=True)
    assert "/discussions/" in push.url
    assert hub.files("other/saes") == before
    (request,) = hub.repositories["other/saes"].pull_requests
    assert "a/cfg.json" in hub.files("other/saes", request)
    assert same(
        load_pretrained("other/saes", "a", revision=request), load_pretrained("other/saes", "a", revision=push.commit)
    )


def test_a_dry_run_asks_nothing(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    online(monkeypatch, hub, tmp_path / "nobody", token=None)
    push = push_to_hub({"a": an_sae()}, REPO, dry_run=True)
    assert hub.requests == []
    assert push.commit is None
    assert not push.is_new_commit
    assert {"a/sae_weights.safetensors", "README.md"} < set(push.files)
    assert "Would push" in str(push)
    assert 'SAE.from_pretrained("someone/saes", "a")' in push.card


def test_folders(hub: HubServer, tmp_path: Path):
    for number, name in enumerate(("local", "e2e")):
        an_sae(seed=number).save_inference_model(tmp_path / "sweep" / name)
    (tmp_path / "sweep/failed").mkdir()
    (tmp_path / "sweep/failed/failed.json").write_text("{}")
    push_to_hub(tmp_path / "sweep", REPO)
    assert {path.partition("/")[0] for path in hub.files(REPO) if path.endswith("cfg.json")} == {"local", "e2e"}
    push_to_hub(str(tmp_path / "sweep/local"), REPO, overwrite=True)
    assert f"{HOOK}/cfg.json" in hub.files(REPO)  # SAELens's custom


def test_an_evaluation_and_a_run_beside_the_sae(hub: HubServer, tmp_path: Path):
    sae = inference_form(an_sae(), tmp_path / "a")
    an_evaluation(sae, ce_loss_increase=0.25, l0=4.0).save(tmp_path / "a/evaluation.json")
    inference_form(an_sae(seed=1), tmp_path / "b")
    lines = [
        {"step": 1, "metrics/ce_loss_increase": 0.9},
        {"step": 2, "metrics/ce_loss_increase": 0.375, "metrics/held_out_l0": 5.5},
    ]
    (tmp_path / "b/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "met')
    push_to_hub({"a": tmp_path / "a", "b": tmp_path / "b"}, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert all(number in card for number in ("+0.2500", "+0.3750", "5.5"))
    assert "+0.9" not in card


def damaged(tmp_path: Path, name: str, content: bytes) -> Path:
    inference_form(an_sae(), tmp_path / "sae")
    (tmp_path / "sae" / name).write_bytes(content)
    return tmp_path / "sae"


def not_finite(tmp_path: Path) -> Path:
    inference_form(an_sae(), tmp_path / "sae")
    weights = load_file(tmp_path / "sae/sae_weights.safetensors")
    weights["W_dec"][0, 0] = float("nan")
    save_file(weights, tmp_path / "sae/sae_weights.safetensors")
    return tmp_path / "sae"


def without_metadata(tmp_path: Path) -> TrainingSAE[Any]:
    return training_sae(runner_config("topk"))


def without_model(tmp_path: Path) -> TrainingSAE[Any]:
    sae = an_sae()
    sae.cfg.metadata.model_name = None
    return sae


def not_folded(tmp_path: Path) -> TrainingSAE[Any]:
    sae = an_sae()
    sae.cfg.normalize_activations = "expected_average_only_in"
    return sae


def of_another_sae(tmp_path: Path) -> Path:
    sae = inference_form(an_sae(), tmp_path / "sae")
    other = an_evaluation(sae, l0=1.0)
    object.__setattr__(other, "hook_name", "blocks.0.hook_resid_pre")
    other.save(tmp_path / "sae/evaluation.json")
    return tmp_path / "sae"


REFUSED = {
    "nothing": (lambda _: {}, "the mapping is empty"),
    "a number": (lambda _: 3, "got 3"),
    "no folder": (lambda p: p / "missing", "there is no such folder"),
    "empty folder": (lambda p: p, r"holds no SAE, nor does a folder in it"),
    "weights cut": (lambda p: damaged(p, "sae_weights.safetensors", b"\0" * 40), "SAELens cannot load it"),
    "config cut": (lambda p: {"a": damaged(p, "cfg.json", b'{"archi')}, "cfg.json cannot be read"),
    "config of another shape": (lambda p: {"a": damaged(p, "cfg.json", b"[]")}, "no JSON object"),
    "sparsity damaged": (lambda p: damaged(p, "sparsity.safetensors", b"x"), "sparsity.safetensors is damaged"),
    "evaluation damaged": (lambda p: damaged(p, "evaluation.json", b"{}"), "is no evaluation"),
    "evaluation of another": (of_another_sae, "its evaluation is of another SAE: hook_name"),
    "not finite": (not_finite, "its W_dec is not finite"),
    "no hook": (without_metadata, "name no hook"),
    "no model": (without_model, "metadata lack model_name"),
    "not folded": (not_folded, "not folded"),
    "id that leaves the repository": (lambda _: {"../a": an_sae()}, "cannot be an SAE's id"),
    "hidden id": (lambda _: {".git": an_sae()}, "cannot be an SAE's id"),
    "empty id": (lambda _: {"": an_sae()}, "cannot be an SAE's id"),
    "id with a space": (lambda _: {"my sae": an_sae()}, "cannot be an SAE's id"),
    "ids of one folder": (lambda _: {"a": an_sae(), "A": an_sae(seed=1)}, "two SAEs with the id 'a'"),
    "the card's place": (lambda _: {"README.md": an_sae()}, "that the repository has besides"),
    "the figures' place": (lambda _: {"Figures/a": an_sae()}, "that the repository has besides"),
    "another SAE's file": (lambda _: {"a": an_sae(), "a/cfg.json": an_sae()}, "that the repository has besides"),
    "a very long id": (lambda _: {"a" * 300: an_sae()}, "too long"),
    "several at once": (lambda p: {"a": not_finite(p), "../b": an_sae()}, r"(?s)cannot be an SAE's id.*not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_request(hub: HubServer, tmp_path: Path, case: str):
    make, message = REFUSED[case]
    saes: Any = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        push_to_hub(saes, REPO)
    assert hub.requests == []


@pytest.mark.parametrize(
    "repo_id", ["saes", "a/b/c", "some one/saes", "someone/sa--es", "someone/", "/saes", "someone/saes.git"]
)
def test_a_name_that_is_no_repository(hub: HubServer, repo_id: str):
    with pytest.raises(ValueError, match="repo_id"):
        push_to_hub(an_sae(), repo_id)
    assert hub.requests == []


def test_settings_without_meaning(hub: HubServer, tmp_path: Path):
    for seed, name in enumerate("ab"):
        inference_form(an_sae(seed=seed), tmp_path / name)
    with pytest.raises(ValueError, match="sae_id='x' has no meaning"):
        push_to_hub(tmp_path, REPO, sae_id="x")
    with pytest.raises(ValueError, match="One evaluation was given for 2"):
        push_to_hub(tmp_path, REPO, evaluations=an_evaluation(an_sae(), l0=1.0))
    with pytest.raises(ValueError, match="evaluation of 'c', but no such SAE"):
        push_to_hub(tmp_path, REPO, evaluations={"c": an_evaluation(an_sae(), l0=1.0)})
    revision: Any
    for revision in ("", " ", "bad branch", "-x", "a..b", "a/", "x.lock", "deadbeef", "0" * 40, 3):
        with pytest.raises(ValueError, match="revision="):
            push_to_hub(tmp_path, REPO, revision=revision)
    license: Any
    for license in ("", "not a licence: [x", "MIT", 3):
        with pytest.raises(ValueError, match="license="):
            push_to_hub(tmp_path, REPO, license=license)
    with pytest.raises(ValueError, match="commit_message must not be empty"):
        push_to_hub(tmp_path, REPO, commit_message=" ")
    assert hub.requests == []


def test_a_readme_that_cannot_be_added_to(hub: HubServer):
    for content, message in ((b"\xff\xfe\x00", "not UTF-8"), (b"---\na: [\n---\n", "YAML")):
        hub.create(REPO, files={"README.md": content})
        before = hub.snapshot()
        with pytest.raises(ValueError, match=message):
            push_to_hub(an_sae(), REPO)
        assert hub.snapshot() == before


def test_a_branch_that_cannot_be_made(hub: HubServer):
    hub.create(REPO)
    with pytest.raises(HubError, match="refs/pr/7"):
        push_to_hub(an_sae(), REPO, revision="refs/pr/7")


def test_the_command(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inference_form(an_sae(), tmp_path / "x")
    inference_form(an_sae(seed=1), tmp_path / "lr=0.1")
    assert main(["push", REPO, str(tmp_path / "x"), "--dry-run"]) == 0
    card, _, files = capsys.readouterr().out.partition("Would push")
    assert card.startswith("The model card, for a repository that is new:\n\n---\n")
    assert all(line.endswith("planned") for line in files.splitlines()[1:])  # the list is what stays in sight
    assert hub.requests == []
    assert (
        main(["push", REPO, f"first={tmp_path / 'x'}", str(tmp_path / "lr=0.1"), "--private", "--license", "mit"]) == 0
    )
    assert "Pushed" in capsys.readouterr().out
    assert {"first/cfg.json", "lr=0.1/cfg.json"} < set(hub.files(REPO))
    assert hub.repositories[REPO].private
    for flags, status, words in (
        ([REPO, str(tmp_path / "missing")], 2, "no such folder"),
        ([REPO, "a=missing", str(tmp_path / "x")], 2, "no folder 'missing'"),
        ([REPO, f"a={tmp_path / 'x'}", f"a={tmp_path / 'lr=0.1'}"], 2, "Two SAEs have the id 'a'"),
        (["other/saes", str(tmp_path / "x")], 1, "may not do that"),
    ):
        assert main(["push", *flags]) == status
        assert words in capsys.readouterr().err
