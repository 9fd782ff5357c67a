"""The built site, in a real browser: in light and dark, at desktop and phone width.

Nothing is asked of another host, the console is silent, no page is wider than its window, axe-core finds nothing to mend
(contrast, names, landmarks, keyboard), search finds what there is, and the keyboard reaches it.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import Visit, chromium, opened
from playwright.sync_api import Browser

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(page.relative_to(ROOT / "docs").with_suffix("")).removesuffix("index")
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    if ".ipynb_checkpoints" not in page.parts
)
WINDOWS = {"desktop": (1366, 768), "phone": (390, 844)}
# Every page in both windows and both schemes; pages of each kind in all four.
LOOKS = [(page, *look) for page in PAGES for look in (("desktop", "light"), ("phone", "dark"))]
EACH_KIND = ("", "concepts/method", "guides/training", "notebooks/train_and_look", "reference/objective")
LOOKS += [(page, *look) for page in EACH_KIND for look in (("desktop", "dark"), ("phone", "light"))]
# Off is one recommendation, no criterion of WCAG: the theme makes a landmark of every code block's button, all of one name.
AXE = {"resultTypes": ["violations"], "rules": {"landmark-unique": {"enabled": False}}}

pytestmark = [pytest.mark.documentation]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[str]:
    """The address of the site as it is built now."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        check=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    handler = functools.partial(_Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests say what went wrong."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.mark.parametrize(("page", "window", "scheme"), LOOKS)
def test_a_page_is_clean_and_accessible(browser, site, page, window, scheme):
    with opened(browser, f"{site}{page}", *WINDOWS[window], scheme=scheme) as visit:
        assert visit.page.locator("h1").count() == 1
        assert visit.overflow() <= 0, f"{visit.overflow()} pixels wider than the window"
        found = Axe().run(visit.page, options=AXE).response["violations"]
        assert not found, _told(found)
        assert visit.problems == []


def _told(violations: list[dict]) -> str:
    return "\n".join(
        f"{each['id']}: {each['help']}\n" + "\n".join(f"    {node['html'][:200]}" for node in each["nodes"][:5])
        for each in violations
    )


def test_search_finds_pages_and_functions(browser, site):
    with opened(browser, site) as visit:
        for query, expected in (("resume a run", "guides/resuming/"), ("load_pretrained", "reference/hub/")):
            _search(visit, query)
            links = visit.page.locator(".md-search-result__link").evaluate_all("all => all.map((each) => each.href)")
            assert any(expected in link for link in links[:5]), (query, links[:5])
        assert visit.problems == []


def _search(visit: Visit, query: str) -> None:
    visit.page.keyboard.press("/")  # no mouse
    visit.page.keyboard.press("Control+a")
    visit.page.keyboard.type(query)
    # A result's address has the whole query in it, so that those of half of it are not taken for the answer.
    whole = urllib.parse.quote_plus(query.split()[-1])
    visit.page.wait_for_selector(f".md-search-result__link[href$='{whole}']", state="attached")


def test_the_keyboard_reaches_content_and_can_be_seen_there(browser, site):
    with opened(browser, f"{site}guides/training/") as visit:
        visit.page.keyboard.press("Tab")
        assert "md-skip" in visit.page.evaluate("document.activeElement.className")  # past the navigation
        visit.page.keyboard.press("Enter")
        assert visit.page.url.endswith("#train-an-sae")
        reached = set()
        for _ in range(60):
            visit.page.keyboard.press("Tab")
            reached.add(visit.page.evaluate("document.activeElement.getAttribute('href')"))
        assert any("migrating/from_saelens" in (href or "") for href in reached), reached


def test_dark_mode_is_kept(browser, site):
    with opened(browser, site) as visit:
        visit.page.locator("label[title='Dark mode']").click()
        assert visit.page.locator("body").get_attribute("data-md-color-scheme") == "slate"
        visit.page.goto(f"{site}getting_started/")
        assert visit.page.locator("body").get_attribute("data-md-color-scheme") == "slate"


def test_home_is_one_screen_with_the_change_and_a_figure(browser, site):
    with opened(browser, site) as visit:
        for selector in (".home .highlight", ".home img", ".home .md-button--primary"):
            box = visit.page.locator(selector).first.bounding_box()
            assert box is not None
            assert box["y"] + box["height"] <= WINDOWS["desktop"][1], selector
        assert visit.page.locator(".home img").evaluate("each => each.naturalWidth") > 100


def test_formulas_are_drawn_and_not_left_as_latex(browser, site):
    with opened(browser, f"{site}concepts/method/") as visit:
        assert visit.page.locator("math").count() > 10
        text = visit.page.locator("article").inner_text()
        assert not re.search(r"\\(frac|sum|hat|mathrm)|\$\$", text)
        sum_sign = visit.page.locator("math munderover").first.bounding_box()
        assert sum_sign is not None
        assert sum_sign["height"] > 30  # bounds above and below, not beside it


def test_every_guide_is_reached_from_the_navigation(browser, site):
    with opened(browser, f"{site}guides/training/") as visit:
        hrefs = visit.page.locator(".md-nav--primary a").evaluate_all("all => all.map((each) => each.href)")
    for page in PAGES:
        if page.startswith("guides/"):
            assert any(href.split("#")[0] == f"{site}{page}/" for href in hrefs), page
