"""How each field of SAELens's runner config is treated: kept, without effect, refused."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from typing import Any, Literal

from sae_lens.config import LanguageModelSAERunnerConfig

FieldTreatment = Literal["kept", "no_effect", "refused"]

# They shape the host's activation buffer, which is not used (whole sequences are trained on as they come), or have no
# effect in the host either. Warned about, by name, when they differ from the host's default.
FIELDS_WITHOUT_EFFECT = frozenset(
    {
        "n_batches_in_buffer",
        "activations_mixing_fraction",
        "act_store_device",
        "prefetch_llm_batches",
        "llm_compilation_mode",
        "dead_feature_threshold",
        "hook_eval",
        "dataset_trust_remote_code",
    }
)
# They would change the result, and have no counterpart here: an error when they differ from the host's default.
FIELDS_REFUSED = {
    "use_cached_activations": "end-to-end training runs the model at every step; cached activations cannot be spliced",
    "cached_activations_path": "end-to-end training runs the model at every step; cached activations cannot be spliced",
    "compile_llm": "SAELens compiles run_with_cache, which is not used here",
    "dtype": (
        "activations reach the SAE in float32, whatever dtype the model computes in; to load the model in another one, set "
        "model_from_pretrained_kwargs={'dtype': ...}"
    ),
    "model_kwargs": "they are arguments of run_with_cache, which is not used here",
}
# Everything else of the host's config keeps its meaning. A test fails for a host field that is not listed.
FIELDS_KEPT = frozenset(
    {
        "adam_beta1", "adam_beta2", "autocast", "autocast_lm", "checkpoint_path", "compile_sae",
        "context_size", "dataset_path", "dead_feature_window", "device",
        "disable_concat_sequences", "eval_batch_size_prompts", "exclude_special_tokens",
        "feature_sampling_window", "from_pretrained_path", "hook_head_index", "hook_name",
        "is_dataset_tokenized", "llm_device",
        "logger", "lr", "lr_decay_steps", "lr_end", "lr_scheduler_name", "lr_warm_up_steps",
        "model_class_name", "model_from_pretrained_kwargs", "model_name", "n_batches_for_norm_estimate",
        "n_checkpoints", "n_eval_batches", "n_restart_cycles", "output_path", "prepend_bos",
        "resume_from_checkpoint", "sae", "sae_compilation_mode", "sae_lens_training_version",
        "sae_lens_version", "save_final_checkpoint", "seed", "seqpos_slice", "sequence_separator_token",
        "store_batch_size_prompts", "streaming", "train_batch_size_tokens", "training_tokens",
        "use_chat_formatting", "verbose",
    }
)  # fmt: skip


def host_defaults() -> dict[str, Any]:
    """Default of every host field as `__init__` leaves it, before the host's own `__post_init__`."""
    defaults: dict[str, Any] = {}
    for host_field in fields(LanguageModelSAERunnerConfig):
        if host_field.default is not dataclasses.MISSING:
            defaults[host_field.name] = host_field.default
        elif host_field.default_factory is not dataclasses.MISSING:
            defaults[host_field.name] = host_field.default_factory()
    return defaults


def field_treatment(name: str) -> FieldTreatment | None:
    """How a host field is treated; None for one that this version does not know."""
    if name in FIELDS_REFUSED:
        return "refused"
    if name in FIELDS_WITHOUT_EFFECT:
        return "no_effect"
    return "kept" if name in FIELDS_KEPT else None
