"""The paper's numbers for GPT2-small, to draw beside one's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from e2e_sae_plugin.finetune.checks import same_model_name


@dataclass(frozen=True)
class PublishedSAE:
    """One row of the paper's tables 2 and 3 (arXiv 2405.12241)."""

    layer: int
    kind: str
    matched: str
    """"ce": in table 2, similar CE loss increase; "l0": in table 3, similar L0."""
    sparsity_coefficient: float
    """The paper's lambda."""
    l0: float
    alive: int
    """Rounded to thousands."""
    ce_loss_increase: float


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


def published_l2_ratios_at(model_name: str | None, hook_name: str) -> dict[str, tuple[float, float]]:
    """Kind -> the paper's L2 ratio at position 0 and later (table 5); empty for what the paper has not trained on."""
    rows = _at(model_name, hook_name, published()["l2_ratios"])
    return {row["kind"]: (row["position_0"], row["later"]) for row in rows}


def published_at(model_name: str | None, hook_name: str) -> list[PublishedSAE]:
    """The rows of a model and hook, each run once; none for what the paper has not trained on."""
    layers = {row["layer"] for row in _at(model_name, hook_name, published()["saes"])}
    rows = [row for row in published_saes() if row.layer in layers]
    return list({(row.kind, row.l0, row.ce_loss_increase): row for row in rows}.values())


def _at(model_name: str | None, hook_name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    data = published()
    if not model_name or not same_model_name(model_name, data["model_name"]):
        return []
    return [row for row in rows if data["hook_name"].format(layer=row["layer"]) == hook_name]
