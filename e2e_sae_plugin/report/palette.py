"""Colours and markers: one look per group in every chart, on light and on dark backgrounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Theme = Literal["light", "dark"]


@dataclass(frozen=True)
class Look:
    """How one group is drawn."""

    light: str
    """Colour on a white background."""
    dark: str
    """Colour on a dark one."""
    plotly_symbol: str
    matplotlib_marker: str


# The colour-blind safe hues of Okabe and Ito, darkened or lightened to a contrast of at least 3 with their background.
# No colour of the light theme may occur twice: the page finds the dark one by it.
COLOURS = (
    ("#0072b2", "#4aa3df"),  # blue
    ("#d55e00", "#f0803c"),  # vermilion
    ("#008f68", "#1fc196"),  # bluish green
    ("#b5508c", "#d98bb9"),  # reddish purple
    ("#a87600", "#e69f00"),  # orange
    ("#24292f", "#f2f2f2"),  # black
    ("#3592c4", "#7cc8f5"),  # sky blue
    ("#857c00", "#f0e442"),  # yellow
)
SYMBOLS = (
    ("circle", "o"),
    ("square", "s"),
    ("diamond", "D"),
    ("triangle-up", "^"),
    ("triangle-down", "v"),
    ("cross", "P"),
    ("pentagon", "p"),
)

# What is not data: light, dark.
GREY = ("#9198a1", "#848d98")
TEXT = ("#1f2328", "#e6e8eb")
FRAME = ("#7d8590", "#8b949e")
GRID = ("#e3e6ea", "#31363d")
SURFACE = ("#ffffff", "#1a1d22")


def looks_of(groups: Iterable[str]) -> dict[str, Look]:
    """Group -> look, in the order in which the groups first occur. Eight colours and seven markers, which give 56 pairs
    before one is used again."""
    result: dict[str, Look] = {}
    for group in groups:
        if group not in result:
            light, dark = COLOURS[len(result) % len(COLOURS)]
            result[group] = Look(light, dark, *SYMBOLS[len(result) % len(SYMBOLS)])
    return result


def dark_colours() -> dict[str, str]:
    """Colour of the light theme -> colour of the dark one."""
    return dict((*COLOURS, GREY, TEXT, FRAME, GRID, SURFACE))
