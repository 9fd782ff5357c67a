"""What a report writes, without a browser: Markdown, CSV, SVG, and HTML that no text can break out of."""

from __future__ import annotations

import csv
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import plotly.graph_objects
import pytest

from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.feature_card import ActivatingContext, FeatureCard
from e2e_sae_plugin.report import (
    CardGroup,
    Chart,
    Report,
    Section,
    Series,
    SummaryLine,
    Table,
    plotly_figure,
    save_figure,
    write_report,
)
from e2e_sae_plugin.report.page import markdown, page, script_json
from e2e_sae_plugin.report.palette import COLOURS, SURFACE, dark_colours, looks_of
from e2e_sae_plugin.report.text import escape_markdown, number_text, printable, token_text
from e2e_sae_plugin.report.ticks import log_axis

HOSTILE = (
    "</script><script>alert(1)</script>", "<b>bold</b>", "<!--", "\"'`", "\x00", "🦊", "\n", "  two", "\ud800", "\u202eleft",
    "a|b", "[x](http://example.org)", "$\\frac{", "%{x}", "{{ 1 }}", "&lt;",
)  # fmt: skip


def chart(kind: str = "scatter", **changes: Any) -> Chart:
    """A valid chart of two series, the second one hostile."""
    x: dict[str, Any] = {"bars": ("a", "b"), "histogram": (0, 1, 2)}
    places = x.get(kind, (1, 2))
    text = "".join(HOSTILE)
    float32: Any = numpy.float32(2)
    interval: dict[str, Any] = {} if kind == "histogram" else {"low": (0.5, math.nan), "high": (1.5, math.inf)}
    series = (
        Series("one", places, (1.0, math.nan), **interval, group="g"),
        Series(text, places, (float32, math.inf), labels=(text, "b"), style="greyed"),
        Series("reference", places, (3, 4), group="g", style="reference"),
    )
    settings: dict[str, Any] = {
        "name": f"chart_{kind}", "title": text, "caption": text, "x_label": text, "y_label": text, "kind": kind,
        "series": series,
    }  # fmt: skip
    return Chart(**settings | changes)


def table() -> Table:
    rows = (
        ("a|b", Estimate(0.12345, 0.1, 0.2), 12345, None),
        ("c, d\n\"e\"", Estimate(math.nan, math.nan, math.nan), 7, math.inf),
        ("", 0.5, -1, 1e-7),
    )  # fmt: skip
    return Table("table", "A table", "Caption", ("what", "loss", "count", "rest"), rows, {"loss": "{:.3f}"})


def card() -> FeatureCard:
    context = ActivatingContext(HOSTILE, (math.nan, *range(1, len(HOSTILE))), len(HOSTILE) - 1)
    logits = tuple((token, float(index)) for index, token in enumerate(HOSTILE))
    return FeatureCard(7, math.nan, math.inf, False, math.nan, (context,) * 5, logits, logits)


def hostile_report() -> Report:
    text = "".join(HOSTILE)
    charts = tuple(chart(kind) for kind in ("scatter", "lines", "bars", "histogram"))
    section = Section(text, f"{text}\n\n{text}", charts, (table(),), (CardGroup(text, (card(),)),))
    return Report(text, text, (SummaryLine(text, "ok"), SummaryLine(text)), (section, Section("empty")), (text, "w"))


class Tags(HTMLParser):
    """The elements of a page with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.elements[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)


def test_markdown_shows_intervals_and_escapes() -> None:
    assert table().to_markdown().splitlines() == [
        "| what | loss | count | rest |",
        "| --- | ---: | ---: | ---: |",
        r"| a\|b | 0.123 [0.100, 0.200] | 12,345 | — |",
        '| c, d "e" | n/a | 7 | n/a |',
        "|  | 0.500 | -1 | 1.000e-07 |",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b>", "&lt;b&gt;"),
        ("[x](http://y)", r"[x\](http://y)"),
        ("a_b _c_ *d*", r"a_b \_c\_ \*d\*"),
        ("# no heading", r"\# no heading"),
        ("1. no list", r"1\. no list"),
        ("-0.5 [-0.6, -0.4]", "-0.5 [-0.6, -0.4]"),
        ("two\nlines", "two lines"),
    ],
)
def test_escape_markdown(text: str, expected: str) -> None:
    assert escape_markdown(text) == expected


def test_csv_holds_the_raw_values() -> None:
    header, *rows = csv.reader(io.StringIO(table().to_csv(), newline=""))
    assert header == ["what", "loss", "loss_low", "loss_high", "count", "rest"]
    assert rows[0] == ["a|b", "0.12345", "0.1", "0.2", "12345", ""]
    assert rows[1][0] == 'c, d\n"e"'
    assert math.isnan(float(rows[1][1]))
    assert rows[2] == ["", "0.5", "", "", "-1", "1e-07"]


def test_html_table_has_scopes_buttons_and_sort_values() -> None:
    html = table().to_html()
    assert html.count('<th scope="col"') == html.count("<button") == 4
    assert html.count('<th scope="row"') == 3
    assert 'data-value="0.12345">0.123 <span class="interval">[0.100, 0.200]</span>' in html
    assert 'data-value="">n/a' in html


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ("a", "a")}, "columns of the same name"),
        ({"rows": ((1,),)}, "Row 0 of table 't' has 1 cells; expected 2"),
        ({"formats": {"c": "{:.1f}"}}, "a format for 'c'"),
        ({"formats": {"a": "{:d}"}}, "cannot write a number"),
    ],
)
def test_table_refuses(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"name": "t", "title": "", "caption": "", "columns": ("a", "b"), "rows": ((1, 2),)}
    with pytest.raises(ValueError, match=message):
        Table(**settings | changes)


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ({"labels": ("a",)}, "1 labels for 2 values of y"),
        ({"low": (0.0, 1.0)}, "only one end"),
        ({"low": (0.0,), "high": (1.0, 2.0)}, "1 low for 2 values"),
        ({"x": (1, "a")}, "mixes numbers and text"),
        ({"style": "dotted"}, "Got 'dotted'"),
    ],
)
def test_series_refuses(series: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"name": "s", "x": (1, 2), "y": (1.0, 2.0)}
    with pytest.raises(ValueError, match=message):
        Series(**settings | series)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"series": (Series("s", (1, 2, 3), (1.0, 2.0)),)}, "3 x for 2 y; expected 2"),
        ({"kind": "histogram", "series": (Series("s", (1, 2), (1.0, 2.0)),)}, "2 x for 2 y; expected 3"),
        ({"kind": "histogram", "series": (Series("s", (1, 1, 2), (1.0, 2.0)),)}, "bin edges"),
        ({"kind": "bars", "series": (Series("s", (1, 2), (1.0, 2.0)),)}, "bars stand at categories"),
        ({"x_log": True, "series": (Series("s", ("a",), (1.0,)),)}, "no logarithm"),
        ({"series": (Series("s", ("a",), (1.0,)), Series("t", (1,), (1.0,)))}, "numbers as x and others with text"),
        ({"kind": "pie"}, "Got 'pie' as the kind"),
        ({"y_format": "euro"}, "Got 'euro' as the y_format"),
        ({"name": "../up"}, "becomes a file name"),
        ({"name": "up\n"}, "becomes a file name"),
    ],
)
def test_chart_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chart(**changes)


def test_report_refuses_two_charts_of_one_name() -> None:
    with pytest.raises(ValueError, match="Several charts of the report are called 'chart_scatter'"):
        Report("r", sections=(Section("a", charts=(chart(),)), Section("b", charts=(chart(name="Chart_scatter"),))))
    with pytest.raises(ValueError, match="status of a summary line"):
        SummaryLine("text", "maybe")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("kind", ["scatter", "lines", "bars", "histogram"])
def test_plotly_accepts_the_figure(kind: str, logarithmic: bool) -> None:
    figure = plotly_figure(chart(kind, y_log=logarithmic, x_log=logarithmic and kind != "bars"))
    plotly.graph_objects.Figure(json.loads(script_json(figure)))  # refuses unknown properties and values
    texts = json.dumps([trace.get("hovertext") for trace in figure["data"]])
    assert "<script" not in texts
    assert "<b>bold" not in texts


def test_dark_theme_changes_colours_alone() -> None:
    light, dark = (plotly_figure(chart(), theme=theme) for theme in ("light", "dark"))
    assert dark["data"][0]["line"]["color"] == COLOURS[0][1]
    assert [trace["y"] for trace in dark["data"]] == [trace["y"] for trace in light["data"]]


def test_same_group_same_colour_in_every_chart() -> None:
    first = Chart("a", "", "", "", "", "lines", (Series("x", (1,), (1.0,)), Series("y", (1,), (1.0,))))
    second = Chart("b", "", "", "", "", "lines", (Series("why", (1,), (1.0,), group="y"),))
    looks = Report("r", sections=(Section("s", charts=(first, second)),)).looks()
    colours = [plotly_figure(each, looks)["data"][-1]["line"]["color"] for each in (first, second)]
    assert colours[0] == colours[1] == COLOURS[1][0]


def test_colours_differ_and_stand_out() -> None:
    assert len(dark_colours()) == len(COLOURS) + 5  # else a colour of the light theme would mean two of the dark one
    for theme in (0, 1):
        assert len({pair[theme] for pair in COLOURS}) == len(COLOURS)
        for pair in COLOURS:
            assert contrast(pair[theme], SURFACE[theme]) >= 3
    looks = looks_of(map(str, range(56)))
    assert len({(look.light, look.matplotlib_marker) for look in looks.values()}) == 56


def contrast(one: str, other: str) -> float:
    """As WCAG defines it."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("kind", ["scatter", "lines", "bars", "histogram"])
def test_figures_are_the_same_every_time(kind: str, tmp_path: Path) -> None:
    first, second = (save_figure(chart(kind), tmp_path / name) for name in ("first", "second"))
    assert sorted(first) == ["png", "svg"]
    for form in first:
        assert first[form].read_bytes() == second[form].read_bytes()
    assert "<dc:date>" not in first["svg"].read_text()


def test_a_chart_without_data_is_drawn(tmp_path: Path) -> None:
    for kind in ("scatter", "lines", "bars", "histogram"):
        for series in ((), (Series("none", (), ()),)):
            empty = chart(kind, series=series, y_log=True)
            assert save_figure(empty, tmp_path, ["svg"])["svg"].stat().st_size > 0
            json.dumps(plotly_figure(empty), allow_nan=False)


def test_no_text_breaks_out_of_the_page() -> None:
    html = page(hostile_report())
    html.encode("utf-8")
    assert "\x00" not in html
    found = Tags(html)
    assert [tag for tag, _ in found.elements if tag in ("b", "iframe", "img", "object")] == []
    kinds = [attributes.get("type") for tag, attributes in found.elements if tag == "script"]
    assert kinds == ["application/json"] * 5 + [None, None]  # four charts, the colours; plotly.js, report.js
    for script in found.scripts[:5]:
        json.loads(script)
    assert "alert(1)" in "".join(found.texts)
    assert "n/a" in "".join(found.texts)


def test_page_asks_no_server() -> None:
    for tag, attributes in Tags(page(hostile_report())).elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("#", "data:,")), f"<{tag} {name}={value!r}>"
        if attributes.get("http-equiv") == "Content-Security-Policy":
            assert (attributes["content"] or "").startswith("default-src 'none';")


def test_markdown_of_hostile_text_stays_in_its_lines() -> None:
    text = markdown(hostile_report())
    text.encode("utf-8")
    assert "<script" not in text
    assert "](http" not in text.replace("\\](http", "")
    assert sum(line.startswith("# ") for line in text.splitlines()) == 1


def test_written_files(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.txt").write_text("stays")
    paths = write_report(hostile_report(), tmp_path)
    names = [
        f"figures/chart_{kind}.{form}" for kind in ("scatter", "lines", "bars", "histogram") for form in ("svg", "png")
    ]
    assert list(paths) == ["report.html", "report.md", *names, "tables/table.csv"]
    everything = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert everything == {*paths, "figures/mine.txt"}
    assert f"]({names[0]})" in paths["report.md"].read_text(encoding="utf-8")
    again = {name: path.read_bytes() for name, path in paths.items()}
    assert {name: path.read_bytes() for name, path in write_report(hostile_report(), tmp_path).items()} == again


def test_empty_report_has_no_plotly(tmp_path: Path) -> None:
    paths = write_report(Report("Nothing", sections=(Section("s", card_groups=(CardGroup("g", ()),)),)), tmp_path)
    assert list(paths) == ["report.html", "report.md"]
    assert "No features to show." in paths["report.html"].read_text(encoding="utf-8")
    assert paths["report.html"].stat().st_size < 50_000


def test_texts() -> None:
    assert token_text(" a\n\t", spaces=True) == "␣a⏎⇥"
    assert token_text("  ", spaces=True) == "␣␣"
    assert token_text("") == "∅"
    assert printable("\x00\u202e\ud800\u200d") == "␀<U+202E>\ufffd\u200d"
    numbers = (0, 1234567, 0.012345, 12345.6, 1e-7, -3.0, math.inf, None)
    assert [*map(number_text, numbers)] == ["0", "1,234,567", "0.01235", "12,346", "1.000e-07", "-3", "n/a", "n/a"]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((1, 50), ("1", "2", "5", "10", "20", "50")),
        ((1e-6, 1), ("10⁻⁶", "10⁻⁵", "0.0001", "0.001", "0.01", "0.1", "1")),
        ((2.0, 2.0), ("1.5", "2", "3")),
        ((math.nan, 0, -1), ("1", "2", "5", "10")),
    ],
)
def test_logarithmic_axis(values: tuple[float, ...], texts: tuple[str, ...]) -> None:
    assert log_axis(values).texts == texts


def test_text_has_columns_with_numbers_on_the_right() -> None:
    table = Table(
        "n",
        "T",
        "",
        ("SAE", "KL", "alive"),
        (("a", Estimate(0.5, 0.4, 0.6), 7), ("long name", None, 1024)),
        {"KL": "{:.2f}"},
    )
    assert table.to_text().splitlines() == [
        "SAE                       KL  alive",
        "-----------------------------------",
        "a          0.50 [0.40, 0.60]      7",
        "long name                  —  1,024",
    ]
    assert table._repr_markdown_() == table.to_markdown()
