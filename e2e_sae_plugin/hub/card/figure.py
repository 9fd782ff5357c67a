"""The figure of a model card: what each SAE costs the model against how sparse it is."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import matplotlib

from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.pareto import dominated
from e2e_sae_plugin.hub.card.entry import CardEntry
from e2e_sae_plugin.hub.card.text import shown
from e2e_sae_plugin.report.chart import Chart, Series
from e2e_sae_plugin.report.matplotlib_charts import PNG_DPI, SETTINGS, matplotlib_figure

UNNAMED = "no objective given"


def pareto_figure(entries: Sequence[CardEntry]) -> bytes | None:
    """CE loss increase against L0, a colour per kind of objective (and per hook and model, where there are several), as PNG.

    Returns:
        None without an SAE that has both numbers. The same entries give the same bytes.
    """
    chart = _chart(
        [each for each in entries if each.point("l0") is not None and each.point("ce_loss_increase") is not None]
    )
    if chart is None:
        return None
    file = io.BytesIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # a box will do
        figure = matplotlib_figure(chart)
        figure.savefig(file, format="png", dpi=PNG_DPI, metadata={"Software": None})  # else Matplotlib's version
    return file.getvalue()


def _chart(entries: Sequence[CardEntry]) -> Chart | None:
    if not entries:
        return None
    places = {_place(each) for each in entries}
    groups: dict[str, list[CardEntry]] = {}
    for each in entries:
        kind = shown(each.kind or UNNAMED)
        groups.setdefault(f"{kind}, {_place(each)}" if len(places) > 1 else kind, []).append(each)
    series: list[Series] = []
    beaten_ones: list[Series] = []
    for group, members in groups.items():
        points = [(_number(each, "l0"), _number(each, "ce_loss_increase")) for each in members]
        beaten = dominated(points)
        for is_beaten, found in ((False, series), (True, beaten_ones)):
            chosen = [each for each, b in zip(members, beaten, strict=True) if b == is_beaten]
            chosen.sort(key=lambda each: _number(each, "l0"))
            if chosen:
                found.append(_series(group, chosen, is_beaten=is_beaten))
    series += beaten_ones  # they share an entry of the legend, its last
    return Chart(
        name="pareto_l0",
        title="CE loss increase against L0",
        caption="",
        x_label="L0 (active features per token)",
        y_label="CE loss increase (nats per token)",
        kind="scatter",
        series=tuple(series),
        x_log=all(_number(each, "l0") > 0 for each in entries),
        y_log=all(_number(each, "ce_loss_increase") > 0 for each in entries),
    )


def _series(group: str, members: Sequence[CardEntry], *, is_beaten: bool) -> Series:
    measured = [each.measured("ce_loss_increase") for each in members]
    ends = [(e.low, e.high) if isinstance(e, Estimate) else (float("nan"), float("nan")) for e in measured]
    return Series(
        name="beaten by another of its kind" if is_beaten else group,
        x=tuple(_number(each, "l0") for each in members),
        y=tuple(_number(each, "ce_loss_increase") for each in members),
        low=tuple(low for low, _ in ends),
        high=tuple(high for _, high in ends),
        group=group,
        style="greyed" if is_beaten else "solid",
    )


def _number(entry: CardEntry, name: str) -> float:
    value = entry.point(name)
    assert value is not None
    return value


def _place(entry: CardEntry) -> str:
    return f"{shown(entry.metadata.get('hook_name'))} of {shown(entry.metadata.get('model_name'))}"
