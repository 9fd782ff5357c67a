"""Builders for the tests: tiny models of every family, token data, configs, trainers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import tokenizers
import torch
import transformers
from datasets import Dataset
from sae_lens.config import LoggingConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainer, Objective, splice_into
from e2e_sae_plugin.metrics_log import MetricsLog
from e2e_sae_plugin.splice import SplicedModel

VOCABULARY, D_MODEL, D_HEAD, N_HEADS, N_LAYERS, N_CTX = 64, 16, 8, 2, 3, 16

BUILT_IN_ARCHITECTURES = (
    "standard",
    "gated",
    "topk",
    "abstopk",
    "jumprelu",
    "batchtopk",
    "matryoshka_batchtopk",
    "matching_pursuit",
)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word `t0` ... `t63`; ids 1, 2 and 3 are bos, eos and pad."""
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", pad_token="t3", unk_token="t0",
        name_or_path="tiny", add_bos_token=True,  # or TransformerBridge loads the tokenizer anew to have it
    )  # fmt: skip


def tiny_hooked_transformer(**overrides: Any) -> HookedTransformer:
    """Three blocks, learned positions, LayerNorm, biases everywhere; random weights large enough to matter."""
    settings: dict[str, Any] = {
        "n_layers": N_LAYERS,
        "d_model": D_MODEL,
        "n_ctx": N_CTX,
        "d_head": D_HEAD,
        "n_heads": N_HEADS,
        "d_mlp": 32,
        "d_vocab": VOCABULARY,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "use_hook_mlp_in": False,
        "device": "cpu",
        "seed": 0,
    }
    model = HookedTransformer(HookedTransformerConfig(**{**settings, **overrides}))
    return randomise(model)


def randomise(model: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Give every parameter, biases included, a random value, so that nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            is_norm_weight = name.rsplit(".", 1)[-1] in ("weight", "w") and parameter.ndim == 1
            parameter.copy_((1 + noise if is_norm_weight else noise).to(parameter.dtype))
    return model


def tiny_gpt2_model(**overrides: Any) -> transformers.GPT2LMHeadModel:
    settings: dict[str, Any] = {
        "n_layer": N_LAYERS,
        "n_embd": D_MODEL,
        "n_head": N_HEADS,
        "n_positions": N_CTX,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, **overrides})))


def _rotary(**overrides: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": N_LAYERS,
        "hidden_size": D_MODEL,
        "intermediate_size": 32,
        "num_attention_heads": N_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": N_CTX,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "attn_implementation": "eager",
    } | overrides


def tiny_llama_model(**overrides: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_rotary(num_key_value_heads=1, **overrides))
    return randomise(transformers.LlamaForCausalLM(config))


def tiny_gemma2_model(**overrides: Any) -> transformers.Gemma2ForCausalLM:
    """Soft-capped attention and logits, alternating sliding-window layers."""
    torch.manual_seed(0)
    settings = _rotary(
        num_key_value_heads=1, head_dim=D_HEAD, query_pre_attn_scalar=D_HEAD, final_logit_softcapping=2.0,
        attn_logit_softcapping=5.0, sliding_window=4,
    ) | overrides  # fmt: skip
    return randomise(transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings)))


def tiny_neox_model(**overrides: Any) -> transformers.GPTNeoXForCausalLM:
    """Attention and MLP of a block read the same residual stream (`use_parallel_residual`)."""
    torch.manual_seed(0)
    settings = _rotary(use_parallel_residual=True) | overrides
    return randomise(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**settings)))


def proxy(model: torch.nn.Module) -> HookedProxyLM:
    """A Hugging Face model as SAELens wraps it, without hooks of SAELens's own."""
    return HookedProxyLM(model, tiny_tokenizer(), hook_names=[])


def tiny_bridge() -> TransformerBridge:
    return TransformerBridge.boot_transformers(
        "gpt2", hf_model=tiny_gpt2_model(), tokenizer=tiny_tokenizer(), device="cpu"
    )


FAMILIES = {
    "hooked_transformer": tiny_hooked_transformer,
    "bridge": tiny_bridge,
    "gpt2": lambda: proxy(tiny_gpt2_model()),
    "llama": lambda: proxy(tiny_llama_model()),
    "gemma2": lambda: proxy(tiny_gemma2_model()),
    "gpt_neox": lambda: proxy(tiny_neox_model()),
}


@functools.cache
def shared_model(family: str) -> Any:
    """One model per family, for tests that leave it as they found it (frozen apart)."""
    return FAMILIES[family]()


def module_names(family: str) -> dict[str, str]:
    """Hook names of a Hugging Face family: the list of layers, and a layer's MLP and attention."""
    return {
        "gpt2": {"layers": "transformer.h", "mlp": "mlp", "attn": "attn"},
        "llama": {"layers": "model.layers", "mlp": "mlp", "attn": "self_attn"},
        "gemma2": {"layers": "model.layers", "mlp": "mlp", "attn": "self_attn"},
        "gpt_neox": {"layers": "gpt_neox.layers", "mlp": "mlp", "attn": "attention"},
    }[family]


def hook_of(family: str) -> str:
    """Where an SAE of any family may be, before its second block."""
    is_hooked = family in ("hooked_transformer", "bridge")
    return "blocks.1.hook_resid_pre" if is_hooked else f"{module_names(family)['layers']}.0"


def token_batch(n_prompts: int = 4, context_size: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (n_prompts, context_size), generator=torch.Generator().manual_seed(seed))


def token_dataset(n_prompts: int = 400, context_size: int = 8, seed: int = 0) -> Dataset:
    """Pre-tokenised rows."""
    return Dataset.from_dict({"tokens": token_batch(n_prompts, context_size, seed).tolist()})


def sae_config(architecture: str = "standard", **settings: Any) -> TrainingSAEConfig:
    """A training SAE config of 16 x 32, with settings under which the architecture works at this size."""
    defaults: dict[str, dict[str, Any]] = {
        "standard": {"l1_coefficient": 0.01},
        "gated": {"l1_coefficient": 0.01},
        "topk": {"k": 4},
        "abstopk": {"k": 4},
        "jumprelu": {"l0_coefficient": 0.01, "jumprelu_bandwidth": 0.5},
        "batchtopk": {"k": 4},
        "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [8, 16, 32]},
        "matching_pursuit": {"max_iterations": 4, "decoder_init_norm": 1.0},
    }
    config_class = get_sae_training_class(architecture)[1]
    return config_class(**{"d_in": D_MODEL, "d_sae": 32, **defaults.get(architecture, {}), **settings})


def runner_config(architecture: str = "standard", sae: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A config for the tiny models: steps of 4 sequences of 8 tokens, no W&B, no output, no held-out evaluation."""
    defaults: dict[str, Any] = {
        "sae": sae_config(architecture, **(sae or {})),
        "objective": Objective.e2e(),
        "model_name": "tiny",
        "hook_name": "blocks.1.hook_resid_pre",
        "dataset_path": "tiny",
        "context_size": 8,
        "train_batch_size_tokens": 32,
        "store_batch_size_prompts": 4,
        "training_tokens": 320,
        "lr": 1e-3,
        "n_eval_batches": 0,
        "n_batches_for_norm_estimate": 2,
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=1, eval_every_n_wandb_logs=5),
        "b_dec_init_method": "zeros",  # as in SAELens, which many tests compare with
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
    }
    return E2ESAERunnerConfig(**{**defaults, **settings})


def training_sae(config: E2ESAERunnerConfig) -> TrainingSAE[Any]:
    """The config's SAE with every parameter moved off its initial value, so that no gradient is special."""
    torch.manual_seed(1)
    sae: TrainingSAE[Any] = TrainingSAE.from_dict(TrainingSAEConfig.from_dict(config.sae.to_dict()).to_dict())
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "threshold":
                parameter.add_(0.05 * torch.randn_like(parameter))
    return sae


def build_trainer(
    config: E2ESAERunnerConfig,
    model: Any = None,
    sae: TrainingSAE[Any] | None = None,
    excluded_tokens: Tensor | None = None,
    data: Iterator[Tensor] | None = None,
) -> E2ESAETrainer:
    """A trainer from only the collaborators that a step touches."""
    spliced = spliced_model(config, model)
    return E2ESAETrainer(
        cfg=config,
        sae=training_sae(config) if sae is None else sae,
        spliced_model=spliced,
        data_provider=data if data is not None else iter([]),
        metrics_log=MetricsLog(None, to_wandb=False),
        excluded_tokens=excluded_tokens,
    )


def spliced_model(config: E2ESAERunnerConfig, model: Any = None) -> SplicedModel:
    spliced = splice_into(
        tiny_hooked_transformer() if model is None else model,
        config.hook_name,
        downstream_hooks=config.objective.downstream_hooks,
        needs_downstream=config.objective.beta > 0,
    )
    spliced.check()
    return spliced


def parameters_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
