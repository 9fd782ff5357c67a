"""`compare`: everything about several SAEs of one place, measured on the same tokens."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor

from e2e_sae_plugin.checkpoint.folder import write_whole
from e2e_sae_plugin.checkpoint.identity import fingerprint
from e2e_sae_plugin.comparison.dictionaries import Geometry, geometry_of
from e2e_sae_plugin.comparison.findings import Finding, all_findings
from e2e_sae_plugin.comparison.subjects import (
    LOCAL,
    Subject,
    check_different,
    check_finite,
    check_same_model,
    ordered_kinds,
    subject,
)
from e2e_sae_plugin.evaluation.cards import feature_cards
from e2e_sae_plugin.evaluation.evaluate import check_tokens, evaluate_many, measured_form
from e2e_sae_plugin.evaluation.feature_card import FeatureCard
from e2e_sae_plugin.evaluation.importance import FeatureImportance, feature_importance
from e2e_sae_plugin.evaluation.place import Place, SpecialTokens, common_place, splice_at
from e2e_sae_plugin.evaluation.result import Evaluation, weights_sha256
from e2e_sae_plugin.evaluation.tokens import MeasuredTokens
from e2e_sae_plugin.torch_state import own_torch_state

logger = logging.getLogger(__name__)

EVALUATIONS_FOLDER = "evaluations"
FORMAT = 1
OFF_CENTRE = 0.5
"""What being off the middle costs beside being unlike, when SAEs are matched; at the ends, all are as bad, or as dense."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` has found; `comparison.report.comparison_report` makes a page of it."""

    subjects: tuple[Subject, ...]
    place: Place
    evaluations: dict[str, Evaluation]
    """By the SAE's name."""
    groups: dict[tuple[str, str], tuple[Subject, ...]]
    """(kind, setting) -> SAEs that differ by their seed alone."""
    geometry: dict[tuple[str, str], Geometry]
    """By group; cross-type cosines are to the local group of the most similar CE loss increase."""
    matched: dict[str, str]
    """Kind -> the setting at which its CE loss increase is most like the other kinds'."""
    findings: tuple[Finding, ...]
    importance: dict[str, FeatureImportance] = field(default_factory=dict)
    cards: dict[str, tuple[FeatureCard, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@own_torch_state()
def compare(
    saes: Mapping[str, SAE[Any]] | Sequence[Subject],
    model: Any,
    tokens: Tensor,
    *,
    cache: Path | None = None,
    n_cards: int = 6,
    cards_for: Sequence[str] | None = None,
    n_exact: int = 0,
    card_tokens: int = 65_536,
    batch_size_prompts: int = 8,
    hook_name: str | None = None,
    text: str | None = None,
    source: MeasuredTokens | None = None,
    exclude_special_tokens: SpecialTokens = None,
    seqpos_slice: Sequence[int | None] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Measure SAEs of one place on the same tokens, and compare them.

    Args:
        saes: by name, grouped by their metadata; or `Subject`s, with labels of one's own.
        model: a `HookedTransformer`, a `TransformerBridge` or a `HookedProxyLM`.
        tokens: `[n_prompts, pos]`, of text that neither model nor SAEs were trained on.
        cache: keep evaluations in this folder, and take from it what was measured on the same tokens before.
        n_cards: feature cards for each SAE, of its most important features; 0 for none.
        cards_for: names of the SAEs that get cards (default: all).
        n_exact: features per SAE whose importance is measured by ablating them, instead of estimated.
        card_tokens: cards and importance are made on so many of the tokens.
        batch_size_prompts: sequences that go through the model at once.
        hook_name: see `evaluate_many`.
        text: see `evaluate_many`; the report says it.
        source: see `evaluate_many`.
        exclude_special_tokens: see `evaluate_many`; for all SAEs, which otherwise have to agree on it.
        seqpos_slice: see `evaluate_many`; likewise.
        seed: of bootstraps, of importance and of the dip test.
        progress: show a bar.

    Raises:
        ValueError: what `evaluate_many` refuses; SAEs of different models; one SAE twice in a kind; weights that are not
            finite; a name in `cards_for` that is none of theirs.
    """
    if isinstance(saes, Mapping):
        subjects: list[Subject] = [subject(name, sae) for name, sae in saes.items()]
    else:
        subjects = list(saes)
    if not subjects:
        raise ValueError("There is no SAE to compare.")
    check_same_model(subjects)
    check_finite(subjects)
    check_different(subjects)
    if unknown := set(cards_for or ()) - {each.name for each in subjects}:
        raise ValueError(
            f"cards_for names {sorted(unknown)}, which are not among the SAEs {[s.name for s in subjects]}."
        )
    groups = _grouped(subjects)
    by_name = {each.name: each.sae for each in subjects}
    place_settings: dict[str, Any] = {
        "hook_name": hook_name, "exclude_special_tokens": exclude_special_tokens, "seqpos_slice": seqpos_slice,
    }  # fmt: skip
    place = common_place(by_name, model, **place_settings)
    check_tokens(tokens, splice_at(model, place, list(by_name.values()), list(by_name)).vocabulary)
    settings = {"batch_size_prompts": batch_size_prompts, "text": text, "source": source, "seed": seed}
    settings |= {"progress": progress, **place_settings}
    evaluations = _evaluations(by_name, model, tokens, settings, cache, place)
    matched = _matched_by_ce(groups, evaluations)
    geometry: dict[tuple[str, str], Geometry] = {}
    for key, group in groups.items():
        geometry[key] = geometry_of(group, _nearest_local(group, groups, evaluations), evaluations)
    findings = all_findings(
        subjects,
        evaluations,
        {kind: geometry[kind, setting] for kind, setting in matched.items()},
        {kind: mean_increase(groups[kind, setting], evaluations) for kind, setting in matched.items()},
    )
    importance, cards = _look_at_features(
        [each for each in subjects if cards_for is None or each.name in cards_for] if n_cards else [],
        model, tokens, place, n_cards, n_exact, card_tokens, batch_size_prompts, seed, progress,
    )  # fmt: skip
    return Comparison(
        subjects=tuple(subjects),
        place=place,
        evaluations=evaluations,
        groups=groups,
        geometry=geometry,
        matched=matched,
        findings=tuple(findings),
        importance=importance,
        cards=cards,
        warnings=tuple(dict.fromkeys(text for each in evaluations.values() for text in each.warnings)),
    )


# Evaluations that survive.


def _evaluations(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Tensor,
    settings: dict[str, Any],
    cache: Path | None,
    place: Place,
) -> dict[str, Evaluation]:
    if cache is None:
        return evaluate_many(saes, model, tokens, **settings)
    folder = cache / EVALUATIONS_FOLDER
    wrapped = model.model if type(model).__name__ == "HookedProxyLM" else model
    common = {
        "format": FORMAT,
        "tokens": hashlib.sha256(tokens.cpu().long().contiguous().numpy().tobytes()).hexdigest(),
        "shape": list(tokens.shape),
        "model": fingerprint(wrapped),
        "place": str(place),
        "seed": settings["seed"],
    }
    keys = {name: {**common, "sae": fingerprint(sae), "cfg": _computed(sae)} for name, sae in saes.items()}
    source = settings["source"] or MeasuredTokens(n_sequences=len(tokens), context_size=tokens.shape[1])
    said = {"measured_on": source.of(tokens, place)}
    if (text := settings["text"] or source.dataset) is not None:
        said["text"] = text
    found = {
        name: replace(each, **said)
        for name, sae in saes.items()
        if (each := _cached(folder / f"{file_stem(name)}.json", keys[name], name, sae))
    }
    missing = {name: sae for name, sae in saes.items() if name not in found}
    if found:
        logger.info("%d of %d evaluations are those in %s.", len(found), len(saes), folder)
    # A few at a time, so that what is interrupted has something to go on from.
    names = list(missing)
    for i in range(0, len(names), 8):
        for name, each in evaluate_many({n: missing[n] for n in names[i : i + 8]}, model, tokens, **settings).items():
            found[name] = each
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"key": keys[name], "evaluation": each.to_dict()}, allow_nan=False)
            write_whole(folder / f"{file_stem(name)}.json", text + "\n")
    return {name: found[name] for name in saes}


def _cached(path: Path, key: dict[str, Any], name: str, sae: SAE[Any]) -> Evaluation | None:
    try:
        content = json.loads(path.read_text())
        if content["key"] != key:
            return None
        found = Evaluation.from_dict({**content["evaluation"], "name": name})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # The key holds a fingerprint, which samples the weights.
    return found if found.weights_sha256 in (None, weights_sha256(sae)) else None


def _computed(sae: SAE[Any]) -> dict[str, Any]:
    """What decides, besides weights, what an SAE computes: its config, as JSON gives it back."""
    entries = {name: value for name, value in sae.cfg.to_dict().items() if name not in ("metadata", "device")}
    return json.loads(json.dumps(entries, default=str))


def file_stem(name: str) -> str:
    """A file name for any name: what is no letter or digit becomes -, with a few digits that tell such names apart."""
    plain = "".join(c if c.isalnum() or c in "._+-" else "-" for c in name).lstrip(".")
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# Grouping.


def _grouped(subjects: Sequence[Subject]) -> dict[tuple[str, str], tuple[Subject, ...]]:
    groups: dict[tuple[str, str], tuple[Subject, ...]] = {}
    names: set[str] = set()
    for kind in ordered_kinds(subjects):
        for each in subjects:
            if each.name in names and each.kind == kind:
                raise ValueError(f"Two SAEs are named {each.name!r}. Give each a name of its own.")
            if each.kind == kind:
                names.add(each.name)
                groups[kind, each.setting] = (*groups.get((kind, each.setting), ()), each)
    return groups


def mean_increase(group: Sequence[Subject], evaluations: Mapping[str, Evaluation]) -> float:
    """Mean over seeds, and above 0, where it has a logarithm: an SAE can be so good that it costs nothing measurable."""
    values = [evaluations[each.name].value("ce_loss_increase") for each in group]
    return max(sum(values) / len(values), 1e-9)


def _matched_by_ce(
    groups: Mapping[tuple[str, str], Sequence[Subject]], evaluations: Mapping[str, Evaluation]
) -> dict[str, str]:
    """For each kind a setting, so that they are as alike as can be, and not at one end of what all kinds reach."""
    logs = {key: math.log(mean_increase(group, evaluations)) for key, group in groups.items()}
    kinds = list(dict.fromkeys(kind for kind, _ in groups))
    reached = [[value for (kind, _), value in logs.items() if kind == each] for each in kinds]
    middle = 0.5 * (max(map(min, reached)) + min(map(max, reached)))

    def nearest(target: float) -> dict[str, str]:
        return {
            each: min((s for kind, s in groups if kind == each), key=lambda s: abs(logs[each, s] - target))
            for each in kinds
        }

    def cost(chosen: dict[str, str]) -> float:
        values = [logs[key] for key in chosen.items()]
        return max(values) - min(values) + OFF_CENTRE * abs(sum(values) / len(values) - middle)

    return min(map(nearest, logs.values()), key=cost)


def _nearest_local(
    group: Sequence[Subject],
    groups: Mapping[tuple[str, str], tuple[Subject, ...]],
    evaluations: Mapping[str, Evaluation],
) -> tuple[Subject, ...]:
    """The local SAEs of the most similar CE loss increase."""
    own = math.log(mean_increase(group, evaluations))
    local = [each for (kind, _), each in groups.items() if kind == LOCAL]
    return min(local, key=lambda each: abs(math.log(mean_increase(each, evaluations)) - own), default=())


# Features.


def _look_at_features(
    subjects: Sequence[Subject],
    model: Any,
    tokens: Tensor,
    place: Place,
    n_cards: int,
    n_exact: int,
    card_tokens: int,
    batch_size_prompts: int,
    seed: int,
    progress: bool,
) -> tuple[dict[str, FeatureImportance], dict[str, tuple[FeatureCard, ...]]]:
    importance: dict[str, FeatureImportance] = {}
    cards: dict[str, tuple[FeatureCard, ...]] = {}
    if not subjects:
        return importance, cards
    say: Callable[..., None] = logger.info if progress else logger.debug
    spliced = splice_at(model, place, [each.sae for each in subjects], [each.name for each in subjects])
    few = tokens[: max(1, card_tokens // tokens.shape[1])]
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        logger.warning("The model has no tokenizer, so there are no feature cards.")
    common: dict[str, Any] = {
        "batch_size_prompts": batch_size_prompts,
        "seqpos_slice": place.seqpos_slice,
        "excluded": place.excluded_tensor(),
        "head_index": place.head_index,
    }
    for each in subjects:
        say("Looking at the features of %s.", each.name)
        sae = measured_form(each.name, each.sae)
        found = feature_importance(sae, spliced, few, exact=n_exact, seed=seed, **common)
        importance[each.name] = found
        if tokenizer is None:
            continue
        with torch.no_grad():
            firing = [i for i in found.ranked(n_cards) if float(found.density[i]) > 0]
            shown = feature_cards(sae, spliced, few, firing, found, tokenizer=tokenizer, **common)
        cards[each.name] = tuple(shown)
    return importance, cards
