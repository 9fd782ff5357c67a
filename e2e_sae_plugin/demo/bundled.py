"""The bundled model and its text by name, as a config or an SAE's metadata give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from sae_lens.util import str_to_dtype
from transformer_lens import HookedTransformer

from e2e_sae_plugin.demo.data import demo_dataset
from e2e_sae_plugin.demo.model import load_demo_model
from e2e_sae_plugin.model_settings import BUNDLED as BUNDLED

SETTINGS = ("center_writing_weights", "dtype")


def bundled_model(model_class_name: str, settings: Mapping[str, Any], device: str) -> HookedTransformer:
    """Return the bundled model, loaded as `model_from_pretrained_kwargs` say.

    Raises:
        ValueError: If it is to be another class of model than a `HookedTransformer`, or for settings that it does not have.
    """
    if model_class_name != "HookedTransformer":
        raise ValueError(
            f"model_class_name={model_class_name!r} is not possible for {BUNDLED!r}. The bundled model is a "
            "HookedTransformer: leave model_class_name (--model-class) out."
        )
    if unknown := sorted(settings.keys() - SETTINGS):
        raise ValueError(
            f"model_from_pretrained_kwargs has {', '.join(unknown)}, which the bundled model {BUNDLED!r} does not take. It "
            f"takes {' and '.join(SETTINGS)}."
        )
    model = load_demo_model(device=device)
    if settings.get("center_writing_weights"):
        model.process_weights_(fold_ln=False, center_writing_weights=True, center_unembed=False)
    return model if settings.get("dtype") is None else model.to(str_to_dtype(settings["dtype"]), print_details=False)


def bundled_dataset(dataset_path: str | None, context_size: int) -> Dataset | None:
    """The training split of the bundled model's text where that is what is meant; else None."""
    return demo_dataset("train", context_size) if dataset_path == BUNDLED else None
