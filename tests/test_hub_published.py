"""The published SAEs: the table, where SAELens has them, and what loading one adds to its metadata."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from hub_server import HubServer
from hub_server import hub_fixture as hub_fixture
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import save

from e2e_sae_plugin.command_line.hub_flags import pretrained_parser
from e2e_sae_plugin.comparison.subjects import subject
from e2e_sae_plugin.finetune.lineage import OF_THE_ORIGINAL
from e2e_sae_plugin.finetune.start import load_sae, same_weights
from e2e_sae_plugin.hub import calls
from e2e_sae_plugin.hub.load import load_pretrained
from e2e_sae_plugin.hub.pretrained_command import pretrained_command
from e2e_sae_plugin.hub.published import list_pretrained, published_saes
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.presets import paper_config

NAME = "e2e-sae-gpt2-small"
ROWS = published_saes()
PAPER_WORDS = {"local": "l", "e2e": "e", "e2e+ds": "efr"}


def published_files(folder: str, layer: int, seed: int = 0) -> dict[str, bytes]:
    """A small SAE in the form that the published ones have: SAELens's before version 6."""
    torch.manual_seed(seed)
    shapes = {"W_enc": (4, 8), "W_dec": (8, 4), "b_enc": (8,), "b_dec": (4,)}
    cfg = {
        "d_in": 4, "d_sae": 8, "dtype": "torch.float32", "device": "cuda", "model_name": "gpt2-small",
        "hook_point": f"blocks.{layer}.hook_resid_pre", "hook_point_layer": layer, "hook_point_head_index": None,
        "activation_fn_str": "relu", "apply_b_dec_to_input": False, "finetuning_scaling_factor": False,
        "prepend_bos": False, "dataset_path": "Skylion007/openwebtext", "context_size": 1024,
        "normalize_activations": "none", "sae_lens_training_version": None,
    }  # fmt: skip
    weights = save({name: torch.rand(shape) for name, shape in shapes.items()})
    return {f"{folder}/cfg.json": json.dumps(cfg).encode(), f"{folder}/sae_weights.safetensors": weights}


@pytest.fixture
def published_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """All 18, with different weights."""
    monkeypatch.setattr(calls, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    for seed, row in enumerate(ROWS):
        listed = get_pretrained_saes_directory()[row.release]
        files = published_files(listed.saes_map[row.sae_id], row.layer, seed)
        if listed.repo_id in hub.repositories:
            hub.commit(listed.repo_id, files)
        else:
            hub.create(listed.repo_id, files)
    return hub


def test_the_table_is_in_the_directory_of_saelens():
    directory = get_pretrained_saes_directory()
    releases = {name for name in directory if name.startswith("gpt2-small-res_s") and name.endswith("-ajt")}
    assert releases == {row.release for row in ROWS}
    ids = {(name, sae_id) for name in releases for sae_id in directory[name].saes_map}
    assert ids == {(row.release, row.sae_id) for row in ROWS}
    assert len(ROWS) == len(ids) == 18
    for row in ROWS:
        listed = directory[row.release]
        matching = {"ce": "sc", "l0": "sl"}[row.matched]
        assert row.release == f"gpt2-small-res_{matching}{PAPER_WORDS[row.kind]}-ajt"
        assert listed.repo_id == f"neuronpedia/gpt2-small__{row.release.removeprefix('gpt2-small-')}"
        assert listed.model == "gpt2-small"
        assert row.sae_id == f"blocks.{row.layer}.hook_resid_pre"
        assert listed.saes_map[row.sae_id] == f"{row.layer}-{row.release.removeprefix('gpt2-small-')}"
        assert listed.conversion_func is None


def test_the_same_run_under_both_matchings():
    by_name = {(row.layer, row.kind, row.matched): row for row in ROWS}
    aliases = {key: row.same_run_as for key, row in by_name.items() if row.same_run_as}
    assert aliases == {
        (6, "e2e+ds", "l0"): "gpt2-small-res_scefr-ajt",
        (10, "e2e", "l0"): "gpt2-small-res_sce-ajt",
        (10, "e2e+ds", "l0"): "gpt2-small-res_scefr-ajt",
    }
    numbers = ("sparsity_coefficient", "l0", "alive", "ce_loss_increase")
    for (layer, kind, _), release in aliases.items():
        first, second = by_name[layer, kind, "ce"], by_name[layer, kind, "l0"]
        assert first.release == release
        assert [getattr(first, n) for n in numbers] == [getattr(second, n) for n in numbers]


def test_the_printed_table():
    lines = str(list_pretrained(layer=6)).splitlines()
    assert lines[0].split() == [
        "layer", "kind", "matched", "L0", "alive", "CE", "loss", "increase", "lambda", "release", "id", "same", "run", "as",
    ]  # fmt: skip
    assert lines[5].split() == [
        "6", "e2e+ds", "ce", "36.8", "15k", "+0.124", "50", "gpt2-small-res_scefr-ajt", "blocks.6.hook_resid_pre",
    ]  # fmt: skip
    assert len(str(list_pretrained()).splitlines()) == 19
    markdown = list_pretrained(layer=6).to_markdown().splitlines()
    assert markdown[2].startswith("| 6 | local | ce | 69.4 | 26k | +0.144 | 4 | gpt2-small-res_scl-ajt |")
    assert {line.count("|") for line in markdown} == {11}


def test_what_is_not_there_is_answered_with_what_is():
    with pytest.raises(
        ValueError, match=r"no published SAE with layer=5.*layer one of 2, 6, 10; kind one of 'local', 'e2e"
    ):
        list_pretrained(layer=5)
    with pytest.raises(ValueError, match=r"has 2 such SAEs\. Give matched: .*matched one of 'ce', 'l0'"):
        load_pretrained(NAME, layer=2, kind="e2e")
    with pytest.raises(ValueError, match=r"has 18 such SAEs\. Give layer and kind and matched"):
        load_pretrained(NAME)
    with pytest.raises(ValueError, match="asked for by layer, kind and matched, not by sae_id='x'"):
        load_pretrained(NAME, "x", layer=6)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.layer}-{row.kind}-{row.matched}")
def test_every_one_is_loaded_with_what_it_needs_to_be_used(row: Any, published_hub: HubServer):
    sae = load_pretrained(NAME, layer=row.layer, kind=row.kind, matched=row.matched)
    theirs = SAE.from_pretrained(row.release, row.sae_id)
    assert same_weights(sae, theirs)
    metadata = sae.cfg.metadata
    assert metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}
    assert (metadata.kind, metadata.sparsity) == (row.kind, row.sparsity_coefficient)
    assert metadata.objective == paper_config(row.layer, row.kind, row.matched).objective.to_dict()
    Objective.from_dict(metadata.objective)
    assert metadata.hook_name == f"blocks.{row.layer}.hook_resid_pre"
    listed = get_pretrained_saes_directory()[row.release]
    assert metadata.loaded_from["repo_id"] == listed.repo_id
    assert (subject("x", sae).kind, subject("x", sae).setting) == (row.kind, f"{row.sparsity_coefficient:g}")
    metadata.model_from_pretrained_kwargs = theirs.cfg.metadata.model_from_pretrained_kwargs
    assert metadata.to_dict().items() >= theirs.cfg.metadata.to_dict().items()


def test_by_release_by_repository_and_by_a_run_s_only_name(published_hub: HubServer):
    by_name = load_pretrained(NAME, layer=6, kind="e2e+ds", matched="ce")
    by_release = load_sae("gpt2-small-res_scefr-ajt", "blocks.6.hook_resid_pre")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host's advice to give the release's name
        by_repository = load_pretrained("neuronpedia/gpt2-small__res_scefr-ajt", "6-res_scefr-ajt")
    for each in (by_release, by_repository, load_pretrained(NAME, layer=6, kind="e2e+ds")):
        assert same_weights(each, by_name)
        for name in ("model_from_pretrained_kwargs", "kind", "sparsity", "objective"):
            assert each.cfg.metadata[name] == by_name.cfg.metadata[name] is not None


def test_what_an_old_config_says_of_the_model_is_replaced(published_hub: HubServer):
    repo_id, name = "neuronpedia/gpt2-small__res_sce-ajt", "2-res_sce-ajt/cfg.json"
    cfg = json.loads(published_hub.files(repo_id)[name])
    cfg["model_from_pretrained_kwargs"] = {"center_writing_weights": False}
    published_hub.commit(repo_id, {name: json.dumps(cfg).encode()})
    sae = load_pretrained(NAME, layer=2, kind="e2e", matched="ce")
    assert sae.cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}


def test_the_same_run_is_taken_where_a_page_is_missing(published_hub: HubServer):
    del published_hub.repositories["neuronpedia/gpt2-small__res_slefr-ajt"]
    sae = load_pretrained(NAME, layer=10, kind="e2e+ds", matched="l0")
    assert sae.cfg.metadata.loaded_from["repo_id"] == "neuronpedia/gpt2-small__res_scefr-ajt"
    assert sae.cfg.metadata.kind == "e2e+ds"
    with pytest.raises(calls.HubError, match="no such repository"):
        load_pretrained(NAME, layer=2, kind="e2e+ds", matched="l0")


def test_others_are_left_as_they_are(hub: HubServer):
    hub.create("someone/saes", published_files("6-res_scefr-ajt", 6))
    metadata = load_pretrained("someone/saes").cfg.metadata
    assert (metadata.kind, metadata.sparsity, metadata.objective) == (None, None, None)
    assert metadata.model_from_pretrained_kwargs is None


def test_a_fine_tuned_one_is_no_longer_of_its_kind():
    assert {"kind", "loaded_from"} <= set(OF_THE_ORIGINAL)


def test_the_command(capsys: pytest.CaptureFixture[str]):
    pretrained_command(pretrained_parser().parse_args(["--layer", "6", "--kind", "e2e", "--matched", "ce"]))
    shown = capsys.readouterr().out
    assert shown.startswith(str(list_pretrained(6, "e2e", "ce")))
    assert 'load_pretrained("e2e-sae-gpt2-small", layer=6, kind="e2e", matched="ce")' in shown
    assert "e2e-sae evaluate gpt2-small-res_sce-ajt:blocks.6.hook_resid_pre --dataset apollo-research/" in shown
    pretrained_command(pretrained_parser().parse_args(["--json"]))
    assert json.loads(capsys.readouterr().out) == [row.to_dict() for row in ROWS]
    with pytest.raises(ValueError, match="kind='sae'"):
        list_pretrained(kind="sae")
