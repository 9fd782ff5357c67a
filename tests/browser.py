"""A real browser for the tests of reports and site: opens a page, notes what it complains about or asks other hosts for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright
from time_limits import hang_seconds

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)
LOCAL = ("file:", "data:", "blob:", "about:", "http://127.0.0.1:")

# In the page: the contrast of an element's text with what is behind it, as WCAG computes it. Colours go through a canvas,
# as they may be written in any way.
CONTRAST = """
(element) => {
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  const over = (colour) => { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); };
  const luminance = () => {
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = [];
  for (let each = element; each; each = each.parentElement) behind.unshift(getComputedStyle(each).backgroundColor);
  over("white");
  behind.forEach(over);
  const background = luminance();
  over(getComputedStyle(element).color);
  const text = luminance();
  return (Math.max(text, background) + 0.05) / (Math.min(text, background) + 0.05);
}
"""


@dataclass
class Visit:
    """A page that is open."""

    page: Page
    problems: list[str] = field(default_factory=list)
    """Errors and warnings on the console, exceptions, requests that failed or left the machine."""

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def contrasts(self, selector: str) -> list[float]:
        """Of the text of every visible element that matches."""
        visible = "elements.filter((each) => each.checkVisibility())"
        return self.page.eval_on_selector_all(selector, f"(elements) => {visible}.map({CONTRAST})")

    def screenshot(self, path: Path) -> None:
        """The whole page, as far down as it goes."""
        self.page.screenshot(path=path, full_page=True)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The Chromium or Chrome of this machine; without one, the test is skipped, but in CI it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        message = f"There is no Chromium or Chrome on the PATH (looked for {', '.join(NAMES)}), so no page was opened."
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS), timeout=1000 * hang_seconds())
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Browser,
    place: Path | str,
    width: int = 1366,
    height: int = 768,
    scheme: Literal["light", "dark"] = "light",
) -> Iterator[Visit]:
    """The page, a file or an address, in a window of that size, for somebody who prefers that theme."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(1000 * hang_seconds())
    visit = Visit(context.new_page())

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            visit.problems.append(f"console: {message.text}")

    def on_request(request: Request) -> None:
        if not request.url.startswith(LOCAL):
            visit.problems.append(f"request to {request.url}")

    visit.page.on("console", on_console)
    visit.page.on("request", on_request)
    visit.page.on("requestfailed", lambda request: visit.problems.append(f"failed: {request.url}"))
    visit.page.on("pageerror", lambda error: visit.problems.append(f"exception: {error}"))
    try:
        visit.page.goto(place if isinstance(place, str) else place.resolve().as_uri(), wait_until="load")
        yield visit
    finally:
        context.close()
