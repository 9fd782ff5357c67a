"""How models are loaded: large ones by `model_from_pretrained_kwargs`, quantised or on several devices; unknown names.

What cannot work is refused by name.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sae_lens.constants import DTYPE_MAP
from transformer_lens.loading_from_pretrained import make_model_alias_map
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

BUNDLED = "e2e-sae-demo"
"""`model_name` of the bundled model, and `dataset_path` of its training text."""
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
    """Return what the loader gets: dtypes, which files hold by name, as torch's; quantised weights are put where the model
    is to be at once, which the loader would otherwise choose for itself, and move afterwards."""
    settings = dict(settings)
    for name in ("dtype", "torch_dtype"):
        if settings.get(name) in DTYPE_MAP:
            settings[name] = DTYPE_MAP[settings[name]]
    if model_class_name == HUGGING_FACE and settings.get("quantization_config") is not None:
        settings["quantization_config"] = dict(settings["quantization_config"])
        settings["device_map"] = settings.get("device_map") or {"": device}
    return settings


def check_model_folder(model_name: str) -> None:
    """Reject a path of a model that is not there, before it is taken for a name of the Hub.

    Raises:
        ValueError: If there is no such folder, or no model in it.
    """
    path = Path(model_name)
    if model_name.startswith((".", "/", "~")) and not path.is_dir():
        raise ValueError(
            f"There is no folder {model_name!r} (model_name, --model). Give a folder with a model's config.json and "
            "weights, or the name of a model of the Hub."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"The folder {model_name!r} (model_name, --model) holds no model: it has no config.json. Give the folder that "
            "save_pretrained wrote, or the name of a model of the Hub."
        )


def unknown_model(model_name: str) -> str:
    """What is wrong with a `model_name` that TransformerLens does not know, and what may have been meant."""
    if Path(model_name).is_dir():
        said = f"model_name={model_name!r} is a folder, and a HookedTransformer is loaded by name alone."
    else:
        near = ", ".join(_near_models(model_name))
        said = f"model_name={model_name!r} is no model that TransformerLens knows. The nearest names: {near}."
    return (
        f"{said} A model of your own, in a folder or on the Hub, needs model_class_name (--model-class) "
        "AutoModelForCausalLM or TransformerBridge. If this is the name in the metadata of an SAE that was trained with "
        "override_model, which nothing can be loaded by, say which model it is of: --model of e2e-sae evaluate, compare and "
        "finetune (there with --force), or evaluate() in Python, which takes the model itself."
    )


def _near_models(model_name: str, n: int = 4) -> list[str]:
    """TransformerLens's names and aliases and the bundled model's, nearest first, whatever the case; always some."""
    names = {name.lower(): name for name in (*make_model_alias_map(), *OFFICIAL_MODEL_NAMES, BUNDLED)}
    typed = model_name.lower()
    # An organisation that is missing or wrong makes two spellings of one model look unlike.
    plain = typed.rsplit("/", 1)[-1]

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, name, typed).ratio()
        return max(whole, 0.99 * difflib.SequenceMatcher(None, name.rsplit("/", 1)[-1], plain).ratio())

    return [names[name] for name in sorted(names, key=lambda name: (-likeness(name), name))[:n]]
