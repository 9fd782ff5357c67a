"""The dictionaries of a comparison against each other: within an SAE, between seeds, between kinds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from e2e_sae_plugin.comparison.subjects import LOCAL, Subject
from e2e_sae_plugin.evaluation.bimodality import Bimodality, bimodality
from e2e_sae_plugin.evaluation.geometry import CosineSummary, compare_dictionaries, match_features, nearest_cosines
from e2e_sae_plugin.evaluation.result import Evaluation


@dataclass(frozen=True)
class Comparison1D:
    """Nearest-neighbour cosines of one dictionary, or of pairs of them."""

    summary: CosineSummary
    bimodality: Bimodality | None
    matched_cosine: float | None
    """Mean cosine of the one-to-one matching (Hungarian); None within one SAE."""
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Geometry:
    """Of one group of SAEs, alike but for the seed."""

    within: Comparison1D
    cross_seed: Comparison1D | None
    """None with one seed."""
    cross_type: Comparison1D | None
    """To the local SAEs; None for those, or where there are none."""


def alive_directions(subject: Subject, evaluation: Evaluation) -> Tensor:
    """`W_dec [n_alive, d_in]` of the features that fired."""
    return subject.decoder[evaluation.alive]


def geometry_of(group: Sequence[Subject], local: Sequence[Subject], evaluations: dict[str, Evaluation]) -> Geometry:
    """The three comparisons of figure 3 of the paper.

    Args:
        group: SAEs of one kind and setting with different seeds.
        local: the local SAEs to compare with.
        evaluations: of all of them, which say what is alive.

    Raises:
        ValueError: two SAEs of the group have the same directions, so there is only one seed to compare.
    """
    directions = {each.name: alive_directions(each, evaluations[each.name]) for each in (*group, *local)}
    within = [compare_dictionaries(directions[each.name]) for each in group]
    seeds = [(a.name, b.name) for a, b in itertools.permutations(group, 2)]
    types = [(a.name, b.name) for a in group for b in local if a.kind != LOCAL]
    return Geometry(
        within=Comparison1D(_pooled(within), None, None, tuple((each.name, each.name) for each in group)),
        cross_seed=_across(seeds, directions, compare_dictionaries) if seeds else None,
        cross_type=_across(types, directions, _nearest) if types else None,
    )


def _nearest(first: Tensor, second: Tensor) -> CosineSummary:
    """Equal dictionaries too: an SAE fine-tuned with its decoder frozen is one of another kind."""
    return CosineSummary.of(nearest_cosines(first, second).cosine.cpu())


def _across(
    pairs: Sequence[tuple[str, str]], directions: dict[str, Tensor], compare: Callable[[Tensor, Tensor], CosineSummary]
) -> Comparison1D:
    summaries = [compare(directions[first], directions[second]) for first, second in pairs]
    matched = [match_features(directions[first], directions[second]).cosine for first, second in pairs]
    together = torch.cat(matched) if matched else torch.zeros(0)
    pooled = _pooled(summaries)
    return Comparison1D(
        summary=pooled,
        bimodality=bimodality(pooled.cosines) if pooled.n > 3 else None,
        matched_cosine=float(together.mean()) if len(together) else None,
        pairs=tuple(pairs),
    )


def _pooled(summaries: Sequence[CosineSummary]) -> CosineSummary:
    """Of all their features together."""
    return summaries[0] if len(summaries) == 1 else CosineSummary.of(torch.cat([each.cosines for each in summaries]))
