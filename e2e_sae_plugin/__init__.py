"""End-to-end training of sparse autoencoders, plugged into SAELens.

Names are imported when they are first asked for: torch and SAELens take seconds, which `e2e-sae --help` need not wait for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from e2e_sae_plugin._version import __version__ as __version__

if TYPE_CHECKING:
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
    from e2e_sae_plugin.joint import MultiE2ESAERunnerConfig as MultiE2ESAERunnerConfig
    from e2e_sae_plugin.joint import MultiE2ESAETrainingRunner as MultiE2ESAETrainingRunner
    from e2e_sae_plugin.joint import SAESet as SAESet
    from e2e_sae_plugin.joint import load_sae_set as load_sae_set
    from e2e_sae_plugin.objective import Objective as Objective
    from e2e_sae_plugin.presets import paper_config as paper_config
    from e2e_sae_plugin.presets import quick_config as quick_config
    from e2e_sae_plugin.runner import E2ESAETrainingRunner as E2ESAETrainingRunner
    from e2e_sae_plugin.splice import SplicedModel as SplicedModel
    from e2e_sae_plugin.splice import splice_into as splice_into
    from e2e_sae_plugin.sweep import SweepConfig as SweepConfig
    from e2e_sae_plugin.sweep import SweepKind as SweepKind
    from e2e_sae_plugin.sweep import SweepRunner as SweepRunner
    from e2e_sae_plugin.trainer import E2ESAETrainer as E2ESAETrainer

__all__ = [
    "DamagedCheckpointError",
    "E2ESAERunnerConfig",
    "E2ESAETrainer",
    "E2ESAETrainingRunner",
    "FinetuneRunner",
    "HubError",
    "MultiE2ESAERunnerConfig",
    "MultiE2ESAETrainingRunner",
    "NonFiniteError",
    "Objective",
    "RunInterrupted",
    "SAESet",
    "SplicedModel",
    "SweepConfig",
    "SweepKind",
    "SweepRunner",
    "__version__",
    "compare",
    "evaluate",
    "feature_importance",
    "finetune_config",
    "list_pretrained",
    "load_pretrained",
    "load_sae",
    "load_sae_set",
    "paper_config",
    "push_to_hub",
    "quick_config",
    "splice_into",
    "write_comparison",
]

# Module -> the names above that it defines.
_DEFINED_IN = {
    "checkpoint": ("DamagedCheckpointError",),
    "comparison": ("compare", "write_comparison"),
    "config": ("E2ESAERunnerConfig",),
    "evaluation": ("evaluate", "feature_importance"),
    "faults": ("NonFiniteError",),
    "finetune": ("FinetuneRunner", "finetune_config", "load_sae"),
    "hub.calls": ("HubError",),
    "hub.load": ("load_pretrained",),
    "hub.published": ("list_pretrained",),
    "hub.upload": ("push_to_hub",),
    "interruption": ("RunInterrupted",),
    "joint": ("MultiE2ESAERunnerConfig", "MultiE2ESAETrainingRunner", "SAESet", "load_sae_set"),
    "objective": ("Objective",),
    "presets": ("paper_config", "quick_config"),
    "runner": ("E2ESAETrainingRunner",),
    "splice": ("SplicedModel", "splice_into"),
    "sweep": ("SweepConfig", "SweepKind", "SweepRunner"),
    "trainer": ("E2ESAETrainer",),
}
_MODULE_OF = {name: module for module, names in _DEFINED_IN.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is not None:
        value = getattr(import_module(f"{__name__}.{module}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")  # `e2e_sae_plugin.splice` without an import of its own
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # not asked for again
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
