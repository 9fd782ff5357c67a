"""What mkdocs does to pages besides its plugins.

Named in mkdocs.yml (`hooks`). Formulas are drawn as MathML when the site is built, so a page needs no script and nothing
of another host for them.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $...$ and $$...$$ (generic: true).
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[\(\[](?P<latex>.*?)\\[\)\]]</(?P=tag)>', re.DOTALL)


# Markdown has no tables without a head; an empty cell of it is no heading, and a head of empty cells is none.
EMPTY_HEADING = re.compile(r"<th(?P<style>[^>]*)></th>")
EMPTY_HEAD = re.compile(r"<thead>\s*<tr>(\s*<td[^>]*></td>)+\s*</tr>\s*</thead>")


def on_page_content(page_html: str, **_: Any) -> str:
    """Called by mkdocs with the page's body as HTML."""
    page_html = FORMULA.sub(lambda found: mathml(found["latex"], display=found["tag"] == "div"), page_html)
    return EMPTY_HEAD.sub("", EMPTY_HEADING.sub(r"<td\g<style>></td>", page_html))


def on_post_page(output: str, **_: Any) -> str:
    """Called by mkdocs with the whole page: the theme's search dialog has no name of its own for screen readers."""
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def mathml(escaped_latex: str, *, display: bool) -> str:
    """The formula as MathML.

    Raises:
        ValueError: part of it cannot be converted, and would stand there as LaTeX.
    """
    latex = html.unescape(escaped_latex).strip()
    drawn = convert(latex, display="block" if display else "inline")
    if "\\" in drawn or "&<" in drawn:
        raise ValueError(f"latex2mathml does not know all of the formula {latex!r}: {drawn}")
    return f'<div class="formula" tabindex="0">{drawn}</div>' if display else drawn
