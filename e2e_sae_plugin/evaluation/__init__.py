"""Measuring SAEs."""

from e2e_sae_plugin.evaluation.metrics import SpliceMetrics as SpliceMetrics
from e2e_sae_plugin.evaluation.metrics import encode_with as encode_with
from e2e_sae_plugin.evaluation.metrics import measure as measure
from e2e_sae_plugin.evaluation.metrics import reconstruct_with as reconstruct_with
