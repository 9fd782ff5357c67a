"""End-to-end training of sparse autoencoders, plugged into SAELens."""

from e2e_sae_plugin._version import __version__ as __version__
from e2e_sae_plugin.checkpoint import DamagedCheckpointError as DamagedCheckpointError
from e2e_sae_plugin.comparison import compare as compare
from e2e_sae_plugin.comparison import write_comparison as write_comparison
from e2e_sae_plugin.config import E2ESAERunnerConfig as E2ESAERunnerConfig
from e2e_sae_plugin.evaluation import evaluate as evaluate
from e2e_sae_plugin.evaluation import feature_importance as feature_importance
from e2e_sae_plugin.faults import NonFiniteError as NonFiniteError
from e2e_sae_plugin.finetune import FinetuneRunner as FinetuneRunner
from e2e_sae_plugin.finetune import finetune_config as finetune_config
from e2e_sae_plugin.finetune import load_sae as load_sae
from e2e_sae_plugin.hub.calls import HubError as HubError
from e2e_sae_plugin.hub.load import load_pretrained as load_pretrained
from e2e_sae_plugin.hub.published import list_pretrained as list_pretrained
from e2e_sae_plugin.hub.upload import push_to_hub as push_to_hub
from e2e_sae_plugin.interruption import RunInterrupted as RunInterrupted
from e2e_sae_plugin.objective import Objective as Objective
from e2e_sae_plugin.presets import paper_config as paper_config
from e2e_sae_plugin.runner import E2ESAETrainingRunner as E2ESAETrainingRunner
from e2e_sae_plugin.splice import SplicedModel as SplicedModel
from e2e_sae_plugin.splice import splice_into as splice_into
from e2e_sae_plugin.sweep import SweepConfig as SweepConfig
from e2e_sae_plugin.sweep import SweepKind as SweepKind
from e2e_sae_plugin.sweep import SweepRunner as SweepRunner
from e2e_sae_plugin.trainer import E2ESAETrainer as E2ESAETrainer
