"""The bundled model and its text by name, as a config or an SAE's metadata give them."""

from __future__ import annotations

from datasets import Dataset
from transformer_lens import HookedTransformer

from e2e_sae_plugin.demo.data import demo_dataset
from e2e_sae_plugin.demo.model import load_demo_model
from e2e_sae_plugin.model_settings import BUNDLED as BUNDLED


def bundled_model(model_name: str | None, device: str = "cpu") -> HookedTransformer | None:
    """The bundled model where that is what is meant; else None."""
    return load_demo_model(device=device) if model_name == BUNDLED else None


def bundled_dataset(dataset_path: str | None, context_size: int) -> Dataset | None:
    """The training split of the bundled model's text where that is what is meant; else None."""
    return demo_dataset("train", context_size) if dataset_path == BUNDLED else None
