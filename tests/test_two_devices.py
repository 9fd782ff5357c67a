"""Model and SAE on two devices, in a process of its own: a device once made stays, and other libraries would find it.

The tests themselves are in `two_device_*.py`. With a GPU they also run on that: `pytest tests/two_device_steps.py -n 0`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from marks import slow_except
from torch.utils import backend_registration

HERE = Path(__file__).parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices made in Python",
)
@pytest.mark.parametrize(
    "name", slow_except(sorted(path.name for path in HERE.glob("two_device_*.py")), "two_device_blocks.py")
)
def test_on_two_devices(name: str):
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / name)], cwd=HERE.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout[-500:]
