"""The two models that can be had without a network, with their text: the bundled one, and SmolLM2-135M."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.load_model import load_model
from torch import Tensor

from e2e_sae_plugin.demo import demo_dataset, demo_tokens, load_demo_model
from e2e_sae_plugin.demo.corpus import stdlib_texts

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from train_smollm2 import token_dataset, unpack_smollm2

N_HELD_OUT = 160


@dataclass(frozen=True)
class Subject:
    """A model with the place of an SAE in it, and text."""

    name: str
    model_class_name: str
    model: Any
    hook_name: str
    d_in: int
    dataset: Dataset
    held_out: Tensor
    """`[n_prompts, pos]`, of files that the dataset does not have."""


def _demo(context_size: int, n_tokens: int) -> Subject:  # noqa: ARG001 (its dataset is what it is)
    model = load_demo_model()
    held_out = demo_tokens("evaluation", context_size)[:N_HELD_OUT]
    dataset = demo_dataset("train", context_size)
    return Subject("e2e-sae-demo", "HookedTransformer", model, "blocks.3.hook_resid_pre", 128, dataset, held_out)


def _smollm2(context_size: int, n_tokens: int) -> Subject:
    folder = unpack_smollm2(Path("output/smollm2-135m"))
    model: Any = load_model("AutoModelForCausalLM", str(folder), device="cpu", hook_names=["model.layers.14"])
    dataset = token_dataset(model.tokenizer, context_size, 2 * n_tokens // context_size)
    texts = model.tokenizer(list(stdlib_texts("evaluation")), add_special_tokens=False)
    ids = list(itertools.chain.from_iterable(texts["input_ids"]))
    held_out = torch.tensor(ids[: N_HELD_OUT * context_size]).view(N_HELD_OUT, context_size)
    return Subject(str(folder), "AutoModelForCausalLM", model, "model.layers.14", 576, dataset, held_out)


MODELS: dict[str, Callable[[int, int], Subject]] = {"demo": _demo, "smollm2": _smollm2}
