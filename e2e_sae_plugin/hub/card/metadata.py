"""The metadata at the top of a model card (YAML front matter): ours, and what a person wrote there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import yaml_dump

from e2e_sae_plugin.evaluation.result import LABELS
from e2e_sae_plugin.hub.card.entry import HELD_OUT_NAMES, MAIN_METRICS, CardEntry
from e2e_sae_plugin.hub.card.text import hub_id, hub_model, printable, shown

TAGS = ("saelens", "sparse-autoencoder", "mechanistic-interpretability", "e2e-sae-plugin")
TAG = re.compile(r"[a-z0-9][a-z0-9_.-]*")
MODEL_INDEX = "model-index"
UNITED = ("datasets", "tags")
"""Lists that get ours beside a person's. Anything else that a person wrote stays alone."""


def card_metadata(repo_id: str, entries: Sequence[CardEntry], license: str | None = None) -> dict[str, Any]:
    """What the Hub is told of the repository, as its front matter holds it."""
    tags = [*TAGS]
    if any(each.is_end_to_end for each in entries):
        tags.append("end-to-end")
    tags += [each.architecture for each in entries] + [each.training_architecture for each in entries]
    models = [model for each in entries if (model := hub_model(each.metadata.get("model_name")))]
    datasets = [dataset for each in entries if (dataset := hub_id(each.metadata.get("dataset_path")))]
    card = ModelCardData(
        library_name="saelens",
        license=license,
        base_model=_one_or_all(models),
        datasets=list(dict.fromkeys(datasets)) or None,
        tags=[tag for tag in tags if TAG.fullmatch(tag)],
    )
    # ModelCardData holds the results of one model only, so each SAE's become an entry of the index by themselves.
    index = [model for each in entries for model in _model_index(repo_id, each)]
    return {**card.to_dict(), **({MODEL_INDEX: index} if index else {})}


def _one_or_all(names: Sequence[str]) -> str | list[str] | None:
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else unique or None


def _model_index(repo_id: str, entry: CardEntry) -> list[dict[str, Any]]:
    """The SAE's results, as a list of one model, or of none without a result."""
    found = entry.evaluation
    source = entry.metadata.get("dataset_path") if found is None else found.text
    dataset = shown(source or "text")
    kind = hub_id(source) or re.sub(r"[^\w.-]+", "-", dataset, flags=re.ASCII).strip("-") or "text"
    if found is None:
        name, split = f"{dataset}, held out from training", "held-out"
    else:
        name, split = f"{dataset if source else 'Text'}, {found.n_tokens:,} tokens", None
    names = HELD_OUT_NAMES if found is None else MAIN_METRICS
    values = {label: value for label in names if (value := entry.point(label)) is not None}
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Next-token prediction with the SAE in place",
            dataset_type=kind,
            dataset_name=name,
            dataset_split=split,
            metric_type=label,
            # Who reads and writes the card with ModelCard merges the models of the index: the name tells them apart.
            metric_name=f"{LABELS[label][0]} ({printable(entry.sae_id)})",
            metric_value=value,
        )
        for label, value in values.items()
    ]
    return eval_results_to_model_index(index_name(repo_id, entry), results) if results else []


def index_name(repo_id: str, entry: CardEntry) -> str:
    """What the Hub's model index calls an SAE."""
    return f"{repo_id.rpartition('/')[2]}/{printable(entry.sae_id)}"


def split_front_matter(text: str) -> tuple[tuple[str, str, str] | None, str]:
    """A README as (opening line, YAML, closing line), None where there is no front matter, and the text after it."""
    match = REGEX_YAML_BLOCK.search(text)
    return (None, text) if match is None else ((match[1], match[2], match[3]), text[match.end() :])


def merged_front_matter(
    existing: tuple[str, str, str] | None, ours: dict[str, Any], license: str | None, line_break: str = "\n"
) -> str:
    """The front matter with ours added to a person's, whose lines stay as they are where nothing is added.

    Args:
        existing: from `split_front_matter`.
        ours: from `card_metadata`.
        license: replaces theirs.
        line_break: of lines that are new.

    Raises:
        ValueError: the existing front matter is no YAML, no mapping, or has a model index that the Hub cannot read.
    """
    opening, text, closing = existing or (f"---{line_break}", "", f"{line_break}---{line_break}")
    theirs = _read(text)
    merged = {**ours, **{name: value for name, value in theirs.items() if value is not None or name not in ours}}
    for name in UNITED:
        if name in ours and name in theirs:
            listed = theirs[name] if isinstance(theirs[name], list) else [theirs[name]] if theirs[name] else []
            new = [each for each in ours[name] if each not in listed]
            merged[name] = [*listed, *new] if new else theirs[name]
    if license is not None:
        merged["license"] = license
    if MODEL_INDEX in ours and theirs.get(MODEL_INDEX):
        own = {each["name"]: each for each in ours[MODEL_INDEX]}
        kept = [own.pop(each["name"], each) for each in theirs[MODEL_INDEX]]
        merged[MODEL_INDEX] = [*kept, *own.values()]
    merged = {name: merged[name] for name in [*theirs, *(name for name in merged if name not in theirs)]}
    return opening + _edited(text, theirs, merged, line_break) + closing


def _read(text: str) -> dict[str, Any]:
    try:
        theirs = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise ValueError(
            f"The README's front matter (between its --- lines) is not valid YAML: {error}. Mend it, or remove it."
        ) from error
    theirs = {} if theirs is None else theirs
    if not isinstance(theirs, dict):
        raise ValueError(
            f"The README's front matter (between its --- lines) must be a YAML mapping, got {type(theirs).__name__}. Mend "
            "it, or begin the text with another line than ---."
        )
    if theirs.get(MODEL_INDEX):
        try:
            model_index_to_eval_results(theirs[MODEL_INDEX])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"The README's front matter has a {MODEL_INDEX} that the Hub cannot read ({error!r}). Mend it, or remove it."
            ) from error
    return theirs


def _edited(text: str, before: dict[str, Any], after: dict[str, Any], line_break: str) -> str:
    """The YAML `text` of `before` changed to that of `after`, entry by entry: writing it anew would lose comments and turn
    an unquoted `no` into `false`."""
    root: Any = yaml.compose(text) if before else None
    if isinstance(root, yaml.MappingNode) and not root.flow_style:
        starts = [key.start_mark.index for key, _ in root.value]
        names: list[Any] = [key.value for key, _ in root.value]
        edited = text[: starts[0]]
        for name, start, end in zip(names, starts, [*starts[1:], len(text)], strict=True):
            part = text[start:end]
            changed = name in after and after[name] != before.get(name)
            edited += _written({name: after[name]}, line_break) + _trailing(part) if changed else part
        new = {name: value for name, value in after.items() if name not in before}
        if new:
            edited += (line_break if edited[-1:] not in "\r\n" else "") + _written(new, line_break)
        if edited[-1:] == "\n" != text[-1:]:  # the closing line begins with a break
            edited = edited.removesuffix(line_break)
        try:
            if yaml.safe_load(edited) == after:
                return edited
        except yaml.YAMLError:
            pass  # an alias of what was replaced, for instance
    return _written(after, line_break).rstrip()


def _written(values: dict[str, Any], line_break: str) -> str:
    return yaml_dump(values, sort_keys=False, width=float("inf")).replace("\n", line_break)


def _trailing(part: str) -> str:
    """The blank lines and comments at the end of an entry, which stay."""
    lines = part.splitlines(keepends=True)
    n = len(lines)
    while n > 1 and (not lines[n - 1].strip() or lines[n - 1].lstrip().startswith("#")):
        n -= 1
    return "".join(lines[n:])
