"""SAE folders as dictionary_learning writes them, and what its SAEs compute, written out plainly."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

D_IN, D_SAE, K = 6, 16, 3
CLASSES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)  # fmt: skip


def state_dict(dict_class: str, d_in: int = D_IN, d_sae: int = D_SAE) -> dict[str, Tensor]:
    """Random weights of one class, by its own names and shapes; no bias, norm or threshold has a special value."""
    generator = torch.Generator().manual_seed(CLASSES.index(dict_class))

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    linear = {"encoder.weight": values(d_sae, d_in), "decoder.weight": values(d_in, d_sae)}
    plain = {"W_enc": values(d_in, d_sae), "b_enc": values(d_sae), "W_dec": values(d_sae, d_in), "b_dec": values(d_in)}
    buffers = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
    of_class: dict[str, dict[str, Tensor]] = {
        "AutoEncoder": {**linear, "encoder.bias": values(d_sae), "bias": values(d_in)},
        "AutoEncoderNew": {**linear, "encoder.bias": values(d_sae), "decoder.bias": values(d_in)},
        "GatedAutoEncoder": {
            **linear, "decoder_bias": values(d_in), "r_mag": values(d_sae), "gate_bias": values(d_sae),
            "mag_bias": values(d_sae),
        },
        "JumpReluAutoEncoder": {**plain, "threshold": values(d_sae).abs()},
        "AutoEncoderTopK": {**linear, **buffers, "encoder.bias": values(d_sae), "b_dec": values(d_in)},
        "BatchTopKSAE": {**linear, **buffers, "encoder.bias": values(d_sae), "b_dec": values(d_in)},
        "MatryoshkaBatchTopKSAE": {**plain, **buffers, "group_sizes": torch.tensor([4, d_sae - 4])},
    }  # fmt: skip
    return of_class[dict_class]


def write_dictionary(folder: Path, dict_class: str, state: dict[str, Tensor], **trainer: Any) -> Path:
    """`ae.pt` and `config.json`, as its training script writes them."""
    folder.mkdir(parents=True)
    torch.save(state, folder / "ae.pt")
    known = {
        "dict_class": dict_class,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m",
        "submodule_name": "resid_post_layer_3",
    }
    config = {"trainer": {**known, "k": K, **trainer}, "buffer": {"ctx_len": 128, "io": "out"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def computed(dict_class: str, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction, in float64."""
    s = {name: value.double() for name, value in state.items()}
    x = x.double()
    w_enc = s["W_enc"] if "W_enc" in s else s["encoder.weight"].T
    w_dec = s["W_dec"] if "W_dec" in s else s["decoder.weight"].T
    if dict_class == "AutoEncoder":  # loaded with decoder rows of norm 1
        norms = w_dec.norm(dim=1)
        acts = ((x - s["bias"]) @ w_enc + s["encoder.bias"]).relu() * norms
        return acts, acts / norms @ w_dec + s["bias"]
    if dict_class == "AutoEncoderNew":
        acts = (x @ w_enc + s["encoder.bias"]).relu()
        return acts, acts @ w_dec + s["decoder.bias"]
    if dict_class == "GatedAutoEncoder":
        pre = (x - s["decoder_bias"]) @ w_enc
        acts = (pre + s["gate_bias"] > 0) * (s["r_mag"].exp() * pre + s["mag_bias"]).relu()
        return acts, acts @ w_dec + s["decoder_bias"]
    if dict_class == "JumpReluAutoEncoder":  # does not subtract b_dec
        pre = x @ w_enc + s["b_enc"]
        acts = (pre * (pre > s["threshold"])).relu()
        return acts, acts @ w_dec + s["b_dec"]
    pre = ((x - s["b_dec"]) @ w_enc + (s["b_enc"] if "b_enc" in s else s["encoder.bias"])).relu()
    if dict_class == "AutoEncoderTopK":
        top = pre.topk(K, dim=-1)
        acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    else:
        acts = pre * (pre > s["threshold"])
    return acts, acts @ w_dec + s["b_dec"]


def library_class(dict_class: str) -> Any:
    """The class of the installed library, or None. Its package imports nnsight, which reading an SAE does not need."""
    sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=object))  # type: ignore[arg-type]  # a module in name
    modules = {
        "AutoEncoderTopK": "trainers.top_k",
        "BatchTopKSAE": "trainers.batch_top_k",
        "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k",
    }
    try:
        module = importlib.import_module(f"dictionary_learning.{modules.get(dict_class, 'dictionary')}")
    except ModuleNotFoundError:
        return None
    return getattr(module, dict_class)
