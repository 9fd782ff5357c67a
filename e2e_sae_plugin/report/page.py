"""A report in a folder: one HTML page that needs nothing else, the same as Markdown, tables as CSV, charts as files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from e2e_sae_plugin.checkpoint.folder import whole_files
from e2e_sae_plugin.report.cards import CardGroup, card_view, cards_table
from e2e_sae_plugin.report.chart import Chart, check_file_stem
from e2e_sae_plugin.report.matplotlib_charts import save_figure
from e2e_sae_plugin.report.palette import Look, dark_colours, looks_of
from e2e_sae_plugin.report.plotly_charts import plotly_figure
from e2e_sae_plugin.report.table import Table
from e2e_sae_plugin.report.text import escape_markdown, printable

HTML_FILENAME, MARKDOWN_FILENAME = "report.html", "report.md"
FIGURES_FOLDER, TABLES_FOLDER = "figures", "tables"
MAX_DATA_ROWS = 100
"""A chart of more points has no table of them on the page."""

Status = Literal["ok", "not", "unclear", ""]
MARKS = {"ok": "✔", "not": "✘", "unclear": "?", "": ""}
MEANINGS = {"ok": "yes", "not": "no", "unclear": "cannot be told", "": ""}


@dataclass(frozen=True)
class SummaryLine:
    """A sentence or two of what came out."""

    text: str
    status: Status = ""
    """Of a claim that was put to the test: it holds, it does not, it cannot be told. "": no claim."""

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            known = ", ".join(map(repr, get_args(Status)))
            raise ValueError(f"Got {self.status!r} as the status of a summary line; expected one of {known}.")


@dataclass(frozen=True)
class Section:
    """A part of a report; what is empty is left out."""

    title: str
    text: str = ""
    """Plain paragraphs, with an empty line between them."""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    card_groups: tuple[CardGroup, ...] = ()


@dataclass(frozen=True)
class Report:
    """All that `write_report` writes.

    Raises:
        ValueError: two charts, or two tables, have the same name and so the same file.
    """

    title: str
    subtitle: str = ""
    summary: tuple[SummaryLine, ...] = ()
    sections: tuple[Section, ...] = ()
    warnings: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    """Groups of series in the order in which they get their colours; the others follow as they occur."""

    def __post_init__(self) -> None:
        for table in self.tables:
            check_file_stem("table", table.name)
        for what, names in (("charts", self.charts), ("tables", self.tables)):
            stems = [each.name.lower() for each in names]  # some file systems do not tell A from a
            if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
                raise ValueError(f"Several {what} of the report are called {twice[0]!r}: give each a name of its own.")

    @property
    def charts(self) -> list[Chart]:
        """Of all sections, in order."""
        return [chart for section in self.sections for chart in section.charts]

    @property
    def tables(self) -> list[Table]:
        """Of all sections, in order."""
        return [table for section in self.sections for table in section.tables]

    def looks(self) -> dict[str, Look]:
        """Group -> colour and marker, alike in every chart."""
        return looks_of([*self.groups, *(group for chart in self.charts for group in chart.groups)])


def write_report(report: Report, folder: Path) -> dict[str, Path]:
    """Write `report.html`, `report.md`, `tables/*.csv`, and `figures/*.svg` and `*.png`.

    Each file is there whole or not at all; the page comes last. Files of the same name are replaced, others stay.

    Returns:
        Name in the folder, such as "report.html" or "tables/losses.csv" -> path.
    """
    looks = report.looks()
    written: list[str] = []
    if report.charts:
        last = f"{report.charts[-1].name}.png"
        with whole_files(folder / FIGURES_FOLDER, last=last) as temporary:
            for chart in report.charts:
                paths = save_figure(chart, temporary, looks=looks)
                written += [f"{FIGURES_FOLDER}/{path.name}" for path in paths.values()]
    if report.tables:
        texts = {f"{table.name}.csv": table.to_csv() for table in report.tables}
        _write(folder / TABLES_FOLDER, texts)
        written += [f"{TABLES_FOLDER}/{name}" for name in texts]
    texts = {MARKDOWN_FILENAME: markdown(report), HTML_FILENAME: page(report)}
    _write(folder, texts)
    return {name: folder / name for name in (*reversed(texts), *written)}


def page(report: Report) -> str:
    """The page, with scripts and styles in it; it asks no server for anything."""
    looks = report.looks()
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    return environment.get_template("template.html.j2").render(
        report=report,
        sections=[_section_view(section, looks) for section in report.sections],
        marks=MARKS,
        meanings=MEANINGS,
        dark_colours=script_json(dark_colours()),
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        script=Markup((here / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs() if report.charts else ""),
    )


def markdown(report: Report) -> str:
    """The report as Markdown, which shows the figures from beside it."""
    return "\n\n".join(_markdown_blocks(report)) + "\n"


def script_json(value: Any) -> Markup:
    """JSON for a `<script>` element, which no text in it can end. Raises ValueError of nan and infinity."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _section_view(section: Section, looks: dict[str, Look]) -> dict[str, Any]:
    charts: list[dict[str, Any]] = []
    for chart, wide in zip(section.charts, _wide(section.charts), strict=True):
        data = chart.data_table()
        figure = script_json(plotly_figure(chart, looks))
        table = Markup(data.to_html()) if 0 < len(data.rows) <= MAX_DATA_ROWS else ""
        charts.append({"chart": chart, "wide": wide, "figure": figure, "data": table})
    return {
        "title": section.title,
        "paragraphs": _paragraphs(section.text),
        "charts": charts,
        "tables": [(table, Markup(table.to_html())) for table in section.tables],
        "card_groups": [(group, [card_view(card) for card in group.cards]) for group in section.card_groups],
    }


def _wide(charts: tuple[Chart, ...]) -> list[bool]:
    """Which charts have a row to themselves: those that ask for it, and those that would have no neighbour."""
    wide = [chart.wide for chart in charts]
    left: int | None = None  # the chart that waits for one to its right
    for index, is_wide in enumerate([*wide, True]):
        if is_wide and left is not None:
            wide[left] = True
        left = index if left is None and not is_wide else None
    return wide


def _markdown_blocks(report: Report) -> Iterator[str]:
    yield f"# {escape_markdown(report.title)}"
    if report.subtitle:
        yield escape_markdown(report.subtitle)
    if report.warnings:
        yield "\n>\n".join(f"> **Warning:** {escape_markdown(text)}" for text in report.warnings)
    if report.summary:
        yield "\n".join(
            f"- **{MEANINGS[line.status]}:** {escape_markdown(line.text)}"
            if line.status
            else f"- {escape_markdown(line.text)}"
            for line in report.summary
        )
    for section in report.sections:
        yield f"## {escape_markdown(section.title)}"
        yield from map(escape_markdown, _paragraphs(section.text))
        for chart in section.charts:
            yield f"![{escape_markdown(chart.title)}]({FIGURES_FOLDER}/{chart.name}.svg)"
            if chart.caption:
                yield escape_markdown(chart.caption)
        for table in section.tables:
            yield f"### {escape_markdown(table.title)}"
            yield table.to_markdown().rstrip()
            if table.caption:
                yield escape_markdown(table.caption)
        for group in section.card_groups:
            yield f"### {escape_markdown(group.title)}"
            yield cards_table(group).to_markdown().rstrip()


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


def _write(folder: Path, texts: dict[str, str]) -> None:
    with whole_files(folder, last=list(texts)[-1]) as temporary:
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8", newline="")
