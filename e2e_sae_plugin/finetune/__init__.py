"""Fine-tuning finished SAEs, so that the model's output survives them."""

from e2e_sae_plugin.finetune.recipe import finetune_config as finetune_config
from e2e_sae_plugin.finetune.report import FinetuneReport as FinetuneReport
from e2e_sae_plugin.finetune.runner import FinetuneRunner as FinetuneRunner
from e2e_sae_plugin.finetune.start import load_sae as load_sae
from e2e_sae_plugin.finetune.start import training_config as training_config
from e2e_sae_plugin.finetune.start import training_counterpart as training_counterpart
