"""Several SAEs in one run: spliced together, one after the other, or side by side."""

from e2e_sae_plugin.joint.config import MultiE2ESAERunnerConfig as MultiE2ESAERunnerConfig
from e2e_sae_plugin.joint.evaluate import JointEvaluation as JointEvaluation
from e2e_sae_plugin.joint.runner import MultiE2ESAETrainingRunner as MultiE2ESAETrainingRunner
from e2e_sae_plugin.joint.sae_set import SAESet as SAESet
from e2e_sae_plugin.joint.sae_set import load_sae_set as load_sae_set
