"""What the documentation points at is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_promise_of_reliability_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/reliability.md").read_text()))
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 30
    assert named <= defined, named - defined


def test_every_module_is_in_the_picture_of_the_architecture():
    picture = (ROOT / "docs/architecture.md").read_text().split("```")[1]
    for path in (ROOT / "e2e_sae_plugin").rglob("*.py"):
        if path.name != "__init__.py" and path.parent.name != "demo" and path.parent.name != "evaluation":
            assert re.search(rf"\s{re.escape(path.name)}\s", picture), path
