"""`model_from_pretrained_kwargs` of large models: quantised, or on several devices; what cannot work is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

HUGGING_FACE = "AutoModelForCausalLM"
SHARDED = ("tp_plan", "tp_size", "distributed_config")
BITS_AND_BYTES = ("load_in_4bit", "load_in_8bit")


def check_model_settings(
    model_class_name: str, settings: Mapping[str, Any] | None, device: str | None = None, llm_device: str | None = None
) -> None:
    """Refuse settings of a model's loading that cannot work, or would have no effect.

    Args:
        settings: `model_from_pretrained_kwargs`.
        device: the SAE's.
        llm_device: the model's, where it was given.

    Raises:
        ValueError: names the setting, what it got and what to do.
    """
    settings = settings or {}
    for name in SHARDED:
        if settings.get(name) is not None:
            raise ValueError(
                f"model_from_pretrained_kwargs: {name}={settings[name]!r} cannot be used in a run: every process of it "
                "would train and write the same SAE. For a model that does not fit on one device, use device_map, which "
                "spreads it over the devices of one process, or quantization_config."
            )
    if (quantisation := settings.get("quantization_config")) is not None:
        _check_quantisation(model_class_name, quantisation)
    if settings.get("device_map") is None:
        return
    if model_class_name == "HookedTransformer":
        raise ValueError(
            f"model_from_pretrained_kwargs: device_map={settings['device_map']!r} is Hugging Face's. Use model_class_name: "
            f"{HUGGING_FACE}, or n_devices, which TransformerLens has."
        )
    if llm_device is not None and llm_device != device:
        raise ValueError(
            f"llm_device={llm_device!r} has no effect beside model_from_pretrained_kwargs' device_map="
            f"{settings['device_map']!r}, which says where the model is. Leave one of them out."
        )
    if isinstance(settings["device_map"], str) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"model_from_pretrained_kwargs: device_map={settings['device_map']!r} with several processes (WORLD_SIZE="
            f"{os.environ['WORLD_SIZE']}): each would spread its model over the same devices. Start one process, or leave "
            "device_map out so that each has the model on its own device."
        )


def _check_quantisation(model_class_name: str, quantisation: Any) -> None:
    if model_class_name != HUGGING_FACE:
        raise ValueError(
            f"model_from_pretrained_kwargs: quantization_config is Hugging Face's, and model_class_name="
            f"{model_class_name!r} needs weights that are not quantised. Use model_class_name: {HUGGING_FACE}."
        )
    if not isinstance(quantisation, Mapping):
        example = getattr(quantisation, "to_diff_dict", dict)()
        raise ValueError(
            "model_from_pretrained_kwargs: quantization_config must be a plain mapping, which the SAE's metadata can keep, "
            f"got a {type(quantisation).__name__}. Write {example or {'load_in_8bit': True}!r}."
        )
    try:
        json.dumps(quantisation)
    except TypeError as error:
        raise ValueError(
            f"model_from_pretrained_kwargs: quantization_config holds what no file can keep: {error}. Write dtypes as "
            "strings, such as 'bfloat16'."
        ) from None
    wanted = [name for name in BITS_AND_BYTES if quantisation.get(name)]
    if quantisation.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return  # Hugging Face's other methods say themselves what they lack
    if len(wanted) != 1:
        raise ValueError(
            f"model_from_pretrained_kwargs: quantization_config={dict(quantisation)!r} must set one of "
            f"{' and '.join(BITS_AND_BYTES)} to true."
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"model_from_pretrained_kwargs: quantization_config: {wanted[0]} needs bitsandbytes: "
            'pip install "e2e-sae-plugin[quantized]".'
        )


def loading_settings(model_class_name: str, settings: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What the loader gets: quantised weights are put where the model is to be at once, which the loader would otherwise
    choose for itself, and move afterwards."""
    settings = dict(settings)
    if model_class_name == HUGGING_FACE and settings.get("quantization_config") is not None:
        settings["quantization_config"] = dict(settings["quantization_config"])
        settings["device_map"] = settings.get("device_map") or {"": device}
    return settings
