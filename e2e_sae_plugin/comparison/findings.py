"""The paper's three findings, put to the test on a comparison's SAEs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from e2e_sae_plugin.comparison.dictionaries import Comparison1D, Geometry
from e2e_sae_plugin.comparison.pareto import Curve, Ratio, ratio_at_equal
from e2e_sae_plugin.comparison.subjects import LOCAL, Subject
from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.result import Evaluation

E2E, E2E_DS = "e2e", "e2e+ds"
PAPER_RATIO = 0.45
"""The paper: at the same L0, less than 45 % of local's CE loss increase."""
FAR_ABOVE = 2.0
"""Here: a downstream error counts as far above another from this factor on."""
CLOSE = 1.5
"""Here: and as close to it up to this one."""

Verdict = Literal["confirmed", "not confirmed", "cannot be told"]


@dataclass(frozen=True)
class Finding:
    """One claim of the paper and what the SAEs at hand say to it."""

    title: str
    claim: str
    verdict: Verdict
    evidence: tuple[str, ...]
    """Numbers with 95 % intervals."""


def curves(
    subjects: Sequence[Subject], evaluations: Mapping[str, Evaluation], kind: str, x: str, y: str
) -> list[Curve]:
    """One curve per seed of a kind.

    Args:
        x: "ce_loss_increase", "l0", "alive" or "mse/<hook>".
        y: the same.
    """
    by_seed: dict[int | None, list[Evaluation]] = {}
    for subject in subjects:
        if subject.kind == kind:
            by_seed.setdefault(subject.seed, []).append(evaluations[subject.name])
    return [
        Curve(torch.stack([series(each, x) for each in found]), torch.stack([series(each, y) for each in found]))
        for _, found in sorted(by_seed.items(), key=lambda entry: (entry[0] is None, entry[0]))
    ]


def series(evaluation: Evaluation, name: str) -> Tensor:
    """`[1 + n_resamples]`: the value, then its bootstrap resamples."""
    if name == "alive":
        n = len(evaluation.resamples["ce_loss_increase"])
        return torch.full((1 + n,), float(evaluation.n_alive), dtype=torch.float64)
    value = evaluation.layers[name[4:]].mse.value if name.startswith("mse/") else evaluation.value(name)
    return torch.cat([torch.tensor([value], dtype=torch.float64), evaluation.resamples[name]])


def ratio(
    subjects: Sequence[Subject], evaluations: Mapping[str, Evaluation], kind: str, y: str, at: str
) -> Ratio | None:
    """`y` of a kind over `y` of the local SAEs at equal `at`."""
    sides = [curves(subjects, evaluations, each, at, y) for each in (kind, LOCAL)]
    return ratio_at_equal(*sides)


def all_findings(
    subjects: Sequence[Subject], evaluations: Mapping[str, Evaluation], geometry: Mapping[str, Geometry]
) -> list[Finding]:
    """The three, in the paper's order.

    Args:
        geometry: of the SAEs of each kind that were matched by CE loss increase, by kind.
    """
    return [
        pareto_finding(subjects, evaluations),
        pathway_finding(subjects, evaluations),
        geometry_finding(geometry),
    ]


def pareto_finding(subjects: Sequence[Subject], evaluations: Mapping[str, Evaluation]) -> Finding:
    """Fewer features for the same behaviour."""
    evidence: list[str] = []
    holds: list[bool | None] = []
    for kind in (E2E, E2E_DS):
        increase = ratio(subjects, evaluations, kind, "ce_loss_increase", "l0")
        alive = ratio(subjects, evaluations, kind, "alive", "ce_loss_increase")
        evidence.append(f"{kind}, CE loss increase over local's at equal L0: {_ratio_text(increase, 'L0')}")
        evidence.append(f"{kind}, alive features over local's at equal CE loss increase: {_ratio_text(alive, 'CE')}")
        holds += [_below(increase, PAPER_RATIO), _below(alive, 1.0)]
    return Finding(
        "Pareto",
        f"At the same L0, e2e and e2e+ds have less than {PAPER_RATIO:.0%} of local's CE loss increase, and they need fewer "
        "alive features for the same CE loss increase.",
        _verdict(holds),
        tuple(evidence),
    )


def pathway_finding(subjects: Sequence[Subject], evaluations: Mapping[str, Evaluation]) -> Finding:
    """By the same pathway."""
    claim = (
        "At the same CE loss increase, e2e's downstream reconstruction error is far above local's (here: at every later "
        f"layer at least {FAR_ABOVE:g} times it), and e2e+ds's is close to local's in later layers (here: at most {CLOSE:g} "
        "times it at the last one)."
    )
    hooks = list(next(iter(evaluations.values())).downstream_mse()) if evaluations else []
    evidence: list[str] = []
    holds: list[bool | None] = []
    for kind in (E2E, E2E_DS):
        ratios = [ratio(subjects, evaluations, kind, f"mse/{hook}", "ce_loss_increase") for hook in hooks]
        for hook, each in zip(hooks, ratios, strict=True):
            evidence.append(
                f"{kind}, error at {hook} over local's at equal CE loss increase: {_ratio_text(each, 'CE')}"
            )
        if kind == E2E:
            holds += [_above(each, FAR_ABOVE) for each in ratios] or [None]
        else:
            holds.append(_below(ratios[-1], CLOSE) if ratios else None)
    return Finding("Pathways", claim, _verdict(holds), tuple(evidence))


def geometry_finding(geometry: Mapping[str, Geometry]) -> Finding:
    """Which features are found again."""
    claim = (
        "Among SAEs of similar CE loss increase: e2e features are less robust across seeds than local and e2e+ds features; "
        "the cosine similarity of e2e+ds to local features is bimodal; within one SAE, local features are the least "
        "orthogonal."
    )
    evidence: list[str] = []
    across = {kind: _mean(each.cross_seed) for kind, each in geometry.items()}
    within = {kind: _mean(each.within) for kind, each in geometry.items()}
    for what, values in (("across seeds", across), ("within an SAE", within)):
        for kind, value in values.items():
            evidence.append(f"{kind}, mean nearest-neighbour cosine {what}: {'none' if value is None else value}")
    typed = geometry[E2E_DS].cross_type if E2E_DS in geometry else None
    test = None if typed is None else typed.bimodality
    if test is not None:
        modes = " and ".join(f"{mode:.2f}" for mode in test.modes)
        evidence.append(
            f"e2e+ds to local: dip {test.dip:.4f}, p = {test.p_value:.3f}; two-component means {modes}, weights "
            + " and ".join(f"{weight:.2f}" for weight in test.weights)
        )
    return Finding(
        "Geometry",
        claim,
        _verdict(
            [
                _less(across.get(E2E), across.get(LOCAL)),
                _less(across.get(E2E), across.get(E2E_DS)),
                None if test is None else test.is_bimodal,
                _less(within.get(E2E), within.get(LOCAL)),
                _less(within.get(E2E_DS), within.get(LOCAL)),
            ]
        ),
        tuple(evidence),
    )


def _mean(comparison: Comparison1D | None) -> Estimate | None:
    return None if comparison is None else comparison.summary.mean


def _verdict(holds: Sequence[bool | None]) -> Verdict:
    if any(each is False for each in holds):
        return "not confirmed"
    return "cannot be told" if any(each is None for each in holds) or not holds else "confirmed"


def _below(found: Ratio | None, limit: float) -> bool | None:
    return None if found is None else found.estimate.high < limit


def _above(found: Ratio | None, limit: float) -> bool | None:
    return None if found is None else found.estimate.low > limit


def _less(first: Estimate | None, second: Estimate | None) -> bool | None:
    """Whether the intervals lie apart, in this order."""
    return None if first is None or second is None else first.high < second.low


def _ratio_text(found: Ratio | None, x: str) -> str:
    if found is None:
        return f"cannot be told (no common range of {x})"
    low, high = found.x_range
    text = f"{found.estimate.value:.3f} [{found.estimate.low:.3f}, {found.estimate.high:.3f}]"
    seeds = ", ".join(f"{value:.3f}" for value in found.by_seed)
    return f"{text} ({x} {low:.3g} to {high:.3g}" + (f"; by seed {seeds})" if len(found.by_seed) > 1 else ")")
