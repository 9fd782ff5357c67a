"""The report of a real comparison in a real browser, on a laptop and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("playwright", reason="playwright opens the pages")
import torch
from playwright.sync_api import Browser
from test_comparison import KINDS, made_up_sae, put

from e2e_sae_plugin.comparison import Comparison, compare, write_comparison
from e2e_sae_plugin.demo import demo_tokens, load_demo_model
from tests.browser import chromium, opened

pytestmark = pytest.mark.slow

N_CARDS = 2


@pytest.fixture(scope="module")
def found() -> Comparison:
    """Three kinds x two sparsities x two seeds on the bundled model, with directions that its activations have."""
    model, tokens = load_demo_model(), demo_tokens("evaluation", 64)[:16]
    hook = "blocks.3.hook_resid_pre"
    with torch.no_grad():
        acts = model.run_with_cache(tokens, names_filter=hook)[1][hook].flatten(0, 1)
    centre = acts.mean(0)
    saes = {}
    for kind in KINDS:
        for sparsity in (60.0, 300.0):
            for seed in (0, 1):
                sae = made_up_sae(kind, sparsity, seed, d_in=128, d_sae=96, hook_name=hook, model_name="e2e-sae-demo")
                generator = torch.Generator().manual_seed(10 * seed + list(KINDS).index(kind))
                chosen = acts[torch.randperm(len(acts), generator=generator)[:96]] - centre
                directions = chosen / chosen.norm(dim=1, keepdim=True)
                put(sae, W_enc=directions.T, W_dec=directions * KINDS[kind], b_dec=centre)
                put(sae, b_enc=-sparsity - directions @ centre * (not sae.cfg.apply_b_dec_to_input))
                saes[f"{kind}-{sparsity:g}-seed{seed}"] = sae
    return compare(saes, model, tokens, n_cards=N_CARDS, n_exact=1)


@pytest.fixture(scope="module")
def report_file(found: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(found, tmp_path_factory.mktemp("comparison"))["report.html"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize(("width", "height", "scheme"), [(1366, 768, "light"), (390, 844, "dark")])
def test_the_report_of_a_comparison_is_shown_whole(
    browser: Browser,
    report_file: Path,
    found: Comparison,
    tmp_path: Path,
    width: int,
    height: int,
    scheme: Literal["light", "dark"],
):
    with opened(browser, report_file, width, height, scheme) as visit:
        charts = visit.page.locator(".chart")
        assert charts.count() == 10
        drawn = visit.page.evaluate(
            "[...document.querySelectorAll('.chart')].map((each) => each.querySelectorAll('.trace path').length)"
        )
        assert min(drawn) > 1
        areas = visit.page.evaluate("[...document.querySelectorAll('.chart')].map((each) => each._fullLayout._size)")
        assert all(area["w"] > 200 and area["h"] > 150 for area in areas)
        assert visit.overflow() <= 0
        cards = sum(len(each) for each in found.cards.values())
        assert cards > len(found.subjects)
        assert visit.page.locator(".card").count() == cards
        assert visit.page.locator(".table table").count() == 11
        assert min(visit.contrasts("p, li, td, th, figcaption, h1, h2, h3, h4, mark")) >= 4.5
        visit.screenshot(tmp_path / "page.png")
        visit.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert visit.overflow() <= 0
        assert visit.problems == []
