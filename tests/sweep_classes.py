"""Every class of causal decoders that transformers has: is it built tiny, and can an SAE be put on its residual stream?"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from helpers import proxy
from splice_cells import failure, first_line, outcome
from tiny_configs import N_LAYERS, tiny_config, tiny_model
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NOT_BUILT = "cannot be built tiny"
SECONDS_PER_CLASS = 300  # a class takes less than a second: this is against hangs, on any machine
START_BLOCK = N_LAYERS // 2


@dataclass(frozen=True)
class Swept:
    """A class, and what came of it."""

    class_name: str
    result: str


def try_all_classes() -> Iterator[Swept]:
    """Try each class once, with the first config of the mapping that it is built from."""
    by_class: dict[str, list[str]] = {}
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        by_class.setdefault(class_name, []).append(model_type)
    for class_name, model_types in sorted(by_class.items()):
        results = []
        for model_type in model_types:
            results.append(_try_class(model_type))
            if not results[-1].startswith(NOT_BUILT):
                break
        yield Swept(class_name, results[-1])


def _try_class(model_type: str) -> str:
    try:
        with _time_limit(SECONDS_PER_CLASS):
            model = tiny_model(tiny_config(CONFIG_MAPPING[model_type]))
            with torch.no_grad():
                model(torch.arange(8)[None])
    except Exception as error:
        return f"{NOT_BUILT}: {type(error).__name__}: {first_line(error)}"
    layers = decoder_layers(model)
    if layers is None:
        return f"{NOT_BUILT}: it has no list of {N_LAYERS} decoder layers"
    try:
        with _time_limit(SECONDS_PER_CLASS):
            return outcome(proxy(model), f"{layers}.{START_BLOCK - 1}", START_BLOCK)
    except TimeoutError as error:
        return failure(error)


def decoder_layers(model: Any) -> str | None:
    """Path of the decoder's list of layers: the outermost one of the right length that is not of another modality."""
    decoder = model.get_decoder()
    paths = {id(module): path for path, module in model.named_modules()}
    for root in (paths.get(id(decoder), ""), ""):
        lists = [
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == N_LAYERS and path.startswith(root)
        ]
        lists = [path for path in lists if not re.search(r"image|vision|audio|\.\d+\.", path)]
        if lists:
            return lists[0]
    return None


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread once the time is over."""

    def stop(_: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
