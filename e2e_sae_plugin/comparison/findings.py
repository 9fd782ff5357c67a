"""The paper's three findings, put to the test on a comparison's SAEs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from e2e_sae_plugin.comparison.dictionaries import Comparison1D, Geometry
from e2e_sae_plugin.comparison.subjects import LOCAL, Subject
from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.pareto import Curve, Ratio, ratio_at_equal
from e2e_sae_plugin.evaluation.result import Evaluation

E2E, E2E_DS = "e2e", "e2e+ds"
PAPER_RATIO = 0.45
"""The paper: at the same L0, less than 45 % of local's CE loss increase."""
FAR_ABOVE = 2.0
"""Here: a downstream error counts as far above another from this factor on."""
CLOSE = 1.5
"""Here: and as close to it up to this one."""
FEWER = 0.95
"""Here: so many alive features are fewer than local's; a difference of a few in a hundred is none."""
ALIKE = 2.0
"""SAEs whose CE loss increases are further than this factor apart are not compared as of similar increase."""
MIN_FEATURES = 30
"""Directions of fewer alive features say nothing about a kind."""

Verdict = Literal["confirmed", "not confirmed", "cannot be told"]


@dataclass(frozen=True)
class Finding:
    """One claim of the paper and what the SAEs at hand say to it."""

    title: str
    claim: str
    verdict: Verdict
    evidence: tuple[str, ...]
    """Numbers with 95 % intervals."""
    parts: tuple[tuple[str, Verdict], ...] = ()
    """What the claim consists of, each with its own verdict; the whole is confirmed where all of it is."""


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
    subjects: Sequence[Subject],
    evaluations: Mapping[str, Evaluation],
    geometry: Mapping[str, Geometry],
    increases: Mapping[str, float] | None = None,
) -> list[Finding]:
    """The three, in the paper's order.

    Args:
        geometry: of the SAEs of each kind that were matched by CE loss increase, by kind.
        increases: their CE loss increases.
    """
    return [
        pareto_finding(subjects, evaluations),
        pathway_finding(subjects, evaluations),
        geometry_finding(geometry, increases),
    ]


def pareto_finding(subjects: Sequence[Subject], evaluations: Mapping[str, Evaluation]) -> Finding:
    """Fewer features for the same behaviour."""
    evidence: list[str] = []
    holds: dict[str, bool | None] = {}
    for kind in (E2E, E2E_DS):
        increase = ratio(subjects, evaluations, kind, "ce_loss_increase", "l0")
        alive = ratio(subjects, evaluations, kind, "alive", "ce_loss_increase")
        why = _why_not(subjects, kind)
        evidence.append(f"{kind}, CE loss increase over local's at equal L0: {_ratio_text(increase, 'L0', why)}")
        evidence.append(
            f"{kind}, alive features over local's at equal CE loss increase: {_ratio_text(alive, 'CE', why)}"
        )
        holds[f"{kind} costs less than local at equal L0"] = _below(increase, 1.0)
        holds[f"{kind} costs less than {PAPER_RATIO:.0%} of it"] = _below(increase, PAPER_RATIO)
        holds[f"{kind} needs fewer alive features (at most {FEWER:.0%} of local's)"] = _below(alive, FEWER)
    return _finding(
        "Pareto",
        f"At the same L0, e2e and e2e+ds have less than {PAPER_RATIO:.0%} of local's CE loss increase, and they need fewer "
        "alive features for the same CE loss increase.",
        holds,
        evidence,
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
    holds: dict[str, bool | None] = {}
    for kind in (E2E, E2E_DS):
        ratios = [ratio(subjects, evaluations, kind, f"mse/{hook}", "ce_loss_increase") for hook in hooks]
        for hook, each in zip(hooks, ratios, strict=True):
            evidence.append(
                f"{kind}, error at {hook} over local's at equal CE loss increase: "
                + _ratio_text(each, "CE", _why_not(subjects, kind))
            )
        if kind == E2E:
            holds["e2e's downstream error is far above local's"] = _all(_above(each, FAR_ABOVE) for each in ratios)
        else:
            holds["e2e+ds's is close to local's at the last layer"] = _below(ratios[-1], CLOSE) if ratios else None
    return _finding("Pathways", claim, holds, evidence)


def geometry_finding(geometry: Mapping[str, Geometry], increases: Mapping[str, float] | None = None) -> Finding:
    """Which features are found again.

    Args:
        geometry: by kind.
        increases: the CE loss increase of each kind's SAEs, which have to be alike; None where they are known to be.
    """
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
    holds: dict[str, bool | None] = {
        "e2e features are less robust across seeds than local ones": _less(across.get(E2E), across.get(LOCAL)),
        "e2e features are less robust across seeds than e2e+ds ones": _less(across.get(E2E), across.get(E2E_DS)),
        "the similarity of e2e+ds to local features is bimodal": None if test is None else test.is_bimodal,
        "within an SAE, local features are less orthogonal than e2e ones": _less(within.get(E2E), within.get(LOCAL)),
        "within an SAE, local features are less orthogonal than e2e+ds ones": _less(
            within.get(E2E_DS), within.get(LOCAL)
        ),
    }
    values = [max(value, 1e-9) for value in (increases or {}).values()]
    if values and max(values) > ALIKE * min(values):
        evidence.insert(
            0, f"CE loss increases: not similar ({', '.join(f'{v:.3g}' for v in values)}), so nothing can be told"
        )
        holds = dict.fromkeys(holds)
    if any(each.within.summary.n < MIN_FEATURES * len(each.within.pairs) for each in geometry.values()):
        evidence.insert(0, f"alive features: fewer than {MIN_FEATURES} in an SAE, so nothing can be told")
        holds = dict.fromkeys(holds)
    return _finding("Geometry", claim, holds, evidence)


def _finding(title: str, claim: str, holds: Mapping[str, bool | None], evidence: Sequence[str]) -> Finding:
    parts: tuple[tuple[str, Verdict], ...] = tuple((part, _verdict([each])) for part, each in holds.items())
    return Finding(title, claim, _verdict(list(holds.values())), tuple(evidence), parts)


def _all(values: Iterable[bool | None]) -> bool | None:
    """False where one is; None where one cannot be told, or there is none."""
    found = list(values)
    return False if False in found else None if None in found or not found else True


def _mean(comparison: Comparison1D | None) -> Estimate | None:
    return None if comparison is None else comparison.summary.mean


def _verdict(holds: Sequence[bool | None]) -> Verdict:
    """Of the whole: where a part cannot be told, neither can it."""
    if not holds or any(each is None for each in holds):
        return "cannot be told"
    return "confirmed" if all(holds) else "not confirmed"


def _below(found: Ratio | None, limit: float) -> bool | None:
    """None where the interval includes the limit."""
    return None if found is None else _less(found.estimate, Estimate(limit, limit, limit))


def _above(found: Ratio | None, limit: float) -> bool | None:
    return None if found is None else _less(Estimate(limit, limit, limit), found.estimate)


def _less(first: Estimate | None, second: Estimate | None) -> bool | None:
    """Whether the first is less; None where the intervals overlap, or one is missing."""
    if first is None or second is None:
        return None
    return True if first.high < second.low else False if second.high < first.low else None


def _why_not(subjects: Sequence[Subject], kind: str) -> str:
    """Why a kind cannot be compared with local at equal something, where that is for want of SAEs; else empty."""
    for each in (kind, LOCAL):
        by_seed: dict[int | None, int] = {}
        for subject in subjects:
            if subject.kind == each:
                by_seed[subject.seed] = by_seed.get(subject.seed, 0) + 1
        if not by_seed:
            return f"there is no {each} SAE"
        if min(by_seed.values()) < 2:
            return f"a curve needs {each} SAEs of at least two sparsities"
    return ""


def _ratio_text(found: Ratio | None, x: str, why_not: str) -> str:
    if found is None:
        return f"cannot be told ({why_not or f'no common range of {x}'})"
    low, high = found.x_range
    text = f"{found.estimate.value:.3f} [{found.estimate.low:.3f}, {found.estimate.high:.3f}]"
    seeds = ", ".join(f"{value:.3f}" for value in found.by_seed)
    return f"{text} ({x} {low:.3g} to {high:.3g}" + (f"; by seed {seeds})" if len(found.by_seed) > 1 else ")")
