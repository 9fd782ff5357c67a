"""Which cases of a test `make test` runs; the others are `slow`, and `make check` runs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """The cases of a `parametrize`, all but `kept` marked slow. A tuple has one value for each argument."""
    found = [_param(case) if case in kept else _param(case, pytest.mark.slow) for case in cases]
    assert len([each for each in found if not each.marks]) == len(kept), "a case that is kept is none of the cases"
    return found


def _param(case: Any, *marks: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)
