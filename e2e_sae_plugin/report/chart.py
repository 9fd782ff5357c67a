"""What a chart shows, whoever draws it."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from e2e_sae_plugin.report.table import Cell, Estimate, Table

Kind = Literal["scatter", "lines", "bars", "histogram"]
Style = Literal["solid", "dashed", "points", "greyed", "reference"]
Format = Literal["number", "percent"]
FILE_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Series:
    """What has one entry in the legend."""

    name: str
    x: tuple[float, ...] | tuple[str, ...]
    """Numbers, or categories. For a histogram: the edges of the bins, one more than `y`."""
    y: tuple[float, ...]
    """nan or infinite: not drawn."""
    low: tuple[float, ...] | None = None
    """Lower ends of the 95 % intervals of `y`: error bars, or a band in a chart of lines."""
    high: tuple[float, ...] | None = None
    labels: tuple[str, ...] | None = None
    """What each point is called when it is pointed at."""
    group: str = ""
    """Decides colour and marker, alike in every chart of a report. "": the name."""
    style: Style = "solid"
    """`solid`, `dashed`: points joined by a line (bars: filled, hatched); `points`: not joined; `greyed`: set back, such as
    the dominated points beside a Pareto front; `reference`: hollow, such as published numbers."""

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            raise ValueError(_unknown(f"the style of series {self.name!r}", self.style, get_args(Style)))
        if (self.low is None) != (self.high is None):
            raise ValueError(
                f"Series {self.name!r} has only one end of its intervals: give both low and high, or neither."
            )
        for name in ("low", "high", "labels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.y):
                raise ValueError(
                    f"Series {self.name!r} has {len(values)} {name} for {len(self.y)} values of y: give one for each."
                )
        if len({isinstance(value, str) for value in self.x}) > 1:
            raise ValueError(f"The x of series {self.name!r} mixes numbers and text: give either, or str(x) for all.")

    @property
    def colour_group(self) -> str:
        """The group, or the name where none is given."""
        return self.group or self.name

    @property
    def is_categorical(self) -> bool:
        """Whether x are names."""
        return bool(self.x) and isinstance(self.x[0], str)


@dataclass(frozen=True)
class Chart:
    """A chart of a report.

    Raises:
        ValueError: of what cannot be drawn; says which series and what to do.
    """

    name: str
    """Stem of its files."""
    title: str
    caption: str
    x_label: str
    y_label: str
    kind: Kind
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False
    x_format: Format = "number"
    y_format: Format = "number"
    wide: bool = False
    """Give it the whole width of the page instead of half."""

    def __post_init__(self) -> None:
        check_file_stem("chart", self.name)
        for what, value, known in (
            ("kind", self.kind, get_args(Kind)),
            ("x_format", self.x_format, get_args(Format)),
            ("y_format", self.y_format, get_args(Format)),
        ):
            if value not in known:
                raise ValueError(_unknown(f"the {what} of chart {self.name!r}", value, known))
        for series in self.series:
            self._check(series)
        if len({series.is_categorical for series in self.series if series.x}) > 1:
            raise ValueError(f"Chart {self.name!r} has series with numbers as x and others with text: use one for all.")

    def _check(self, series: Series) -> None:
        who = f"Series {series.name!r} of chart {self.name!r}"
        expected = len(series.y) + (self.kind == "histogram")
        if len(series.x) != expected and (series.x or series.y):
            edges = " (the edges of its bins, one more than the counts)" if self.kind == "histogram" else ""
            raise ValueError(f"{who} has {len(series.x)} x for {len(series.y)} y; expected {expected}{edges}.")
        if self.kind == "histogram":
            if series.low is not None:
                raise ValueError(f"{who} has intervals, which a histogram does not show: leave low and high out.")
            edges = [float(edge) for edge in series.x if not isinstance(edge, str)]
            rising = all(low < high for low, high in itertools.pairwise(edges))
            if len(edges) != len(series.x) or not all(map(math.isfinite, edges)) or not rising:
                raise ValueError(f"{who} has bin edges that are not finite, rising numbers: {series.x[:5]} ...")
        if series.is_categorical and self.x_log:
            raise ValueError(f"{who} has text as x, which has no logarithm: leave x_log out.")
        if self.kind == "bars" and series.x and not series.is_categorical:
            raise ValueError(f"{who} has numbers as x, but bars stand at categories: give str(x), or use kind 'lines'.")

    @property
    def categories(self) -> list[str]:
        """The names on the x axis, in the order in which they first occur; empty for an axis of numbers."""
        return list(dict.fromkeys(x for series in self.series for x in series.x if isinstance(x, str)))

    @property
    def groups(self) -> list[str]:
        """What has a colour of its own, in order."""
        return [series.colour_group for series in self.series]

    def in_legend(self) -> list[bool]:
        """Which series to list in the legend: each, but of several that look and are called the same, the first."""
        seen: set[tuple[str, str]] = set()
        result: list[bool] = []
        for series in self.series:
            key = (series.name, "" if series.style == "greyed" else series.colour_group)
            result.append(key not in seen)
            seen.add(key)
        return result

    def data_table(self) -> Table:
        """The numbers that are drawn."""
        has_labels = any(series.labels for series in self.series)
        rows: list[tuple[Cell, ...]] = []
        for series in self.series:
            for index, y in enumerate(series.y):
                value: Cell = y
                if series.low is not None and series.high is not None:
                    value = Estimate(float(y), float(series.low[index]), float(series.high[index]))
                label = (series.labels[index] if series.labels else "",) if has_labels else ()
                ends = series.x[index : index + 2] if self.kind == "histogram" else series.x[index : index + 1]
                rows.append((series.name, *label, *ends, value))
        label_column = ("point",) if has_labels else ()
        x_columns = (f"{self.x_label} from", f"{self.x_label} to") if self.kind == "histogram" else (self.x_label,)
        y_label = self.y_label if self.y_label not in ("series", "point", *x_columns) else f"{self.y_label} (y)"
        return Table(self.name, self.title, "", ("series", *label_column, *x_columns, y_label), tuple(rows))


def check_file_stem(what: str, name: str) -> None:
    """Raises ValueError where a name cannot be the stem of a file everywhere."""
    if not FILE_STEM.fullmatch(name):
        raise ValueError(
            f"The name of a {what} becomes a file name, but {name!r} is none: use letters, digits, '_', '-' and '.' alone, "
            "and do not start with '.' or '-'."
        )


def _unknown(what: str, value: object, known: tuple[str, ...]) -> str:
    return f"Got {value!r} as {what}; expected one of {', '.join(map(repr, known))}."
