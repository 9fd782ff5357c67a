"""Charts for the page: figures of plotly.js as plain dicts, ready for JSON."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from e2e_sae_plugin.report.chart import Chart, Format, Series
from e2e_sae_plugin.report.palette import FRAME, GREY, GRID, SURFACE, TEXT, Look, Theme, dark_colours, looks_of
from e2e_sae_plugin.report.text import is_finite, number_text, printable
from e2e_sae_plugin.report.ticks import LogAxis, x_axis, y_axis

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
MAX_MARKERS = 40
"""A line of more points is drawn without markers."""
LARGE = 20_000
BAND_OPACITY, HISTOGRAM_OPACITY = "2e", "40"  # hexadecimal, appended to a colour
DASHES = {"dashed": "dash", "reference": "dot"}


def plotly_figure(chart: Chart, looks: Mapping[str, Look] | None = None, theme: Theme = "light") -> dict[str, Any]:
    """`{"data": [...], "layout": {...}}` for plotly.js or `plotly.graph_objects.Figure`; without the title, which the page
    shows itself.

    Args:
        looks: of the groups, from `looks_of`; by default those of this chart alone.
    """
    looks = looks_of(chart.groups) if looks is None else looks
    axes = x_axis(chart), y_axis(chart)
    data: list[dict[str, Any]] = []
    for index, (series, listed) in enumerate(zip(chart.series, chart.in_legend(), strict=True)):
        colour = GREY[0] if series.style == "greyed" else looks[series.colour_group].light
        common = {
            "name": _plotly_text(series.name),
            "legendgroup": _plotly_text(series.name) if series.style == "greyed" else f"series {index}",
            "showlegend": listed,
            "hoverinfo": "text",
            "hovertext": _hover_texts(chart, series),
        }
        if chart.kind == "bars":
            data.append(common | _bars(series, colour, axes[1]))
        elif chart.kind == "histogram":
            data.append(common | _steps(chart, series, colour))
        else:
            if chart.kind == "lines" and series.low is not None:
                data += _band(chart, series, colour, common["legendgroup"], axes[1])
            data.append(common | _points(chart, series, colour, looks[series.colour_group], axes[1]))
    figure = {"data": data, "layout": _layout(chart, axes)}
    return _recoloured(figure, dark_colours()) if theme == "dark" else figure


def _points(chart: Chart, series: Series, colour: str, look: Look, axis: LogAxis | None) -> dict[str, Any]:
    lines = chart.kind == "lines"
    joined = series.style in ("solid", "dashed") or (lines and series.style in ("greyed", "reference"))
    marked = not joined or len(series.y) <= MAX_MARKERS
    hollow = series.style == "reference"
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "+".join(["lines"] * joined + ["markers"] * marked),
        "x": _x(series, chart.x_log),
        "y": _numbers(series.y, chart.y_log),
        "line": {"color": colour, "width": 1.5 if series.style == "greyed" else 2.25},
        "marker": {
            "color": colour,
            "size": 10 if hollow else 8,
            "symbol": look.plotly_symbol + "-open" * hollow,
            "line": {"color": colour, "width": 2 if hollow else 0},
            "opacity": 0.8 if series.style == "greyed" else 1,
        },
    }
    if series.style in DASHES:
        trace["line"]["dash"] = DASHES[series.style]
    if not lines:
        trace |= _error_bars(series, colour, axis)
    return trace


def _error_bars(series: Series, colour: str, axis: LogAxis | None) -> dict[str, Any]:
    if series.low is None or series.high is None:
        return {}
    up = [_difference(high, y) for y, high in zip(series.y, series.high, strict=True)]
    down = [_difference(y, _inside(low, axis)) for y, low in zip(series.y, series.low, strict=True)]
    bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
    return {"error_y": {**bars, "color": colour, "thickness": 1.25, "width": 3}}


def _band(chart: Chart, series: Series, colour: str, group: str, axis: LogAxis | None) -> list[dict[str, Any]]:
    assert series.low is not None
    assert series.high is not None
    ends = [
        (x, _inside(low, axis), high)
        for x, low, high in zip(_x(series, chart.x_log), series.low, series.high, strict=True)
        if x is not None and is_finite(low) and is_finite(high)
    ]
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _, _ in ends] + [x for x, _, _ in reversed(ends)],
        "y": [float(high) for _, _, high in ends] + [float(low) for _, low, _ in reversed(ends)],
        "fill": "toself",
        "fillcolor": colour + BAND_OPACITY,
        "line": {"width": 0, "color": colour},
        "hoverinfo": "skip",
        "legendgroup": group,
        "showlegend": False,
    }
    return [band] if ends else []


def _bars(series: Series, colour: str, axis: LogAxis | None) -> dict[str, Any]:
    hollow, hatched = series.style == "reference", series.style == "dashed"
    return {
        "type": "bar",
        "x": _x(series, False),
        "y": _numbers(series.y, axis is not None),
        "marker": {
            "color": "rgba(0,0,0,0)" if hollow else colour,
            "line": {"color": colour, "width": 2 if hollow or hatched else 0},
            "pattern": {"shape": "/" if hatched else "", "fgcolor": colour, "size": 7},
        },
        **_error_bars(series, TEXT[0], axis),
    }


def _steps(chart: Chart, series: Series, colour: str) -> dict[str, Any]:
    x, y = _x(series, chart.x_log), _numbers(series.y, chart.y_log)
    texts = _hover_texts(chart, series)
    if y:  # down to the axis at both ends, or the outline is left open
        floor = None if chart.y_log else 0.0
        x, y, texts = [x[0], *x], [floor, *y, y[-1]], ["", *texts, ""]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "hovertext": texts,
        "line": {"color": colour, "width": 2, "shape": "hv", "dash": DASHES.get(series.style, "solid")},
        "fill": "none" if series.style in DASHES else "tozeroy",
        "fillcolor": colour + HISTOGRAM_OPACITY,
    }


def _layout(chart: Chart, axes: tuple[LogAxis | None, LogAxis | None]) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "font": {"family": FONT, "size": 13, "color": TEXT[0]},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 4, "r": 12, "t": 12, "b": 4, "pad": 0},
        "autosize": True,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": SURFACE[0],
            "bordercolor": FRAME[0],
            "font": {"family": FONT, "size": 13, "color": TEXT[0]},
            "align": "left",
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": FRAME[0], "activecolor": TEXT[0]},
        "showlegend": len(chart.series) > 1,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "yref": "container", "y": 0, "yanchor": "bottom"},
        "xaxis": _axis(chart.x_label, chart.x_format, axes[0], [x for each in chart.series for x in each.x]),
        "yaxis": _axis(chart.y_label, chart.y_format, axes[1], [y for each in chart.series for y in each.y]),
    }
    layout["xaxis"]["zeroline"] = False
    if chart.categories:
        categories = [_plotly_text(name) for name in chart.categories]
        layout["xaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": categories}
        layout["xaxis"]["showgrid"] = False
    if chart.kind == "bars":
        layout |= {"barmode": "group", "bargap": 0.3, "bargroupgap": 0.08}
    return layout


def _axis(label: str, form: Format, logarithmic: LogAxis | None, values: Sequence[object]) -> dict[str, Any]:
    is_large = max((abs(value) for value in values if is_finite(value)), default=0) >= LARGE  # 20k, but not 20μ
    axis: dict[str, Any] = {
        "title": {"text": _plotly_text(label), "standoff": 10},
        "automargin": True,
        "gridcolor": GRID[0],
        "linecolor": FRAME[0],
        "zerolinecolor": FRAME[0],
        "zerolinewidth": 1,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": FRAME[0],
        "exponentformat": "B" if is_large else "power",
        "separatethousands": True,
    }
    if form == "percent":
        axis["tickformat"] = "~%"
    if logarithmic is not None:
        axis["type"] = "log"
        axis["range"] = [math.log10(logarithmic.low), math.log10(logarithmic.high)]
        axis |= {"tickmode": "array", "tickvals": list(logarithmic.ticks), "ticktext": list(logarithmic.texts)}
        axis["zeroline"] = False
    return axis


def _hover_texts(chart: Chart, series: Series) -> list[str]:
    texts: list[str] = []
    for index, y in enumerate(series.y):
        lines = [f"<b>{_plotly_text(series.name)}</b>"]
        if series.labels is not None:
            lines.append(_plotly_text(series.labels[index]))
        x = _value(series.x[index], chart.x_format)
        if chart.kind == "histogram":
            x += f" to {_value(series.x[index + 1], chart.x_format)}"
        value = _value(y, chart.y_format)
        if series.low is not None and series.high is not None:
            value += f" [{_value(series.low[index], chart.y_format)}, {_value(series.high[index], chart.y_format)}]"
        lines += [f"{_plotly_text(chart.x_label)}: {x}", f"{_plotly_text(chart.y_label)}: {value}"]
        texts.append("<br>".join(lines))
    return texts


def _value(value: float | str, form: Format) -> str:
    if isinstance(value, str):
        return _plotly_text(value)
    return f"{100 * value:.4g}%" if form == "percent" and is_finite(value) else number_text(value)


def _plotly_text(text: str) -> str:
    """plotly.js reads a few tags in its texts, links among them."""
    return html.escape(printable(text), quote=False)


def _x(series: Series, logarithmic: bool) -> list[Any]:
    if series.is_categorical:
        return [_plotly_text(str(x)) for x in series.x]
    return _numbers([x for x in series.x if not isinstance(x, str)], logarithmic)


def _numbers(values: Iterable[float], logarithmic: bool) -> list[float | None]:
    return [float(value) if is_finite(value) and (value > 0 or not logarithmic) else None for value in values]


def _inside(low: float, axis: LogAxis | None) -> float:
    """The lower end of an interval, which a logarithmic axis cuts off."""
    return low if axis is None or not is_finite(low) else max(low, axis.low)


def _difference(high: float, low: float) -> float | None:
    return max(0.0, float(high - low)) if is_finite(high) and is_finite(low) else None


def _recoloured(value: Any, colours: Mapping[str, str]) -> Any:
    """The same with every colour replaced; text stays, as only keys that end with "color" are looked at."""
    if isinstance(value, dict):
        return {
            key: colours.get(entry[:7], entry[:7]) + entry[7:]
            if isinstance(entry, str) and key.endswith("color")
            else _recoloured(entry, colours)
            for key, entry in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_recoloured(entry, colours) for entry in value]
    return value
