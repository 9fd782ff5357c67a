"""Tiny models of any decoder class of transformers: its own default config with every size made small, random weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from helpers import VOCABULARY, randomise

N_LAYERS = 4
MAX_PARAMETERS = 20_000_000


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# By name of the setting, whatever the class calls it.
SIZES: dict[str, Any] = {
    **_each(N_LAYERS, "num_hidden_layers num_layers n_layer n_layers num_decoder_layers decoder_layers encoder_layers"),
    **_each(32, "hidden_size d_model n_embd dim_model embedding_size decoder_hidden_size lru_width"),
    **_each(4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    **_each(2, "num_key_value_heads num_kv_heads"),
    **_each(8, "head_dim d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim global_head_dim index_head_dim"),
    **_each(8, "rotary_dim query_pre_attn_scalar"),
    **_each(16, "q_lora_rank kv_lora_rank o_lora_rank laurel_rank"),
    **_each(128, "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dff"),
    **_each(48, "moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp expert_ffn_hidden_size"),
    **_each(3, "num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts"),
    **_each(4, "index_topk"),
    **_each(2, "num_experts_per_tok num_experts_per_token top_k_experts moe_topk moe_k top_k"),
    **_each(1, "n_group num_expert_group topk_group moe_layer_start_index first_k_dense_replace num_dense_layers"),
    **_each(VOCABULARY, "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions max_seq_len n_ctx"),
    **_each(4, "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size"),
    **_each(8, "hidden_size_per_layer_input state_size mamba_d_state ssm_state_size mamba_d_head mamba_head_dim"),
    **_each(8, "mamba_n_heads n_mamba_heads mamba_num_heads linear_num_value_heads"),
    **_each(8, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    **_each(4, "linear_num_key_heads linear_num_heads chunk_size mamba_chunk_size"),
    **_each(1, "bos_token_id"),
    **_each(2, "eos_token_id"),
    **_each(3, "pad_token_id"),
    **_each(True, "is_decoder"),
}

_TYPES = {
    "sliding": ["sliding_attention", "full_attention"] * 2,
    "linear": ["linear_attention", "full_attention"] * 2,
    "conv": ["conv", "full_attention"] * 2,
    "hybrid": ["linear_attention", "hybrid"] * 2,
    "indexer": ["full", "full", "shared", "shared"],
}
# What a class needs so that its own checks pass, or so that each kind of layer lies before the SAE and after it.
BY_TYPE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _TYPES["linear"], "n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"layer_types": _TYPES["sliding"], "num_kv_shared_layers": 2},
    "gemma4_text": {"layer_types": _TYPES["sliding"], "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"layer_types": _TYPES["sliding"], "num_kv_shared_layers": 2},
    "glm_moe_dsa": {"indexer_types": _TYPES["indexer"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _TYPES["linear"]},
    "hy_v4": {"indexer_types": _TYPES["indexer"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _TYPES["linear"]},
    "lfm2_moe": {"layer_types": _TYPES["conv"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        **_each(2, "indexer_n_heads indexer_compress_ratio"),
        **_each(8, "indexer_head_dim indexer_budget"),
        "indexer_kv_heads": 1,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
    },
    "reformer": {
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "attn_layers": ["local", "lsh"] * 2,
        "num_buckets": 2,
        **_each(4, "local_attn_chunk_length lsh_attn_chunk_length"),
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv": {"rescale_every": N_LAYERS // 2},
    "xlm": {"emb_dim": 32, "causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": _TYPES["hybrid"], "intermediate_size": 48},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(config_class: Any, **settings: Any) -> Any:
    """A config of `config_class`, shrunk. `settings` come on top; those of a part of it are a mapping."""
    known = inspect.signature(config_class).parameters
    sizes = {name: value for name, value in SIZES.items() if name in known}
    for name, part in config_class.sub_configs.items():
        if part is transformers.AutoConfig:  # any class: that of the default
            part = type(getattr(config_class(), name))
        if hasattr(part, "sub_configs"):
            sizes[name] = tiny_config(part, **settings.pop(name, {})).to_dict()
    if "kv_lora_rank" in known:  # latent attention has keys and values for every head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return config_class(**{**sizes, **BY_TYPE.get(config_class.model_type, {}), **settings})


def tiny_model(config: Any, model_class: Any = transformers.AutoModelForCausalLM) -> Any:
    """A model with every parameter random; the same for the same config.

    Raises:
        ValueError: If it has more than `MAX_PARAMETERS` even so.
    """
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in _build(config, model_class).parameters())
    if n_parameters > MAX_PARAMETERS:
        raise ValueError(f"It still has {n_parameters:,} parameters.")
    torch.manual_seed(0)
    return randomise(_build(config, model_class)).eval()


def _build(config: Any, model_class: Any) -> Any:
    is_auto = model_class is transformers.AutoModelForCausalLM
    model = model_class.from_config(config) if is_auto else model_class(config)
    model.config.architectures = [type(model).__name__]  # as a published config has it; TransformerLens reads it
    return model
