"""Charts as files, for Markdown, papers and slides: SVG and PNG through Matplotlib, on a white background."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from e2e_sae_plugin.report.chart import Chart, Format, Series
from e2e_sae_plugin.report.palette import FRAME, GREY, GRID, TEXT, Look, looks_of
from e2e_sae_plugin.report.plotly_charts import MAX_MARKERS
from e2e_sae_plugin.report.text import is_finite, printable
from e2e_sae_plugin.report.ticks import LogAxis, x_axis, y_axis

SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "e2e-sae-plugin",  # else the ids in the file are random
    "svg.fonttype": "path",  # looks the same where the font is missing
    "text.parse_math": False,  # a dollar sign in a token is one
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": FRAME[0],
    "axes.labelcolor": TEXT[0],
    "text.color": TEXT[0],
    "xtick.color": FRAME[0],
    "ytick.color": FRAME[0],
    "xtick.labelcolor": TEXT[0],
    "ytick.labelcolor": TEXT[0],
    "grid.color": GRID[0],
    "hatch.color": "#ffffff",
    "axes.unicode_minus": True,
}
DASHES = {"dashed": "--", "reference": ":"}
SIZE = (7.0, 4.4)
PNG_DPI = 150
MAX_UPRIGHT_CHARACTERS = 60
"""Names of categories that are longer together are written at an angle."""


def save_figure(
    chart: Chart, folder: Path, formats: Sequence[str] = ("svg", "png"), looks: Mapping[str, Look] | None = None
) -> dict[str, Path]:
    """Draw the chart into `folder`, as `<name>.svg` and so on.

    Args:
        formats: what Matplotlib can write: "svg", "png", "pdf".
        looks: of the groups, from `looks_of`; by default those of this chart alone.

    Returns:
        Format -> file. The same chart gives the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {form: folder / f"{chart.name}.{form}" for form in formats}
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # a box will do
        figure = matplotlib_figure(chart, looks)
        for form, path in paths.items():
            dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
            figure.savefig(path, format=form, dpi=PNG_DPI, metadata=dates.get(form, {}))
    return paths


def matplotlib_figure(chart: Chart, looks: Mapping[str, Look] | None = None) -> Figure:
    """The chart as a figure of its own, which no state of `pyplot` knows of."""
    looks = looks_of(chart.groups) if looks is None else looks
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        ends = x_axis(chart), y_axis(chart)
        _prepare(axes, chart, ends)
        for index, (series, listed) in enumerate(zip(chart.series, chart.in_legend(), strict=True)):
            colour = GREY[0] if series.style == "greyed" else looks[series.colour_group].light
            label = printable(series.name) if listed else "_nolegend_"
            if chart.kind == "bars":
                _bars(axes, chart, index, colour, label)
            elif chart.kind == "histogram":
                _steps(axes, chart, series, colour, label)
            else:
                _points(axes, chart, series, colour, looks[series.colour_group], label)
        if len(chart.series) > 1:
            handles, labels = axes.get_legend_handles_labels()
            columns = max(1, min(4, len(labels), 80 // (max(map(len, labels), default=1) + 6)))
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _prepare(axes: Axes, chart: Chart, ends: tuple[LogAxis | None, LogAxis | None]) -> None:
    axes.set_title(printable(chart.title), loc="left", fontweight="bold", fontsize=11, pad=10, wrap=True)
    axes.set_xlabel(printable(chart.x_label))
    axes.set_ylabel(printable(chart.y_label))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y" if chart.categories else "both", linewidth=0.8)
    axes.set_axisbelow(True)
    if ends[0] is not None:
        axes.set_xscale("log")
        axes.set_xlim(ends[0].low, ends[0].high)
    if ends[1] is not None:
        axes.set_yscale("log")
        axes.set_ylim(ends[1].low, ends[1].high)
    axes.xaxis.set_major_formatter(_formatter(chart.x_format))
    axes.yaxis.set_major_formatter(_formatter(chart.y_format))
    for axis, end in ((axes.xaxis, ends[0]), (axes.yaxis, ends[1])):
        if end is not None:
            axis.set_major_locator(FixedLocator(list(end.ticks)))
            axis.set_major_formatter(FixedFormatter(list(end.texts)))
            axis.set_minor_locator(NullLocator())
    if chart.categories:
        names = [printable(name) for name in chart.categories]
        slanted = sum(map(len, names)) > MAX_UPRIGHT_CHARACTERS
        axes.set_xticks(range(len(names)), names, rotation=30 if slanted else 0, ha="right" if slanted else "center")
        axes.set_xlim(-0.6, len(names) - 0.4)


def _points(axes: Axes, chart: Chart, series: Series, colour: str, look: Look, label: str) -> None:
    x, y = _x(chart, series), _numbers(series.y)
    lines = chart.kind == "lines"
    joined = series.style in ("solid", "dashed") or (lines and series.style in ("greyed", "reference"))
    marked = not joined or len(y) <= MAX_MARKERS
    hollow, greyed = series.style == "reference", series.style == "greyed"
    axes.plot(
        x,
        y,
        color=colour,
        linestyle=DASHES.get(series.style, "-") if joined else "none",
        linewidth=1.1 if greyed else 1.7,
        marker=look.matplotlib_marker if marked else "none",
        markersize=7 if hollow else 5.5,
        markerfacecolor="none" if hollow else colour,
        markeredgewidth=1.5 if hollow else 0,
        alpha=0.8 if greyed else 1,
        zorder=2 if greyed else 3,
        label=label,
    )
    if series.low is None or series.high is None:
        return
    low, high = _numbers(series.low), _numbers(series.high)
    if lines:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    else:
        axes.errorbar(x, y, yerr=_errors(y, low, high), fmt="none", ecolor=colour, elinewidth=1, capsize=2, zorder=2)


def _bars(axes: Axes, chart: Chart, index: int, colour: str, label: str) -> None:
    series = chart.series[index]
    width = 0.7 / len(chart.series)
    x = [value + (index - (len(chart.series) - 1) / 2) * width for value in _x(chart, series)]
    y = _numbers(series.y)
    hollow = series.style == "reference"
    axes.bar(
        x,
        y,
        width=0.92 * width,
        color="none" if hollow else colour,
        edgecolor=colour if hollow else "white",
        linewidth=1.5 if hollow else 0,
        hatch="///" if series.style == "dashed" else None,
        label=label,
    )
    if series.low is not None and series.high is not None:
        errors = _errors(y, _numbers(series.low), _numbers(series.high))
        axes.errorbar(x, y, yerr=errors, fmt="none", ecolor=TEXT[0], elinewidth=1.2, capsize=3)


def _steps(axes: Axes, chart: Chart, series: Series, colour: str, label: str) -> None:
    if not series.y:
        return
    edges, counts = _x(chart, series), _numbers(series.y)
    outline = DASHES.get(series.style)
    if outline is None:
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.25)
    axes.stairs(counts, edges, color=colour, linewidth=1.6, linestyle=outline or "-", label=label)


def _errors(y: list[float], low: list[float], high: list[float]) -> list[list[float]]:
    """Distances down and up; a value outside its own interval has none on that side."""
    return [
        [max(0.0, value - end) if math.isfinite(end) else 0.0 for value, end in zip(y, low, strict=True)],
        [max(0.0, end - value) if math.isfinite(end) else 0.0 for value, end in zip(y, high, strict=True)],
    ]


def _x(chart: Chart, series: Series) -> list[float]:
    place = {name: float(index) for index, name in enumerate(chart.categories)}
    return [place[x] if isinstance(x, str) else _number(x) for x in series.x]


def _numbers(values: Sequence[float]) -> list[float]:
    return [_number(value) for value in values]


def _number(value: float) -> float:
    return float(value) if is_finite(value) else math.nan


def _formatter(form: Format) -> Any:
    if form == "percent":
        return FuncFormatter(lambda value, _: f"{100 * value:.6g}%".replace("-", "\u2212"))
    return FuncFormatter(lambda value, _: f"{value:,.10g}".replace("-", "\u2212"))
