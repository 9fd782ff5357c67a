"""Imports the library of the paper's authors (`e2e-sae`, a development dependency: see `benchmarks/README.md`)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from unittest import mock

INSTALLED = importlib.util.find_spec("e2e_sae") is not None
HOW_TO_INSTALL = "the authors' library is not installed: pip install --no-deps e2e-sae==2.1.1"

# `e2e_sae.loader` imports one class of a script that the wheel leaves out.
_LEFT_OUT = "e2e_sae.scripts.train_tlens"


def import_authors() -> tuple[ModuleType, ModuleType]:
    """Their `losses` and `models.transformers` modules, with stand-ins for what their wheel leaves out.

    Raises:
        ImportError: the library is not installed.
    """
    if not INSTALLED:
        raise ImportError(HOW_TO_INSTALL)
    package, module = ModuleType(_LEFT_OUT), ModuleType(f"{_LEFT_OUT}.run_train_tlens")
    package.__path__ = []
    module.__dict__["HookedTransformerPreConfig"] = type("HookedTransformerPreConfig", (), {})
    sys.modules.setdefault(package.__name__, package)
    sys.modules.setdefault(module.__name__, module)
    # Importing them would configure the root logger and disable every logger that exists by then.
    # Their settings take CI to mean GitHub's runners, and read variables that only those have.
    with mock.patch("logging.config.dictConfig"), mock.patch.dict(os.environ):
        os.environ.pop("CI", None)
        return importlib.import_module("e2e_sae.losses"), importlib.import_module("e2e_sae.models.transformers")
