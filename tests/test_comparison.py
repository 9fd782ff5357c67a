"""`compare` and its report on tiny SAEs: what is grouped, measured, kept, drawn and refused."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import D_MODEL, runner_config, tiny_hooked_transformer, tiny_tokenizer, token_batch, training_sae
from sae_lens import SAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig
from test_findings import made_up

from e2e_sae_plugin.comparison import Comparison, Subject, compare, load_subjects, write_comparison
from e2e_sae_plugin.comparison.charts import pareto_charts, ratio_chart, short_hook
from e2e_sae_plugin.comparison.compare import file_stem
from e2e_sae_plugin.comparison.report import comparison_report
from e2e_sae_plugin.comparison.subjects import check_finite, check_same_model, kind_of, ordered_kinds, subject
from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.hub.published import (
    published,
    published_at,
    published_l2_ratios_at,
    published_saes,
)
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.presets import PAPER_LAMBDA
from e2e_sae_plugin.report.page import markdown, page

COMPARE_MODULE = importlib.import_module("e2e_sae_plugin.comparison.compare")  # the package shows its function
HOOK = "blocks.1.hook_resid_pre"
KINDS = {"local": 1.0, "e2e": 0.5, "e2e+ds": 0.7}
"""Kind -> how far its directions are off; only that they differ matters here."""


def made_up_sae(
    kind: str = "local",
    sparsity: float | None = 1.0,
    seed: int | None = 0,
    *,
    d_in: int = D_MODEL,
    d_sae: int = 32,
    hook_name: str | None = HOOK,
    model_name: str | None = "tiny",
    labelled: str | None = "",
    **metadata: Any,
) -> SAE[Any]:
    """A standard SAE: the encoder is the decoder's transpose, and the higher `sparsity`, the fewer features fire.

    Args:
        labelled: the kind that its metadata say, where that is another.
    """
    sae = SAE.from_dict(StandardSAEConfig(d_in=d_in, d_sae=d_sae).to_dict())
    generator = torch.Generator().manual_seed(1000 * (seed or 0) + list(KINDS).index(kind))
    directions = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    put(sae, W_dec=directions * KINDS[kind], W_enc=directions.T, b_enc=-(sparsity or 1.0), b_dec=0.0)
    entries = {
        "kind": kind if labelled == "" else labelled,
        "sparsity": sparsity,
        "seed": seed,
        "hook_name": hook_name,
        "exclude_special_tokens": False,
        "model_name": model_name,
    }
    for name, value in {**entries, **metadata}.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


@torch.no_grad()
def put(sae: SAE[Any], **values: float | torch.Tensor) -> None:
    """Overwrite parameters."""
    for name, value in values.items():
        getattr(sae, name).copy_(torch.as_tensor(value))


def dead_sae(kind: str = "e2e", seed: int = 0) -> SAE[Any]:
    sae = made_up_sae(kind, 99.0, seed)
    put(sae, b_enc=-1e6)
    return sae


def made_up_sweep(**settings: Any) -> dict[str, SAE[Any]]:
    """Three kinds x two sparsities x two seeds."""
    return {
        f"{kind}-{sparsity:g}-seed{seed}": made_up_sae(kind, sparsity, seed, **settings)
        for kind in KINDS
        for sparsity in (0.5, 1.5)
        for seed in (0, 1)
    }


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_hooked_transformer()
    model.tokenizer = tiny_tokenizer()
    return model


def sampled_tokens() -> torch.Tensor:
    """Of the tiny model's own text, on which any SAE costs it something: `[24, 8]`."""
    generator = torch.Generator().manual_seed(0)
    tokens, model = token_batch(24, 1), tiny_hooked_transformer()
    with torch.no_grad():
        while tokens.shape[1] < 8:
            probabilities = model(tokens)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, probabilities.multinomial(1, generator=generator)], 1)
    return tokens


TOKENS = sampled_tokens()


@pytest.fixture(scope="module")
def whole(model: Any) -> Comparison:
    return compare(made_up_sweep(), model, TOKENS, n_cards=2, n_exact=2)


# Subjects.


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        (None, "local"),
        (Objective(kl=0, mse=1).to_dict(), "local"),
        (Objective(kl=1).to_dict(), "e2e"),
        (Objective(kl=0.5, beta=0.01).to_dict(), "e2e+ds"),
        (Objective(kl=1, mse=1).to_dict(), "e2e+mse"),
        (Objective(kl=1, beta=0.1, mse=0.1).to_dict(), "e2e+ds+mse"),
        (Objective(kl=0, beta=0.1).to_dict(), "ds"),
        ({"kl": 1.0}, "e2e"),
    ],
)
def test_the_kind_comes_from_the_objective(objective: dict[str, Any] | None, kind: str):
    assert kind_of(made_up_sae(labelled=None, objective=objective)) == kind


def test_a_sweeps_kind_wins_over_the_objective_and_a_label_over_both():
    sae = made_up_sae("e2e+ds", objective=Objective().to_dict())
    assert kind_of(sae) == "e2e+ds"
    assert subject("x", sae, "mine").kind == "mine"


def test_the_setting_is_the_sparsity_from_metadata_or_config_or_the_name():
    assert subject("a", made_up_sae(sparsity=0.25, seed=3)).setting == "0.25"
    assert subject("a", made_up_sae(seed=3)).seed == 3
    assert subject("a", made_up_sae(sparsity=None, seed=None)).setting == "a"
    assert subject("a", made_up_sae(seed=None)).seed is None
    topk = SAE.from_dict(TopKSAEConfig(d_in=D_MODEL, d_sae=32, k=4).to_dict())
    assert subject("a", topk).setting == "4"
    assert subject("a", training_sae(runner_config("standard"))).setting == "0.01"


def test_the_papers_kinds_come_first():
    subjects = [subject(k, made_up_sae(), k) for k in ("zeta", "e2e+ds", "alpha", "local", "e2e", "e2e")]
    assert ordered_kinds(subjects) == ["local", "e2e", "e2e+ds", "alpha", "zeta"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    made_up_sae("local").save_model("one")
    for seed in (0, 1):
        made_up_sae("e2e", seed=seed).save_model(f"runs/e2e-seed{seed}")
    (tmp_path / "runs/notes").mkdir()
    made_up_sae("e2e+ds").save_model("lr=0.1")
    (tmp_path / "empty").mkdir()
    return tmp_path


def names_and_kinds(*sources: str) -> list[tuple[str, str]]:
    return [(each.name, each.kind) for each in load_subjects(sources)]


def test_folders_of_one_and_of_several_with_and_without_labels(folder: Path):
    runs = [("e2e-seed0", "e2e"), ("e2e-seed1", "e2e")]
    assert names_and_kinds("one", "runs") == [("one", "local"), *runs]
    assert names_and_kinds("runs/") == runs
    assert names_and_kinds(str(folder / "one")) == [("one", "local")]
    assert names_and_kinds("before=one", "after=runs/e2e-seed0") == [("before", "before"), ("after", "after")]
    assert names_and_kinds("mine=runs") == [("mine/e2e-seed0", "mine"), ("mine/e2e-seed1", "mine")]
    assert names_and_kinds("lr=0.1", "./lr=0.1", "x=lr=0.1") == [
        ("lr=0.1", "e2e+ds"),
        ("lr=0.1'", "e2e+ds"),
        ("x", "x"),
    ]
    assert names_and_kinds("one", "one") == [("one", "local"), ("one'", "local")]


def test_the_folder_one_stands_in_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder / "one")
    assert names_and_kinds(".") == [("one", "local")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "There is no folder 'nowhere'. Expected a folder, or RELEASE:SAE_ID"),
        ("a=nowhere", "There is no folder 'nowhere'"),
        ("=one", "There is no folder '=one'"),
        ("empty", "The folder 'empty' holds no SAE, nor does a folder in it. Supported formats: SAELens"),
    ],
)
def test_sources_without_an_sae_are_refused(folder: Path, source: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_subjects([source])
    with pytest.raises(ValueError, match="There is no SAE to compare"):
        load_subjects([])


def test_a_release_is_asked_for_by_name_and_id(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str]] = []

    def load_pretrained(release: str, sae_id: str, device: str) -> SAE[Any]:
        asked.append((release, sae_id))
        return made_up_sae()

    monkeypatch.setattr("e2e_sae_plugin.finetune.start.load_pretrained", load_pretrained)
    found = load_subjects(
        ["gpt2-small-res-jb:blocks.6.hook_resid_pre", "mine=me/my-saes:layer_6/k=4", "me/my-saes@v=2:layer_6"]
    )
    assert asked == [
        ("gpt2-small-res-jb", "blocks.6.hook_resid_pre"), ("me/my-saes", "layer_6/k=4"), ("me/my-saes@v=2", "layer_6"),
    ]  # fmt: skip
    assert [each.name for each in found] == [
        "gpt2-small-res-jb:blocks.6.hook_resid_pre", "mine", "me/my-saes@v=2:layer_6",
    ]  # fmt: skip


def test_other_models_and_tokenizers_are_refused_and_silent_metadata_hide_nothing():
    def named(*names: str | None, **metadata: Any) -> list[Subject]:
        return [subject(f"sae{i}", made_up_sae(model_name=name, **metadata)) for i, name in enumerate(names)]

    check_same_model(named("gpt2", "gpt2-small", "openai-community/gpt2", None))
    check_same_model(named(None))
    for names in (("gpt2", "gpt2-medium"), (None, "gpt2", "pythia-70m")):
        with pytest.raises(ValueError, match=r"SAEs of different models cannot be compared as if equal\. Compare"):
            check_same_model(named(*names))
    silent, first, second = named("tiny", "tiny", "tiny")
    first.sae.cfg.metadata.tokenizer_sha256 = "aa"
    second.sae.cfg.metadata.tokenizer_sha256 = "bb"
    check_same_model([silent, first])
    with pytest.raises(ValueError, match=r"sae1 and sae2 were trained with different tokenizers.*Compare"):
        check_same_model([silent, first, second])


def test_weights_that_are_not_finite_are_refused():
    sae = made_up_sae()
    with torch.no_grad():
        sae.b_dec[3] = math.nan
    with pytest.raises(ValueError, match=r"broken: b_dec is not finite, so there is nothing to measure\. Train"):
        check_finite([subject("broken", sae)])


# Published numbers.


def test_the_papers_tables():
    """Tables 2 and 3, typed in apart: layer, kind -> (lambda, L0, alive / 1000, CE loss increase) matched by CE, by L0."""
    expected = {
        (2, "local"): ((0.8, 73.5, 41, 0.016), (4, 18.4, 18, 0.101)),
        (2, "e2e"): ((0.5, 33.4, 22, 0.020), (1.5, 18.6, 20, 0.043)),
        (2, "e2e+ds"): ((10, 36.2, 18, 0.015), (35, 17.9, 15, 0.039)),
        (6, "local"): ((4, 69.4, 26, 0.144), (6, 42.8, 21, 0.228)),
        (6, "e2e"): ((3, 27.5, 22, 0.145), (1.5, 39.7, 25, 0.099)),
        (6, "e2e+ds"): ((50, 36.8, 15, 0.124), (50, 36.8, 15, 0.124)),
        (10, "local"): ((6, 162.7, 33, 0.122), (10, 74.9, 28, 0.202)),
        (10, "e2e"): ((1.5, 62.3, 25, 0.131), (1.5, 62.3, 25, 0.131)),
        (10, "e2e+ds"): ((1.75, 70.2, 25, 0.144), (1.75, 70.2, 25, 0.144)),
    }
    rows = published_saes()
    assert len(rows) == 18
    for row in rows:
        numbers = expected[row.layer, row.kind][("ce", "l0").index(row.matched)]
        assert (row.sparsity_coefficient, row.l0, row.alive / 1000, row.ce_loss_increase) == numbers
    assert {(row.layer, row.kind, row.matched): row.sparsity_coefficient for row in rows} == PAPER_LAMBDA
    ratios = {(row["layer"], row["kind"]): (row["position_0"], row["later"]) for row in published()["l2_ratios"]}
    assert ratios == {
        (2, "local"): (1, 0.98), (2, "e2e"): (0.16, 0.67), (2, "e2e+ds"): (0.14, 0.74),
        (6, "local"): (1, 0.92), (6, "e2e"): (0.11, 0.31), (6, "e2e+ds"): (0.99, 0.56),
        (10, "local"): (1, 0.91), (10, "e2e"): (0.08, 0.15), (10, "e2e+ds"): (0.99, 0.32),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "gpt2-small", "openai-community/gpt2"])
def test_the_papers_runs_at_a_hook_come_once_each(name: str):
    counts = {layer: len(published_at(name, f"blocks.{layer}.hook_resid_pre")) for layer in range(12)}
    assert counts == {layer: {2: 6, 6: 5, 10: 4}.get(layer, 0) for layer in range(12)}
    assert published_l2_ratios_at(name, "blocks.6.hook_resid_pre")["e2e"] == (0.11, 0.31)


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        (None, "blocks.6.hook_resid_pre"),
        ("gpt2-medium", "blocks.6.hook_resid_pre"),
        ("e2e-sae-demo", "blocks.6.hook_resid_pre"),
        ("gpt2", "blocks.6.hook_resid_post"),
        ("gpt2", "blocks.16.hook_resid_pre"),
        ("gpt2", "transformer.h.5"),
    ],
)
def test_the_paper_has_nothing_of_other_places(name: str | None, hook: str):
    assert published_at(name, hook) == []
    assert published_l2_ratios_at(name, hook) == {}


# Comparisons.


def test_everything_is_measured_grouped_and_matched(whole: Comparison):
    assert list(whole.groups) == [(kind, setting) for kind in KINDS for setting in ("0.5", "1.5")]
    assert [each.seed for each in whole.groups["e2e", "1.5"]] == [0, 1]
    assert set(whole.evaluations) == set(made_up_sweep())
    assert {each.n_tokens for each in whole.evaluations.values()} == {TOKENS.numel()}
    assert list(whole.matched) == list(KINDS)
    assert set(whole.matched.values()) <= {"0.5", "1.5"}
    assert [each.title for each in whole.findings] == ["Pareto", "Pathways", "Geometry"]
    for (kind, _), geometry in whole.geometry.items():
        n_alive = sum(whole.evaluations[each.name].n_alive for each in whole.groups[kind, _])
        assert geometry.within.summary.n == n_alive
        assert geometry.cross_seed is not None
        assert len(geometry.cross_seed.pairs) == 2
        assert geometry.cross_seed.bimodality is not None
        if kind == "local":
            assert geometry.cross_type is None
        else:
            assert geometry.cross_type is not None
            assert len(geometry.cross_type.pairs) == 4
            assert geometry.cross_type.matched_cosine == pytest.approx(0.5, abs=0.3)
    assert list(whole.cards) == list(whole.importance) == [each.name for each in whole.subjects]
    for name, cards in whole.cards.items():
        assert 1 <= len(cards) <= 2
        assert [card.feature for card in cards] == whole.importance[name].ranked(len(cards))
        assert any(card.importance_is_exact for card in cards)
        assert cards[0].contexts


def increases(**by_kind: tuple[float, ...]) -> dict[str, str]:
    """Which of the settings "0", "1", ... are matched, given the CE loss increases at them."""
    sae = made_up_sae()
    subjects = {
        (kind, str(i)): (Subject(f"{kind}-{i}", sae, kind, str(i), 0),)
        for kind in by_kind
        for i in range(len(by_kind[kind]))
    }
    evaluations = {
        f"{kind}-{i}": made_up(f"{kind}-{i}", increase=value, l0=1.0, alive=1, mse={})
        for kind, values in by_kind.items()
        for i, value in enumerate(values)
    }
    return COMPARE_MODULE._matched_by_ce(subjects, evaluations)


def test_settings_of_like_ce_loss_increase_are_matched():
    assert increases(local=(0.1, 0.2, 0.4), e2e=(0.05, 0.11, 0.19)) == {"local": "1", "e2e": "2"}
    # Both are nearer to the middle of the range, 3.7, at 3.2 and 4.3; but most alike at the end.
    assert increases(local=(2.4, 4.3), e2e=(3.2, 4.2), ds=(2.6, 4.1)) == {"local": "1", "e2e": "1", "ds": "1"}
    # Dead dictionaries are all alike.
    assert increases(local=(0.1, 0.3, 9.0), e2e=(0.12, 0.25, 9.0)) == {"local": "1", "e2e": "1"}
    assert increases(local=(0.1, 0.2, 0.4)) == {"local": "1"}
    assert increases(local=(0.1, 0.2), e2e=(0.8, 0.9)) == {"local": "1", "e2e": "0"}  # nothing in common
    assert increases(local=(-0.001, 0.2), e2e=(0.1, 0.0)) == {"local": "0", "e2e": "1"}  # neither costs anything


def test_one_sae_by_itself(model: Any, tmp_path: Path):
    found = compare({"it": made_up_sae("e2e")}, model, TOKENS, n_cards=1)
    write_comparison(found, tmp_path)
    assert found.geometry["e2e", "1"].cross_seed is None
    assert found.geometry["e2e", "1"].cross_type is None
    assert found.matched == {"e2e": "1"}
    assert {each.verdict for each in found.findings} == {"cannot be told"}
    report = comparison_report(found)
    assert report.summary == ()
    assert [section.title for section in report.sections] == [
        "How much each keeps",
        "By the same pathway?",
        "Most important features",
    ]  # fmt: skip
    assert "1 SAE on" in report.subtitle
    check_text(report)


def test_kinds_of_ones_own_without_a_local_sae(model: Any):
    saes = [subject("before", made_up_sae("local"), "before"), subject("after", made_up_sae("e2e"), "after")]
    found = compare(saes, model, TOKENS, n_cards=0)
    assert [key for key, each in found.geometry.items() if each.cross_type or each.cross_seed] == []
    assert {each.verdict for each in found.findings} == {"cannot be told"}
    report = comparison_report(found)
    assert [table.name for table in report.tables] == [
        "saes", "agreement", "reconstruction", "layers", "layers_per_token", "l2_ratios", "geometry",
    ]  # fmt: skip
    assert report.summary == ()
    check_text(report)


@pytest.mark.slow
def test_a_dead_dictionary_gives_numbers_and_a_warning(model: Any, tmp_path: Path):
    saes = made_up_sweep() | {"dead": dead_sae(), "dead too": dead_sae(seed=1)}
    found = compare(saes, model, TOKENS, n_cards=1, cache=tmp_path)
    assert [text for text in found.warnings if "dead" in text and "No feature" in text]
    assert found.cards["dead"] == ()
    assert found.evaluations["dead"].value("l0") == 0
    assert math.isfinite(found.evaluations["dead"].value("ce_loss_increase"))
    across = found.geometry["e2e", "99"].cross_seed
    assert across is not None
    assert (across.summary.n, across.summary.mean, across.matched_cosine) == (0, None, None)
    check_text(comparison_report(found))
    write_comparison(found, tmp_path)
    assert len(list((tmp_path / "importance").iterdir())) == 14
    alone = compare({"dead": dead_sae()}, model, TOKENS, n_cards=1)
    check_text(comparison_report(alone))


def test_an_sae_that_costs_less_than_nothing_is_matched_and_drawn(whole: Comparison):
    """The CE loss increase of a very good SAE can come out below 0."""
    name = "e2e-0.5-seed0"
    evaluation = whole.evaluations[name]
    metrics = {**evaluation.metrics, "ce_loss_increase": Estimate(-0.01, -0.02, 0.01)}
    below = dataclasses.replace(evaluation, metrics=metrics)
    found = dataclasses.replace(whole, evaluations={**whole.evaluations, name: below})
    assert not pareto_charts(found, [])[0].y_log
    assert pareto_charts(whole, [])[0].y_log
    check_text(comparison_report(found))


@pytest.mark.slow
def test_names_of_any_kind(model: Any, tmp_path: Path):
    names = ["a/b", "a-b", "a:b", "release:blocks.1/x", "..", "ü `|` <b>"]
    saes = {name: made_up_sae("e2e", seed=i) for i, name in enumerate(names)}
    found = compare(saes, model, TOKENS[:4], n_cards=1, cache=tmp_path)
    written = write_comparison(found, tmp_path)
    assert len(list((tmp_path / "importance").iterdir())) == len(names)
    assert len(list((tmp_path / "evaluations").iterdir())) == len(names)
    assert all(path.is_file() and tmp_path in path.resolve().parents for path in written.values())
    assert "<b>" not in written["report.html"].read_text().split("<main")[1].split('<script type="application')[0]
    assert len({file_stem(name) for name in names}) == len(names)


def test_cards_for_some_and_for_unknown_ones(model: Any):
    saes = {"a": made_up_sae(), "b": made_up_sae(seed=1)}
    found = compare(saes, model, TOKENS, n_cards=1, cards_for=["b"])
    assert list(found.cards) == ["b"]
    with pytest.raises(ValueError, match=re.escape("cards_for names ['c'], which are not among the SAEs ['a', 'b']")):
        compare(saes, model, TOKENS, cards_for=["b", "c"])


def test_a_model_without_a_tokenizer_has_importance_and_no_cards(caplog: pytest.LogCaptureFixture):
    found = compare({"a": made_up_sae(), "b": made_up_sae(seed=1)}, tiny_hooked_transformer(), TOKENS, n_cards=1)
    assert found.cards == {}
    assert list(found.importance) == ["a", "b"]
    assert caplog.text.count("The model has no tokenizer, so there are no feature cards.") == 1


def test_a_training_sae_is_looked_at_as_it_is_exported(model: Any):
    sae = training_sae(runner_config("batchtopk"))
    sae.cfg.metadata.hook_name = HOOK
    put(sae, topk_threshold=0.5)
    found = compare({"it": sae}, model, TOKENS, n_cards=1)
    evaluation = found.evaluations["it"]
    assert torch.equal(found.importance["it"].density > 0, evaluation.alive)
    assert found.importance["it"].density.sum() == pytest.approx(evaluation.value("l0"), rel=1e-5)


# What is refused.


def test_the_same_sae_twice_is_refused_before_anything_is_measured(model: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(COMPARE_MODULE, "evaluate_many", lambda *_, **__: pytest.fail("measured"))
    every: tuple[dict[str, Any], ...] = ({}, {"sparsity": None, "seed": None})
    for settings in every:
        with pytest.raises(ValueError, match="a and b are one SAE, weight for weight: this would be a cross-seed"):
            compare({"a": made_up_sae(**settings), "b": made_up_sae(**settings)}, model, TOKENS)


def test_one_dictionary_in_two_kinds_has_cosines_of_one(model: Any):
    """Fine-tuned with its decoder frozen; or before and after."""
    tuned = made_up_sae("local", labelled="e2e+mse")
    put(tuned, W_enc=1.01 * tuned.W_enc)
    found = compare({"before": made_up_sae("local"), "after": tuned}, model, TOKENS, n_cards=0)
    across = found.geometry["e2e+mse", "1"].cross_type
    assert across is not None
    assert across.summary.median == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"hook_name": "blocks.2.hook_resid_pre"},
            "not at the same place of the model.*cannot be compared as if equal",
        ),
        ({"seqpos_slice": (1, None)}, "not at the same place"),
        ({"model_name": "gpt2"}, "SAEs of different models"),
        ({"d_in": 8}, "b has d_in=8, but the activations at 'blocks.1.hook_resid_pre' have 16 dimensions"),
    ],
)
def test_what_cannot_be_compared_is_refused(model: Any, second: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        compare({"a": made_up_sae(), "b": made_up_sae("e2e", **second)}, model, TOKENS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[:0], "there is nothing to measure on"),
        (TOKENS[0], "must be \\[n_prompts, pos\\]"),
        (TOKENS.float(), "must be a tensor of integer token ids"),
        (TOKENS.tolist(), "must be a tensor of integer token ids"),
        (TOKENS + 60, "the model knows 0 to 63"),
    ],
)
@pytest.mark.parametrize("cached", [True, False])
def test_tokens_that_cannot_be_measured_on_are_refused(
    model: Any, tokens: Any, message: str, cached: bool, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        compare({"a": made_up_sae()}, model, tokens, cache=tmp_path if cached else None)


def test_no_sae_and_two_of_one_name_are_refused(model: Any):
    with pytest.raises(ValueError, match="There is no SAE to compare"):
        compare({}, model, TOKENS)
    twice = [subject("a", made_up_sae()), subject("a", made_up_sae("e2e"))]
    with pytest.raises(ValueError, match=r"Two SAEs are named 'a'\. Give each a name of its own"):
        compare(twice, model, TOKENS)


# What is kept.


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is measured, in order."""
    names: list[str] = []
    evaluate_many = COMPARE_MODULE.evaluate_many

    def spy(saes: Any, *args: Any, **settings: Any) -> Any:
        names.extend(saes)
        return evaluate_many(saes, *args, **settings)

    monkeypatch.setattr(COMPARE_MODULE, "evaluate_many", spy)
    return names


def pair() -> dict[str, SAE[Any]]:
    return {"a/0": made_up_sae(), "b": made_up_sae("e2e")}


def test_what_was_measured_is_not_measured_again(model: Any, tmp_path: Path, measured: list[str]):
    first = compare(pair(), model, TOKENS, n_cards=0, cache=tmp_path)
    assert measured == ["a/0", "b"]
    second = compare(pair(), model, TOKENS.int(), n_cards=0, cache=tmp_path)
    assert measured == ["a/0", "b"]
    for name, evaluation in first.evaluations.items():
        assert second.evaluations[name].metrics == evaluation.metrics
        assert second.evaluations[name].name == name
    compare({**pair(), "c": made_up_sae(seed=1)}, model, TOKENS, n_cards=0, cache=tmp_path)
    assert measured == ["a/0", "b", "c"]


def test_the_text_is_the_one_that_was_named_last(model: Any, tmp_path: Path, measured: list[str]):
    for given, said in ((None, None), ("words", "words"), ("prose", "prose")):
        found = compare(pair(), model, TOKENS, n_cards=0, cache=tmp_path, text=given)
        assert {each.text for each in found.evaluations.values()} == {said}
        assert (f"sequences of {said};" in comparison_report(found).subtitle) == (said is not None)
    assert measured == ["a/0", "b"]
    assert compare(pair(), model, TOKENS, n_cards=0, text="words").evaluations["b"].text == "words"


def test_one_changed_weight_is_measured_again(model: Any, tmp_path: Path, measured: list[str], monkeypatch: Any):
    monkeypatch.setattr(COMPARE_MODULE, "fingerprint", lambda _: "a sample that misses it")
    monkeypatch.setattr("e2e_sae_plugin.comparison.subjects.fingerprint", id)
    compare(pair(), model, TOKENS, n_cards=0, cache=tmp_path)
    changed = pair()
    with torch.no_grad():
        changed["b"].W_dec[3, 3] += 1e-3
    compare(changed, model, TOKENS, n_cards=0, cache=tmp_path)
    assert measured == ["a/0", "b", "b"]


@pytest.mark.slow
def test_other_weights_settings_tokens_and_damaged_files_are_measured_again(
    model: Any, tmp_path: Path, measured: list[str]
):
    def again(saes: dict[str, SAE[Any]] | None = None, tokens: Any = TOKENS, **settings: Any) -> list[str]:
        compare(pair() if saes is None else saes, model, tokens, n_cards=0, cache=tmp_path, **settings)
        names = measured.copy()
        measured.clear()
        return names

    assert again() == ["a/0", "b"]
    changed = pair()
    with torch.no_grad():
        changed["b"].b_dec[0] += 1e-3
    assert again(changed) == ["b"]
    assert again() == ["b"]
    scaled = pair()
    scaled["b"].cfg.apply_b_dec_to_input = False  # the same weights, another function
    assert again(scaled) == ["b"]
    assert again() == ["b"]
    for tokens in (token_batch(24, 8, seed=1), TOKENS.reshape(12, 16), TOKENS):
        assert again(tokens=tokens) == ["a/0", "b"]
    assert again(seed=1) == ["a/0", "b"]
    assert again() == ["a/0", "b"]
    assert again(hook_name="blocks.2.hook_resid_pre") == ["a/0", "b"]
    assert again() == ["a/0", "b"]
    path = tmp_path / "evaluations/b.json"
    whole = path.read_text()
    content = json.loads(whole)
    damaged = [whole[:100], "", "[]", "null", "\x00", json.dumps({"key": content["key"]})]
    for name in ("metrics", "layers", "density", "alive_curve"):
        damaged.append(json.dumps({**content, "evaluation": {**content["evaluation"], name: [None]}}))
    for text in damaged:
        path.write_text(text)
        assert again() == ["b"], text[:80]
    assert again() == []


# The report.


def check_text(report: Any) -> None:
    """Finite numbers or dashes only."""
    for text in (markdown(report), page(report).split("<main")[1].split('<script type="application/json" id="dark')[0]):
        assert not re.search(r"(?<![a-z])(nan|inf|infinity)(?![a-z])", text, re.IGNORECASE)
        assert "None" not in text


def csv_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_report_has_every_table_and_chart(whole: Comparison, tmp_path: Path):
    report = comparison_report(whole, "Mine")
    assert report.title == "Mine"
    assert [table.name for table in report.tables] == [
        "saes", "agreement", "reconstruction", "ratios",
        "layers", "layers_per_token", "l2_ratios", "geometry", "modes", "verdicts", "findings",
    ]  # fmt: skip
    assert [section.title for section in report.sections] == [
        "How much each keeps", "By the same pathway?", "The same features?", "Most important features",
        "The paper's findings",
    ]  # fmt: skip
    assert [chart.name for chart in report.charts] == [
        "pareto_l0", "pareto_alive", "alive_curve",
        "downstream_mse", "explained_variance", "explained_variance_layernorm", "l2_ratio",
        "cosine_within", "cosine_cross_seed", "cosine_cross_type",
    ]  # fmt: skip
    assert report.groups == tuple(KINDS)
    check_text(report)
    written = write_comparison(whole, tmp_path / "out")
    assert {"report.html", "report.md", "tables/ratios.csv", "figures/pareto_l0.svg", "figures/pareto_l0.png"} <= set(
        written
    )
    rows = csv_rows(written["tables/saes.csv"])
    assert [row["SAE"] for row in rows] == [each.name for each in whole.subjects]
    first = whole.evaluations[rows[0]["SAE"]].metrics["ce_loss_increase"]
    assert first is not None
    assert float(rows[0]["CE loss increase_low"]) == first.low
    assert "nan" not in written["tables/geometry.csv"].read_text()
    importance = csv_rows(written["importance/e2e-0.5-seed0.csv"])
    assert len(importance) == 32
    layers = csv_rows(written["tables/layers.csv"])
    assert len(layers) == 3 * 2 * len(next(iter(whole.evaluations.values())).layers)
    assert layers[0]["hook"] == HOOK
    lengths = csv_rows(written["tables/l2_ratios.csv"])
    assert len([row for row in lengths if row["L2 ratio later"]]) == 6


def test_the_summary_has_what_is_decided_alone(whole: Comparison):
    def with_verdicts(
        *verdicts: Any, parts: Any = (("a part", "cannot be told"), ("another", "cannot be told"))
    ) -> Any:
        findings = [
            dataclasses.replace(each, verdict=verdict, parts=parts)
            for each, verdict in zip(whole.findings, verdicts, strict=True)
        ]
        return comparison_report(dataclasses.replace(whole, findings=findings))

    some = with_verdicts("cannot be told", "not confirmed", "confirmed")
    assert [(line.text.split(" here")[0], line.status) for line in some.summary] == [
        ("Pathways: not confirmed", "not"),
        ("Geometry: confirmed", "ok"),
    ]
    none = with_verdicts(*["cannot be told"] * 3)
    assert [line.status for line in none.summary] == [""]
    assert none.summary[0].text.startswith("No finding of the paper can be told from these SAEs as a whole. That takes")
    assert "e2e-sae sweep" in none.summary[0].text
    assert [table.name for table in none.sections[-1].tables] == ["findings"]  # reasons, not a table of one word
    part = with_verdicts(*["cannot be told"] * 3, parts=(("a part", "confirmed"), ("another", "cannot be told")))
    assert "as a whole, but 3 of their 6 parts can: see the end. That" in part.summary[0].text
    assert [table.name for table in part.sections[-1].tables] == ["verdicts", "findings"]
    assert "unclear" not in "".join(map(markdown, (some, none, part)))


def test_dominated_points_are_grey(whole: Comparison):
    chart = pareto_charts(whole, [])[0]
    drawn = sum(len(series.y) for series in chart.series)
    assert drawn == len(whole.subjects)
    for series in chart.series:
        assert series.style == ("greyed" if series.name == "beaten by another of its kind" else "solid")
        assert list(series.x) == sorted(series.x)  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_the_papers_points_are_drawn_beside_a_run_on_gpt2_small_alone(whole: Comparison):
    def drawn_at(model_name: str, hook_name: str) -> list[tuple[str, str]]:
        subjects = tuple(
            dataclasses.replace(each, sae=made_up_sae(each.kind, model_name=model_name, hook_name=hook_name))
            for each in whole.subjects
        )
        place = dataclasses.replace(whole.place, hook_name=hook_name)
        report = comparison_report(dataclasses.replace(whole, subjects=subjects, place=place))
        check_text(report)
        assert ("paper" in [table.name for table in report.tables]) == (hook_name != HOOK)
        return [
            (chart.name, series.name)
            for chart in (*report.charts,)
            for series in chart.series
            if series.style == "reference"
        ]

    assert drawn_at("gpt2-small", HOOK) == []
    assert drawn_at("gpt2", "blocks.6.hook_resid_pre") == [
        (chart, f"{kind}, the paper's") for chart in ("pareto_l0", "pareto_alive", "l2_ratio") for kind in KINDS
    ]
    assert not [series for series in ratio_chart(whole).series if series.style == "reference"]


@pytest.mark.parametrize(
    ("hook", "short"),
    [
        ("blocks.3.hook_resid_pre", "3 resid_pre"),
        ("model.layers.9", "layer 9"),
        ("transformer.h.1", "transformer.h.1"),
    ],
)
def test_hook_names_on_an_axis(hook: str, short: str):
    assert short_hook(hook) == short
