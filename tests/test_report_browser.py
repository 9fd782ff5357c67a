"""A report as a person sees it: in a real browser, on a laptop and on a phone, in the light and in the dark."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("playwright", reason="playwright opens the pages")
from playwright.sync_api import Browser

from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.feature_card import ActivatingContext, FeatureCard
from e2e_sae_plugin.report import CardGroup, Chart, Report, Section, Series, SummaryLine, Table, write_report
from tests.browser import Visit, chromium, opened

pytestmark = pytest.mark.slow

KINDS = ("local", "e2e", "e2e + downstream")
LAYERS = tuple(f"blocks.{layer}" for layer in range(7))
WORDS = ("the", "of", "and", "to", "in", "is", "that", "was", "for", "it", "with", "as", "his", "on", "be", "at", "by")
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<b>bold</b>",
    "\"'",
    "\x00",
    "🦊",
    "\n",
    "   ",
    "\u202e",
    "\u0627",
    "x" * 70,
)


def made_up_report() -> Report:
    """Three kinds of SAE at five sparsities; charts of every kind."""
    rng = random.Random(0)
    return Report(
        title="End-to-end and local SAEs compared",
        subtitle="Made-up numbers · 3 kinds, 5 sparsities, layer 6 of a model of 12 layers · 500,000 held-out tokens",
        summary=(
            SummaryLine("At equal CE loss, e2e SAEs use 0.45 [0.41, 0.49] times the features of local ones.", "ok"),
            SummaryLine("Downstream SAEs need fewer features than e2e SAEs.", "not"),
            SummaryLine("Whether their features are as easy to explain cannot be told from 60 features.", "unclear"),
            SummaryLine("Every number comes with the 95 % interval of a bootstrap over sequences."),
        ),
        warnings=("Two of the 15 SAEs were still improving when their training ended: give them more tokens.",),
        sections=(
            Section("Pareto fronts", "First paragraph.\n\nSecond one.", (_front(rng), _dead(rng)), (_table(rng),)),
            Section("Geometry", charts=(_layers(rng), _cosines(rng), _curves(rng), _bars_of_two(rng))),
            Section("Features", "Chosen by density.", card_groups=tuple(_cards(rng, kind) for kind in KINDS[:2])),
            Section("Nothing here"),
        ),
    )


def _front(rng: random.Random) -> Chart:
    series: list[Series] = []
    for place, kind in enumerate(KINDS):
        l0 = tuple(8.0 * 2**step * (1 + 0.2 * place) for step in range(5))
        loss = tuple(1.2 / value**0.9 * (2.4 - 0.7 * place) + 0.002 for value in l0)
        low, high = tuple(0.9 * value for value in loss), tuple(1.12 * value for value in loss)
        names = tuple(f"{kind}, coefficient {0.5**step:g}" for step in range(5))
        series.append(Series(kind, l0, loss, low, high, names, kind))
        worse = tuple(value * rng.uniform(1.3, 1.8) for value in loss[1:3])
        series.append(Series("dominated", l0[1:3], worse, None, None, names[1:3], kind, "greyed"))
        series.append(
            Series(f"{kind}, published", (27.0 + 9 * place,), (0.1 / (1 + place),), group=kind, style="reference")
        )
    caption = (
        "CE loss increase over the model without an SAE. Error bars: 95 % intervals of a bootstrap over sequences."
    )
    return Chart(
        "front", "CE loss increase against L0", caption, "L0 (features per token)", "CE loss increase (nats)", "scatter",
        tuple(series), x_log=True, y_log=True, wide=True,
    )  # fmt: skip


def _dead(rng: random.Random) -> Chart:
    names = tuple(f"{0.5**step:g}" for step in range(5))
    bars = tuple(
        Series(kind, names, y := tuple(rng.uniform(0.05, 0.4) for _ in names), tuple(v - 0.03 for v in y),
               tuple(v + 0.03 for v in y), group=kind)
        for kind in KINDS
    )  # fmt: skip
    return Chart(
        "dead", "Dead features", "Share of the features that never fire.", "Sparsity coefficient", "Dead", "bars", bars,
        y_format="percent",
    )  # fmt: skip


def _layers(rng: random.Random) -> Chart:
    series: list[Series] = []
    for place, kind in enumerate(KINDS):
        y = tuple(0.02 * (4 - place) * (1 + layer) + rng.uniform(0, 0.02) for layer in range(len(LAYERS)))
        low, high = tuple(value - 0.02 for value in y), tuple(value + 0.02 for value in y)
        series.append(Series(kind, LAYERS, y, low, high, group=kind, style="dashed" if place == 2 else "solid"))
    return Chart("layers", "Error by layer", "Bands: 95 %.", "Layer", "Relative error", "lines", tuple(series))


def _cosines(rng: random.Random) -> Chart:
    edges = tuple(index / 20 for index in range(21))
    histograms = tuple(
        Series(kind, edges, tuple(900 * math.exp(-((edge - 0.3 - 0.25 * place) ** 2) / 0.02) for edge in edges[:-1]))
        for place, kind in enumerate(KINDS)
    )
    return Chart("cosines", "Cosine with the nearest feature", "", "Cosine", "Features", "histogram", histograms)


def _curves(rng: random.Random) -> Chart:
    steps = tuple(range(1, 400_001, 2000))
    curves = [
        Series(kind, steps, tuple(2 / step**0.3 * (1 + rng.uniform(0, 0.1)) for step in steps), group=kind)
        for kind in KINDS
    ]
    broken = Series("with a gap <b>", steps[:6], (1.0, math.nan, 0.5, math.inf, 0.2, 0.3), style="reference")
    return Chart("curves", "Training", "", "Tokens", "Loss", "lines", (*curves, broken), y_log=True)


def _bars_of_two(rng: random.Random) -> Chart:
    series = (
        Series("this run", ("Gram", "KL of features"), (0.3, -0.1), group=KINDS[0]),
        Series("published", ("Gram", "KL of features"), (0.4, 0.2), group=KINDS[0], style="reference"),
        Series("hatched", ("Gram", "KL of features"), (0.1, 0.2), group=KINDS[1], style="dashed"),
    )
    return Chart("two", "Two numbers", "", "Measure", "Value", "bars", series)


def _table(rng: random.Random) -> Table:
    rows = tuple(
        (
            kind,
            step,
            Estimate(v := rng.uniform(0.01, 0.4), 0.9 * v, 1.1 * v),
            12345 * (step + 1),
            rng.random(),
            math.nan,
        )
        for kind in KINDS
        for step in range(5)
    )
    columns = ("kind", "sparsity", "CE loss increase", "alive features", "explained variance", "not measured")
    formats = {"CE loss increase": "{:.4f}", "explained variance": "{:.1%}"}
    return Table("saes", "All SAEs", "Sorted by kind; a header sorts by its column.", columns, rows, formats)


def _cards(rng: random.Random, kind: str) -> CardGroup:
    cards: list[FeatureCard] = []
    for index in range(6):
        contexts: list[ActivatingContext] = []
        for rank in range(5):
            tokens = [" " + rng.choice(WORDS) for _ in range(24)]
            tokens[3 * rank + 2] = HOSTILE[(index + rank) % len(HOSTILE)]
            values = [max(0.0, rng.gauss(-1, 1.5)) for _ in tokens]
            values[12] = 9.5 - rank
            contexts.append(ActivatingContext(tuple(tokens), tuple(values), 12))
        logits = tuple((token, 1.5 - 0.1 * place) for place, token in enumerate((" Paris", "\n", "  ", *HOSTILE[:4])))
        density, importance = 10.0 ** -(1 + index / 2), math.nan if index == 5 else 0.0123 / (1 + index)
        cards.append(
            FeatureCard(
                100 * index + 7, density, importance, index % 2 == 0, 9.5, tuple(contexts), logits, logits[::-1]
            )
        )
    return CardGroup(f"Features of {kind}", tuple(cards))


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(made_up_report(), tmp_path_factory.mktemp("report"))["report.html"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1366, 768), (390, 844)])
def test_report_is_shown_whole_and_asks_no_server(
    browser: Browser, report_file: Path, tmp_path: Path, width: int, height: int, scheme: Literal["light", "dark"]
) -> None:
    with opened(browser, report_file, width, height, scheme) as visit:
        check_charts_are_drawn(visit, expected=6)
        assert visit.overflow() <= 0
        for selector in (
            "p, li, td, th, dt, dd, figcaption, summary, h1, h2, h3, h4, a, button, .status > span",
            "mark",
        ):
            contrasts = visit.contrasts(selector)
            assert contrasts
            assert min(contrasts) >= 4.5
        visit.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert visit.overflow() <= 0
        visit.screenshot(tmp_path / "page.png")
        assert visit.problems == []


def check_charts_are_drawn(visit: Visit, expected: int) -> None:
    drawings = visit.page.query_selector_all(".chart .main-svg:first-of-type")
    boxes = [drawing.bounding_box() for drawing in drawings]
    assert len(boxes) == expected
    assert all(box and box["width"] > 200 and box["height"] > 200 for box in boxes)
    drawn = visit.page.evaluate(
        "[...document.querySelectorAll('.chart')].map((each) => each.querySelectorAll('.trace path').length)"
    )
    assert len(drawn) == expected
    assert min(drawn) > 1
    # The axes keep room to draw in, whatever the legend takes.
    areas = visit.page.evaluate("[...document.querySelectorAll('.chart')].map((each) => each._fullLayout._size)")
    assert all(area["w"] > 200 and area["h"] > 150 for area in areas)


def test_theme_button_recolours_page_and_charts(browser: Browser, report_file: Path) -> None:
    with opened(browser, report_file) as visit:
        colours = "[getComputedStyle(document.body).color, document.querySelector('.chart .xtitle').style.fill]"
        light = visit.page.evaluate(colours)
        visit.page.get_by_role("button", name="Dark theme").click()
        dark = visit.page.evaluate(colours)
        assert light[0] != dark[0]
        assert light[1] != dark[1]
        assert min(visit.contrasts("p, td, th")) >= 4.5
        visit.page.get_by_role("button", name="Light theme").press("Enter")
        assert visit.page.evaluate(colours) == light
        assert visit.problems == []


def test_no_button_uploads_a_chart(browser: Browser, report_file: Path) -> None:
    with opened(browser, report_file) as visit:
        buttons = visit.page.locator(".chart").first.locator(".modebar-btn")
        names = {button.get_attribute("data-title") for button in buttons.all()}
        assert names == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}
        with visit.page.expect_download() as download:
            visit.page.locator(".chart").first.hover()
            buttons.first.click()
        assert download.value.path().read_bytes().startswith(b"\x89PNG")
        assert visit.problems == []


def test_header_sorts_by_value(browser: Browser, report_file: Path) -> None:
    with opened(browser, report_file) as visit:
        table = visit.page.locator(".table table")
        header = table.get_by_role("button", name="alive features")
        values = "(body) => [...body.rows].map((row) => Number(row.cells[3].dataset.value))"
        header.click()
        ascending = table.locator("tbody").evaluate(values)
        header.press("Enter")
        descending = table.locator("tbody").evaluate(values)
        assert ascending == sorted(ascending)
        assert descending == sorted(ascending, reverse=True)
        assert table.locator("th[aria-sort]").count() == 1
        assert visit.problems == []


def test_hostile_tokens_are_only_text(browser: Browser, report_file: Path) -> None:
    with opened(browser, report_file) as visit:
        visit.page.on("dialog", lambda dialog: visit.problems.append(f"dialog: {dialog.message}"))
        assert visit.page.locator("mark b, .tokens b, .tokens script").count() == 0
        assert "</script><script>alert(1)</script>" in visit.page.locator(".cards").first.inner_text()
        assert visit.problems == []
