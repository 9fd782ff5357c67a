"""Many SAEs on one stream of tokens and one clean pass: objectives, sparsities, seeds, hook points."""

from e2e_sae_plugin.sweep.config import SweepConfig as SweepConfig
from e2e_sae_plugin.sweep.config import SweepKind as SweepKind
from e2e_sae_plugin.sweep.runner import SweepFailed as SweepFailed
from e2e_sae_plugin.sweep.runner import SweepRunner as SweepRunner
