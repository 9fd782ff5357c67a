"""Checkpoints of the paper's authors' library as SAELens SAEs, and their runs as configs."""

from e2e_sae_plugin.convert.convert import Converted, convert, convert_each

__all__ = ["Converted", "convert", "convert_each"]
