"""Time limits of the tests. They end a test that hangs, and say nothing about speed: minutes, and more on a busy machine."""

from __future__ import annotations

import functools
import subprocess
import sys
import time

LEAST_SECONDS = 300.0
STARTS = 100
"""Every test's processes do less than this many starts of Python with torch would take."""


@functools.cache
def start_seconds() -> float:
    """How long this machine takes, now, to start a Python that imports torch. Measured once in a test session."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - began


def hang_seconds() -> float:
    """How long a test waits for a process, a thread or a page before it fails because that hangs."""
    return max(LEAST_SECONDS, STARTS * start_seconds())
