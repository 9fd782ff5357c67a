"""The families of the documentation's table: a tiny random model of each, in each of the three classes of models."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from helpers import proxy, tiny_tokenizer
from tiny_configs import tiny_config, tiny_model
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as loading
from transformer_lens.model_bridge import TransformerBridge

MODEL_CLASSES = ("AutoModelForCausalLM", "HookedTransformer", "TransformerBridge")
PLACES = ("resid", "mlp_out", "attn z")
# An SAE on what enters this block, or inside it: two blocks before it, one after it.
BLOCK = 2
HOOKS = {
    "resid": ("blocks.2.hook_resid_pre", "blocks.2.hook_in", "decoder_blocks.2.hook_in"),
    "mlp_out": ("blocks.2.hook_mlp_out", "decoder_blocks.2.mlp.hook_out"),
    "attn z": ("blocks.2.attn.hook_z", "blocks.2.mixer.hook_out", "decoder_blocks.2.self_attn.hook_out"),
}


class NotThere(Exception):
    """TransformerLens has no such model, or the model no such hook."""


@dataclass(frozen=True)
class Family:
    """A family of models, with the names of its parts."""

    name: str
    config: str
    """transformers' class of its config."""
    settings: dict[str, Any] = field(default_factory=dict)
    layers: str = "model.layers"
    mlp: str = "mlp"
    attention: str = "self_attn"
    official: str = "gpt2"
    """A name under which HookedTransformer loads it; any other one has it say that it does not."""
    model_class: Any = transformers.AutoModelForCausalLM


GPT2_PARTS: dict[str, Any] = {"layers": "transformer.h", "attention": "attn"}
NEOX_PARTS: dict[str, Any] = {"layers": "gpt_neox.layers", "attention": "attention"}
# The whole of `mlp` and of `self_attention` has the residual stream added.
BLOOM_PARTS: dict[str, Any] = {
    "layers": "transformer.h",
    "mlp": "mlp.dense_4h_to_h",
    "attention": "self_attention.dense",
}
# What TransformerLens takes an OLMo-2 to have, whatever the config says.
OLMO = {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
MULTIPLIERS = {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}
FALCON_H1 = {"embedding_multiplier": 3.0, "lm_head_multiplier": 0.5, "key_multiplier": 0.7, "ssm_out_multiplier": 0.6}
MIXER: dict[str, Any] = {"mlp": "", "attention": "mixer"}
FAMILIES = (
    Family("GPT-2", "GPT2Config", {"n_ctx": 64}, **GPT2_PARTS),
    Family("GPT-Neo", "GPTNeoConfig", **GPT2_PARTS, official="EleutherAI/gpt-neo-125M"),
    Family("GPT-J", "GPTJConfig", **GPT2_PARTS, official="EleutherAI/gpt-j-6B"),
    Family("GPT-NeoX, Pythia", "GPTNeoXConfig", **NEOX_PARTS, official="EleutherAI/pythia-70m"),
    Family("OPT", "OPTConfig", layers="model.decoder.layers", mlp="fc2", official="facebook/opt-125m"),
    Family("BLOOM", "BloomConfig", **BLOOM_PARTS, official="bigscience/bloom-560m"),
    Family("Falcon", "FalconConfig", {"new_decoder_architecture": True}, layers="transformer.h", attention="self_attention"),
    Family("Falcon, old architecture", "FalconConfig", layers="transformer.h", attention="self_attention"),
    Family("MPT", "MptConfig", layers="transformer.blocks", mlp="ffn.down_proj", attention="attn"),
    Family("Llama", "LlamaConfig", official="01-ai/Yi-6B"),
    Family("Mistral", "MistralConfig", official="mistralai/Mistral-7B-v0.1"),
    Family("Mixtral", "MixtralConfig", official="mistralai/Mixtral-8x7B-v0.1"),
    Family("Qwen2", "Qwen2Config", official="Qwen/Qwen2-0.5B"),
    Family("Qwen3", "Qwen3Config", official="Qwen/Qwen3-0.6B"),
    Family("Qwen3-MoE", "Qwen3MoeConfig"),
    Family("Gemma 1", "GemmaConfig", official="google/gemma-2b"),
    Family("Gemma 2", "Gemma2Config", official="google/gemma-2-2b"),
    Family("Gemma 3", "Gemma3TextConfig", official="google/gemma-3-270m"),
    Family("Gemma 3n", "Gemma3nTextConfig"),
    Family("Gemma 4, E-series", "Gemma4TextConfig"),
    Family("Phi", "PhiConfig", {"partial_rotary_factor": 0.5}, official="microsoft/phi-2"),
    Family("Phi-3", "Phi3Config", official="microsoft/Phi-3-mini-4k-instruct"),
    Family("OLMo-2", "Olmo2Config", OLMO, official="allenai/OLMo-2-0425-1B"),
    Family("StableLM", "StableLmConfig"),
    Family("SmolLM3", "SmolLM3Config"),
    Family("GPT-OSS", "GptOssConfig", official="openai/gpt-oss-20b"),
    Family("Granite", "GraniteConfig", {**MULTIPLIERS, "attention_multiplier": 0.2}),
    Family("Cohere", "CohereConfig"),
    Family("Llama 4", "Llama4TextConfig", mlp="feed_forward"),
    Family("Mamba", "MambaConfig", layers="backbone.layers", **MIXER),
    Family("Mamba-2", "Mamba2Config", layers="backbone.layers", **MIXER),
    Family("Falcon-H1", "FalconH1Config", FALCON_H1, mlp="feed_forward"),
    Family("Jamba", "JambaConfig", mlp="feed_forward", attention="mamba"),
    Family("RecurrentGemma", "RecurrentGemmaConfig", mlp="mlp_block", attention="temporal_block"),
    Family(
        "T5", "T5Config", layers="decoder.block", mlp="layer.2", attention="layer.0", official="t5-small",
        model_class=transformers.T5ForConditionalGeneration,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """A tiny model as the Hub's client keeps a downloaded one."""

    cache: Path
    folder: Path
    model: Any


def save(family: Family, cache: Path) -> Saved:
    """Build the family's tiny model and put it into the cache, under the name that TransformerLens knows."""
    model = tiny_model(tiny_config(getattr(transformers, family.config), **family.settings), family.model_class)
    repository = cache / f"models--{family.official.replace('/', '--')}"
    folder = repository / "snapshots" / ("0" * 40)
    model.save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(folder.name)
    return Saved(cache, folder, model)


def load(family: Family, saved: Saved, model_class: str) -> Any:
    """The saved model as an object of `model_class`, one of `MODEL_CLASSES`, loaded as SAELens loads it.

    Raises:
        NotThere: If TransformerLens does not have it.
    """
    if model_class == "AutoModelForCausalLM":
        return proxy(family.model_class.from_pretrained(saved.folder).eval())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both classes warn of their own: one is deprecated
            if model_class == "HookedTransformer":
                return _hooked_transformer(family, saved)
            return TransformerBridge.boot_transformers(str(saved.folder), tokenizer=tiny_tokenizer(), device="cpu")
    except Exception as error:
        reason = re.split(r"\. |: \[", str(error))[0].replace(type(saved.model).__name__, "its class")
        raise NotThere(f"TransformerLens does not load it ({type(error).__name__}: {reason})") from error


def hook_names(family: Family, model_class: str, model: Any) -> dict[str, str | None]:
    """By place, the hook's name; None where the model has none."""
    if model_class == "AutoModelForCausalLM":
        inside = {"mlp_out": family.mlp, "attn z": family.attention}
        names = {place: f"{family.layers}.{BLOCK}.{part}" if part else None for place, part in inside.items()}
        return {"resid": f"{family.layers}.{BLOCK - 1}", **names}
    known = model.hook_dict
    return {place: next((name for name in names if name in known), None) for place, names in HOOKS.items()}


@torch.no_grad()
def logits_differ(model: Any, saved: Saved) -> bool:
    """Tell whether a model of TransformerLens's gives other logits than the Hugging Face model that it was loaded from."""
    tokens = torch.arange(4, 12)[None]
    try:
        expected = saved.model(tokens).logits
        logits = model(tokens) if hasattr(model, "model") else model(tokens, return_type="logits", prepend_bos=False)
    except Exception:  # an encoder-decoder, which wants more than tokens
        return False
    return float((logits - expected).abs().max() / expected.abs().max()) > 1e-4


def _hooked_transformer(family: Family, saved: Saved) -> HookedTransformer:
    original = loading.convert_hf_model_config

    def with_true_sizes(name: str, **settings: Any) -> dict[str, Any]:
        converted = original(name, **settings)
        # For some families TransformerLens has the sizes of the published models written down.
        has_true_sizes = converted["d_model"] == saved.model.config.hidden_size
        return converted if has_true_sizes else {**converted, **_sizes(saved.model.config)}

    with mock.patch.object(loading, "convert_hf_model_config", with_true_sizes):
        return HookedTransformer.from_pretrained_no_processing(
            family.official, tokenizer=tiny_tokenizer(), device="cpu", cache_dir=saved.cache, local_files_only=True
        )


def _sizes(config: Any) -> dict[str, Any]:
    """Sizes of a Gemma or an OLMo by TransformerLens's names."""
    d_head = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    sizes = {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "rotary_dim": d_head,
        "attn_types": ["global"] * config.num_hidden_layers,
    }
    if config.num_key_value_heads != config.num_attention_heads:
        sizes["n_key_value_heads"] = config.num_key_value_heads
    if getattr(config, "sliding_window", None):
        kinds = {"sliding_attention": "local", "full_attention": "global"}
        sizes["window_size"] = config.sliding_window
        sizes["attn_types"] = [kinds[kind] for kind in config.layer_types]
    return sizes
