"""Memory that the C library keeps of freed tensors, given back before the next large ones."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

WORTH_BYTES = 2**26
"""A trim takes some 25 ms, and what is given back has to be mapped in anew when it is used again: only before tensors of a
dictionary of this size."""


def give_back(before_bytes: int) -> None:
    """Have glibc return its free memory to the system, if tensors of `before_bytes` are about to be made.

    The passes of a model leave some hundred megabytes behind in pieces that are too small to be unmapped one by one, and too
    small for an SAE's gradients. At d_sae 46,080 and GPT-2 small's shape it is a tenth of a step's peak. Nothing happens
    with another C library.
    """
    trim = _malloc_trim()
    if trim is not None and before_bytes >= WORTH_BYTES:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # no such function; on Windows, no library of that name
        return None
