"""Text and numbers as a person reads them, whatever is in them."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from numbers import Real
from typing import TypeGuard

NOT_AVAILABLE = "n/a"
JOINERS = "\u200c\u200d"  # emoji and several scripts need these invisible characters
MARKDOWN_SPECIALS = re.compile(
    r"([\\`*|$]|~(?=~)|(?<!\w)_|_(?!\w)"  # a_b is no emphasis
    r"|\](?=[(\[:])"  # links; [0.1, 0.2] is none
    r"|^(?=[#+=-]+(?:\s|$))|(?<=^\d)(?=[.)]\s))"  # headings and lists; -0.1 is none
)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a number that can be drawn or written: not None, nan or infinite."""
    return isinstance(value, Real) and math.isfinite(value)  # Real: NumPy's numbers too


def number_text(value: float | None) -> str:
    """Four significant digits: 1,234, 0.01234, 1.234e-06; "n/a" where there is no finite number."""
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    if value == 0:
        return "0"
    if isinstance(value, int) and abs(value) < 1e9:
        return f"{value:,}"
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def printable(text: str, *, line_break: str = " ") -> str:
    """The text without characters that a file or a page could not hold or that would reorder what is around them.

    Args:
        line_break: takes the place of line breaks.
    """
    text = text.replace("\r\n", "\n").replace("\n", line_break)
    return "".join(map(_visible, text))


def token_text(text: str, *, spaces: bool = False) -> str:
    """A token with its line breaks and tabs as ⏎ and ⇥.

    Args:
        spaces: show spaces at its ends as well, as ␣, for a token that stands alone.
    """
    text = printable(text.replace("\t", "⇥"), line_break="⏎") or "∅"
    if spaces:
        start, end = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
        text = "␣" * len(text) if start == len(text) else "␣" * start + text.strip(" ") + "␣" * end
    return text


def escape_markdown(text: str) -> str:
    """The text so that Markdown shows it letter for letter, on one line."""
    escaped = html.escape(printable(text).strip(), quote=False)
    return MARKDOWN_SPECIALS.sub(r"\\\1", escaped)


def _visible(character: str) -> str:
    code = ord(character)
    if code < 32:
        return chr(0x2400 + code)  # the pictures ␀ ... ␟
    if code == 127:
        return "␡"
    category = unicodedata.category(character)
    if category == "Cs" or code & 0xFFFE == 0xFFFE:
        return "\ufffd"  # half a pair or no character at all: no UTF-8, no HTML
    if category in ("Cc", "Cf", "Zl", "Zp") and character not in JOINERS:
        return f"<U+{code:04X}>"
    return character
