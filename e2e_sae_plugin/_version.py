"""The version, from the installed distribution's metadata (`pyproject.toml` is the one place that states it)."""

from importlib.metadata import version

__version__ = version("e2e-sae-plugin")
