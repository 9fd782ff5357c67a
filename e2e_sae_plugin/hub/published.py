"""The paper's SAEs of GPT2-small: its numbers for them, and where they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import SAEMetadata

from e2e_sae_plugin.evaluation.place import same_model_name
from e2e_sae_plugin.presets import paper_config

PUBLISHED_NAME = "e2e-sae-gpt2-small"
"""What `load_pretrained` calls all of them together."""
MODEL_SETTINGS = {"center_writing_weights": True}
"""The authors load GPT-2 with TransformerLens's processing, which centres what is written to the residual stream."""
COLUMNS = ("layer", "kind", "matched", "L0", "alive", "CE loss increase", "lambda", "release", "id", "same run as")
_NUMERIC = frozenset({"layer", "L0", "alive", "CE loss increase", "lambda"})


@dataclass(frozen=True)
class PublishedSAE:
    """One row of the paper's tables 2 and 3 (arXiv 2405.12241)."""

    layer: int
    kind: str
    """"local", "e2e" or "e2e+ds"."""
    matched: str
    """"ce": in table 2, similar CE loss increase; "l0": in table 3, similar L0."""
    sparsity_coefficient: float
    """The paper's lambda."""
    l0: float
    alive: int
    """Rounded to thousands."""
    ce_loss_increase: float
    release: str
    """SAELens's name."""
    sae_id: str
    """In that release."""
    same_run_as: str | None = None
    """The release of the other matching, where the nearest run was the same one: the same weights are there."""

    def texts(self) -> tuple[str, ...]:
        """The row's cells under `COLUMNS`."""
        return (
            str(self.layer), self.kind, self.matched, f"{self.l0:.1f}", f"{self.alive // 1000}k",
            f"{self.ce_loss_increase:+.3f}", f"{self.sparsity_coefficient:g}", self.release, self.sae_id,
            self.same_run_as or "",
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready fields."""
        return asdict(self)


class PretrainedTable(list[PublishedSAE]):
    """SAEs that `load_pretrained` has by layer, kind and matching; printed, a table."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ARG002
        """What a notebook shows."""
        printer.text(str(self))

    def __str__(self) -> str:
        rows = [COLUMNS, *(row.texts() for row in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(
                text.rjust(width) if name in _NUMERIC else text.ljust(width)
                for name, text, width in zip(COLUMNS, row, widths, strict=True)
            ).rstrip()
            for row in rows
        ]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The same as Markdown."""
        rules = ("---:" if name in _NUMERIC else "---" for name in COLUMNS)
        lines = [COLUMNS, tuple(rules), *(row.texts() for row in self)]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


@cache
def published() -> dict[str, Any]:
    """The whole file: the paper's source, model and d_sae, `saes` and `l2_ratios` (table 5)."""
    return json.loads((Path(__file__).parent / "published.json").read_text())


def published_saes() -> list[PublishedSAE]:
    """The 18 rows of tables 2 and 3; one run is in both where it was the nearest under both matchings."""
    return [
        PublishedSAE(**{("sparsity_coefficient" if name == "lambda" else name): value for name, value in row.items()})
        for row in published()["saes"]
    ]


def list_pretrained(layer: int | None = None, kind: str | None = None, matched: str | None = None) -> PretrainedTable:
    """The published end-to-end SAEs and the local ones beside them; `print` it.

    Args:
        layer: 2, 6 or 10; default: all.
        kind: "local", "e2e" or "e2e+ds"; default: all.
        matched: "ce" for the table of similar CE loss increase, "l0" for that of similar L0; default: both.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    asked = {"layer": layer, "kind": kind, "matched": matched}
    chosen = {name: value for name, value in asked.items() if value is not None}
    rows = published_saes()
    found = [row for row in rows if all(getattr(row, name) == value for name, value in chosen.items())]
    if not found:
        said = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
        raise ValueError(f"There is no published SAE with {said}. Expected {_choices(rows)}.")
    return PretrainedTable(found)


def choose_published(layer: int | None, kind: str | None, matched: str | None) -> PublishedSAE:
    """The one that is meant; `matched` may be left out where both matchings chose the same run.

    Raises:
        ValueError: there is none, or several; the message lists the choices.
    """
    found = list_pretrained(layer, kind, matched)
    if len(found) > 1 and not all(row.same_run_as == found[0].release for row in found[1:]):
        missing = [n for n, v in (("layer", layer), ("kind", kind), ("matched", matched)) if v is None]
        raise ValueError(
            f"{PUBLISHED_NAME} has {len(found)} such SAEs. Give {' and '.join(missing)}: {_choices(found)}."
        )
    return found[0]


def published_at_place(repo_id: str, folder: str) -> PublishedSAE | None:
    """The published SAE in a folder of a Hub repository, or None."""
    return _by_place().get((repo_id, folder))


def complete_metadata(metadata: SAEMetadata, row: PublishedSAE) -> None:
    """Say what the published files do not: how the model has to be loaded, and what was minimised.

    The model's settings are replaced, whatever is there: the SAE is wrong on another model.
    """
    metadata.model_from_pretrained_kwargs = dict(MODEL_SETTINGS)
    objective = paper_config(row.layer, row.kind, row.matched).objective  # pyright: ignore[reportArgumentType]
    said = {"kind": row.kind, "sparsity": row.sparsity_coefficient, "objective": objective.to_dict()}
    said["exclude_special_tokens"] = False  # the paper trained and measured on every token
    for name, value in said.items():
        if metadata[name] is None:
            metadata[name] = value


def published_l2_ratios_at(model_name: str | None, hook_name: str) -> dict[str, tuple[float, float]]:
    """Kind -> the paper's L2 ratio at position 0 and later (table 5); empty for what the paper has not trained on."""
    rows = _at(model_name, hook_name, published()["l2_ratios"])
    return {row["kind"]: (row["position_0"], row["later"]) for row in rows}


def published_at(model_name: str | None, hook_name: str) -> list[PublishedSAE]:
    """The rows of a model and hook, each run once; none for what the paper has not trained on."""
    layers = {row["layer"] for row in _at(model_name, hook_name, published()["saes"])}
    rows = [row for row in published_saes() if row.layer in layers]
    return list({(row.kind, row.l0, row.ce_loss_increase): row for row in rows}.values())


@cache
def _by_place() -> dict[tuple[str, str], PublishedSAE]:
    directory = get_pretrained_saes_directory()
    return {
        (listed.repo_id, listed.saes_map[row.sae_id]): row
        for row in published_saes()
        if (listed := directory.get(row.release)) and row.sae_id in listed.saes_map
    }


def _choices(rows: Sequence[PublishedSAE]) -> str:
    """What may be asked for, of these rows."""
    values = {name: list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("layer", "kind", "matched")}
    return "; ".join(f"{name} one of {', '.join(map(repr, choices))}" for name, choices in values.items())


def _at(model_name: str | None, hook_name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    data = published()
    if not model_name or not same_model_name(model_name, data["model_name"]):
        return []
    return [row for row in rows if data["hook_name"].format(layer=row["layer"]) == hook_name]
