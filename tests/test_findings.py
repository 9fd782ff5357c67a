"""The paper's three findings on made-up numbers: when each is confirmed, is not, and cannot be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch

from e2e_sae_plugin.comparison.dictionaries import Comparison1D, Geometry
from e2e_sae_plugin.comparison.findings import (
    Finding,
    all_findings,
    curves,
    geometry_finding,
    pareto_finding,
    pathway_finding,
    ratio,
    series,
)
from e2e_sae_plugin.comparison.subjects import Subject
from e2e_sae_plugin.evaluation.bimodality import Bimodality
from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.geometry import CosineSummary
from e2e_sae_plugin.evaluation.result import Evaluation, LayerMetrics

OWN, NEXT, LAST = (f"blocks.{i}.hook_resid_pre" for i in (3, 4, 5))
L0 = (5.0, 10.0, 20.0, 40.0)
N_RESAMPLES, D_SAE = 40, 4096


def made_up(name: str, *, increase: float, l0: float, alive: int, mse: Mapping[str, float]) -> Evaluation:
    """What counts for the findings; resamples are 1 % around the values."""
    noise = 1 + 0.01 * torch.linspace(-1, 1, N_RESAMPLES, dtype=torch.float64)

    def estimate(value: float) -> Estimate:
        return Estimate(value, 0.99 * value, 1.01 * value)

    one = Estimate(0.5, 0.4, 0.6)
    return Evaluation(
        name=name,
        hook_name=OWN,
        architecture="standard",
        d_in=16,
        d_sae=D_SAE,
        n_tokens=1000,
        n_sequences=10,
        metrics={"ce_loss_increase": estimate(increase), "l0": estimate(l0)},
        layers={hook: LayerMetrics(estimate(value), one, one, one, one) for hook, value in mse.items()},
        l0_counts=torch.tensor([0, 1000]),
        density=(torch.arange(D_SAE) < alive).double(),
        alive_curve=((1000, alive),),
        resamples={
            "ce_loss_increase": increase * noise,
            "l0": l0 * noise,
            **{f"mse/{hook}": value * noise for hook, value in mse.items() if hook != OWN},
        },
    )


Sweep = tuple[list[Subject], dict[str, Evaluation]]


def sweep(
    kinds: Mapping[str, Mapping[str, Any]], seeds: tuple[int | None, ...] = (0, 1), l0: tuple[float, ...] = L0
) -> Sweep:
    """Kind -> `increase`, `alive`, `next`, `last`: factors on local's; 0.1 at L0 10, falling as 1 / L0."""
    subjects: list[Subject] = []
    evaluations: dict[str, Evaluation] = {}
    sae = cast(Any, None)  # findings read labels alone
    for kind, factors in kinds.items():
        for seed in seeds:
            for x in l0:
                name = f"{kind}-{x:g}-{seed}"
                increase = factors.get("increase", 1.0) / x
                # As functions of the CE loss increase, so that the factors are those at equal increase.
                mse = {OWN: 1.0, NEXT: factors.get("next", 1.0) * increase, LAST: factors.get("last", 1.0) * increase}
                alive = round(factors.get("alive", 1.0) * 100 / increase**0.5)
                subjects.append(Subject(name, sae, kind, f"{x:g}", seed))
                evaluations[name] = made_up(name, increase=increase, l0=x, alive=alive, mse=mse)
    return subjects, evaluations


LOCAL: dict[str, Any] = {}
GOOD = {"increase": 0.3, "alive": 0.5}


@pytest.mark.parametrize("seeds", [(0, 1), (0,), (None,)])
def test_less_ce_loss_increase_and_fewer_features_confirm_the_pareto_finding(seeds: tuple[int | None, ...]):
    found = pareto_finding(*sweep({"local": LOCAL, "e2e": GOOD, "e2e+ds": {"increase": 0.4, "alive": 0.8}}, seeds))
    assert found.verdict == "confirmed"
    assert [line.split(": ")[0] for line in found.evidence] == [
        "e2e, CE loss increase over local's at equal L0",
        "e2e, alive features over local's at equal CE loss increase",
        "e2e+ds, CE loss increase over local's at equal L0",
        "e2e+ds, alive features over local's at equal CE loss increase",
    ]
    assert "0.300 [" in found.evidence[0]
    assert "(L0 5 to 40" in found.evidence[0]
    assert ("; by seed 0.300, 0.300)" in found.evidence[0]) == (len(seeds) > 1)
    assert "0.5" in found.evidence[1]
    assert "(CE 0.0" in found.evidence[1]


@pytest.mark.parametrize(
    "worse",
    [{"increase": 0.5, "alive": 0.5}, {"increase": 0.3, "alive": 1.2}, {"increase": 0.3, "alive": 0.99}],
)
def test_one_number_on_the_wrong_side_does_not_confirm_it(worse: dict[str, float]):
    found = pareto_finding(*sweep({"local": LOCAL, "e2e": GOOD, "e2e+ds": worse}))
    assert found.verdict == "not confirmed"


def test_what_is_not_there_cannot_be_told():
    e2e = {**GOOD, "next": 3.0, "last": 4.0}
    for kinds in ({"local": LOCAL, "e2e": e2e}, {"e2e": e2e, "e2e+ds": GOOD}, {"local": LOCAL}):
        found = pareto_finding(*sweep(kinds))
        assert found.verdict == "cannot be told"
        assert any("cannot be told" in line for line in found.evidence)
        assert pathway_finding(*sweep(kinds)).verdict == "cannot be told"
    one_sparsity = sweep({"local": LOCAL, "e2e": GOOD, "e2e+ds": GOOD}, l0=(10.0,))
    assert pareto_finding(*one_sparsity).verdict == "cannot be told"


def test_where_a_part_cannot_be_told_neither_can_the_whole_but_the_others_keep_their_verdicts():
    found = pareto_finding(*sweep({"local": LOCAL, "e2e": {"increase": 0.9}}))
    assert found.verdict == "cannot be told"
    parts = dict(found.parts)
    assert parts["e2e costs less than local at equal L0"] == "confirmed"
    assert parts["e2e costs less than 45% of it"] == "not confirmed"
    assert parts["e2e+ds costs less than local at equal L0"] == "cannot be told"
    assert "there is no e2e+ds SAE" in found.evidence[2]


def test_geometry_is_told_of_sae_s_of_similar_increase_and_with_enough_features_alone():
    assert geometry_finding(geometry(), {"local": 0.1, "e2e": 0.15, "e2e+ds": 0.19}).verdict == "confirmed"
    found = geometry_finding(geometry(), {"local": 0.1, "e2e": 0.15, "e2e+ds": 0.21})
    assert found.verdict == "cannot be told"
    assert {verdict for _, verdict in found.parts} == {"cannot be told"}
    assert "not similar" in found.evidence[0]


@pytest.mark.parametrize(
    ("e2e", "e2e_ds", "verdict"),
    [
        ({"next": 3.0, "last": 4.0}, {"next": 2.5, "last": 1.2}, "confirmed"),
        ({"next": 1.5, "last": 4.0}, {"last": 1.2}, "not confirmed"),
        ({"next": 3.0, "last": 4.0}, {"last": 1.6}, "not confirmed"),
    ],
)
def test_pathways(e2e: dict[str, float], e2e_ds: dict[str, float], verdict: str):
    kinds = {"local": LOCAL, "e2e": {**GOOD, **e2e}, "e2e+ds": {**GOOD, **e2e_ds}}
    found = pathway_finding(*sweep(kinds))
    assert found.verdict == verdict
    assert len(found.evidence) == 4
    assert f"e2e, error at {LAST} over local's at equal CE loss increase: 4.000 [" in found.evidence[1]
    assert f"error at {OWN} " not in " ".join(found.evidence)


def test_pathways_after_the_last_block_or_of_nothing_cannot_be_told():
    subjects, evaluations = sweep({"local": LOCAL, "e2e": GOOD, "e2e+ds": GOOD})
    for evaluation in evaluations.values():
        for hook in (NEXT, LAST):
            del evaluation.layers[hook]
    assert pathway_finding(subjects, evaluations).verdict == "cannot be told"
    assert pathway_finding([], {}).verdict == "cannot be told"


# Geometry.


def cosines(mean: float, n: int = 500) -> Comparison1D:
    values = (mean + 0.02 * torch.randn(n, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    return Comparison1D(CosineSummary.of(values), None, mean, (("a", "b"),))


def bimodal(p_value: float) -> Comparison1D:
    test = Bimodality(0.05, p_value, (0.3, 0.95), (0.4, 0.6), 500)
    return Comparison1D(cosines(0.6).summary, test, 0.6, (("a", "b"),))


def geometry(
    within: tuple[float, float, float] = (0.7, 0.4, 0.4),
    across: tuple[float | None, float | None, float | None] = (0.8, 0.4, 0.7),
    p_value: float | None = 0.002,
) -> dict[str, Geometry]:
    """Of local, e2e and e2e+ds."""
    return {
        kind: Geometry(
            cosines(inside),
            None if between is None else cosines(between),
            None if kind == "local" or p_value is None else bimodal(p_value),
        )
        for kind, inside, between in zip(("local", "e2e", "e2e+ds"), within, across, strict=True)
    }


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (geometry(), "confirmed"),
        (geometry(across=(0.4, 0.8, 0.9)), "not confirmed"),  # e2e found again more often than local
        (geometry(across=(0.8, 0.7, 0.4)), "not confirmed"),
        (geometry(across=(0.8, 0.7999, 0.9)), "cannot be told"),  # less, but intervals overlap
        (geometry(p_value=0.3), "not confirmed"),
        (geometry(within=(0.3, 0.4, 0.4)), "not confirmed"),
        (geometry(across=(None, None, None)), "cannot be told"),  # one seed
        (geometry(p_value=None), "cannot be told"),
        ({k: v for k, v in geometry().items() if k != "e2e+ds"}, "cannot be told"),
        ({k: v for k, v in geometry().items() if k != "local"}, "cannot be told"),
        ({}, "cannot be told"),
    ],
)
def test_geometry(found: dict[str, Geometry], verdict: str):
    assert geometry_finding(found).verdict == verdict


def test_the_evidence_of_geometry_has_means_with_intervals_and_the_dip_test():
    found = geometry_finding(geometry())
    lines = {line.partition(": ")[0]: line.partition(": ")[2] for line in found.evidence}
    assert lines["e2e, mean nearest-neighbour cosine across seeds"].startswith("0.40")
    assert "[0.39" in lines["e2e, mean nearest-neighbour cosine across seeds"]
    assert lines["local, mean nearest-neighbour cosine within an SAE"].startswith("0.70")
    assert lines["e2e+ds to local"] == (
        "dip 0.0500, p = 0.002; two-component means 0.30 and 0.95, weights 0.40 and 0.60"
    )
    one_seed = geometry_finding(geometry(across=(None, None, None)))
    assert "e2e, mean nearest-neighbour cosine across seeds: none" in one_seed.evidence


def test_a_dead_dictionary_has_no_geometry_to_tell():
    found = geometry()
    dead = Comparison1D(CosineSummary.of(torch.zeros(0)), None, None, (("a", "b"),))
    found["e2e"] = Geometry(dead, dead, dead)
    told = geometry_finding(found)
    assert told.verdict == "cannot be told"
    assert "nan" not in " ".join(told.evidence)


# Curves.


def test_one_curve_per_seed_with_resamples_behind_the_values():
    subjects, evaluations = sweep({"local": LOCAL, "e2e": GOOD}, seeds=(1, 0, None))
    found = curves(subjects, evaluations, "e2e", "l0", "alive")
    assert [curve.x.shape for curve in found] == [(4, 1 + N_RESAMPLES)] * 3
    assert found[0].x[:, 0].tolist() == list(L0)
    assert (found[0].y == found[0].y[:, :1]).all()  # how many are alive is not resampled
    assert curves(subjects, evaluations, "e2e+ds", "l0", "alive") == []
    evaluation = evaluations["e2e-10-0"]
    assert series(evaluation, f"mse/{LAST}")[0] == evaluation.layers[LAST].mse.value
    assert series(evaluation, "ce_loss_increase")[0] == pytest.approx(0.03)


def test_dead_and_perfect_saes_among_them_change_no_verdict():
    subjects, evaluations = sweep({"local": LOCAL, "e2e": GOOD, "e2e+ds": GOOD})
    expected = ratio(subjects, evaluations, "e2e", "ce_loss_increase", "l0")
    sae = subjects[0].sae
    for name, numbers in {
        "dead": {"increase": 4.0, "l0": 0.0, "alive": 0},
        "perfect": {"increase": -1e-4, "l0": 400.0, "alive": 4000},
    }.items():
        subjects.append(Subject(name, sae, "e2e", name, 0))
        evaluations[name] = made_up(name, **numbers, mse={OWN: 1.0, NEXT: 1.0, LAST: 1.0})  # pyright: ignore[reportArgumentType]
    found = ratio(subjects, evaluations, "e2e", "ce_loss_increase", "l0")
    assert found == expected
    text = " ".join(line for each in all_findings(subjects, evaluations, {}) for line in each.evidence)
    assert "nan" not in text
    assert "inf" not in text


def test_the_three_come_in_the_papers_order():
    subjects, evaluations = sweep({"local": LOCAL, "e2e": {**GOOD, "next": 3, "last": 4}, "e2e+ds": GOOD})
    found = all_findings(subjects, evaluations, geometry())
    assert [(each.title, each.verdict) for each in found] == [
        ("Pareto", "confirmed"),
        ("Pathways", "confirmed"),
        ("Geometry", "confirmed"),
    ]
    assert all(isinstance(each, Finding) and each.claim.endswith(".") for each in found)
