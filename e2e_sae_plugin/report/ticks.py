"""Logarithmic axes with labels that can be read: plain numbers at 1, 2, 5 or at powers of ten."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from e2e_sae_plugin.report.chart import Chart, Format
from e2e_sae_plugin.report.text import is_finite

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MAX_DECADE_TICKS = 7


@dataclass(frozen=True)
class LogAxis:
    """Where an axis starts and ends, and what is written at it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    texts: tuple[str, ...]


def log_axis(values: Iterable[float | None], form: Format = "number", margin: float = 0.05) -> LogAxis:
    """An axis that shows all positive values.

    Args:
        margin: what is left free at both ends, as a share of the axis.
    """
    positive = [value for value in values if value is not None and is_finite(value) and value > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 10.0)
    if high / low < 1.5:
        low, high = low / 1.5, high * 1.5
    room = (high / low) ** margin
    low, high = low / room, high * room
    decades = math.log10(high / low)
    powers = list(range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1))
    steps: tuple[float, ...] = (1,)
    if decades < 0.8:
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8)
    elif decades < 2:
        steps = (1, 2, 5)
    elif decades < 3.2:
        steps = (1, 3)
    else:
        powers = powers[1:-1]  # the outer ones lie outside
        stride = math.ceil(len(powers) / MAX_DECADE_TICKS)
        powers = [power for power in powers if power % stride == 0]
    ticks = tuple(value for power in powers for step in steps if low <= (value := float(f"{step}e{power}")) <= high)
    return LogAxis(low, high, ticks, tuple(_text(value, form) for value in ticks))


def x_axis(chart: Chart) -> LogAxis | None:
    """The chart's x axis, where it is logarithmic."""
    if not chart.x_log:
        return None
    margin = 0.0 if chart.kind == "histogram" else 0.05
    return log_axis((x for series in chart.series for x in series.x if not isinstance(x, str)), chart.x_format, margin)


def y_axis(chart: Chart) -> LogAxis | None:
    """The chart's y axis, where it is logarithmic."""
    if not chart.y_log:
        return None
    values = [value for series in chart.series for value in (*series.y, *(series.low or ()), *(series.high or ()))]
    if chart.kind in ("bars", "histogram"):  # the lowest bar needs a height too
        values += [value / 2 for value in values if is_finite(value) and value > 0]
    return log_axis(values, chart.y_format)


def _text(value: float, form: Format) -> str:
    if form == "percent":
        return f"{100 * value:.10g}%"
    if 1e-4 <= value < 1e6:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.10g}"
    digits, _, power = f"{value:.10e}".partition("e")
    factor = f"{float(digits):g}"
    return ("" if factor == "1" else f"{factor}·") + "10" + str(int(power)).translate(SUPERSCRIPTS)
