"""Fine-tuning finished SAEs, so that the model's output survives them."""

from e2e_sae_plugin.finetune.start import load_sae as load_sae
from e2e_sae_plugin.finetune.start import training_counterpart as training_counterpart
