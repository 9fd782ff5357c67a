"""The config of a fine-tune: the published recipe, what the SAE's metadata decide, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import runner_config, training_sae
from sae_lens import SAE

from e2e_sae_plugin import Objective, finetune_config

KNOWN: dict[str, Any] = {
    "model_name": "gpt2-small",
    "hook_name": "blocks.1.hook_resid_pre",
    "model_class_name": "HookedTransformer",
    "context_size": 8,
    "seqpos_slice": [1, None],
    "prepend_bos": False,
    "dataset_path": "some/text",
    "model_from_pretrained_kwargs": {"center_writing_weights": True},
    "exclude_special_tokens": [5, 6],
    "sequence_separator_token": "eos",
    "disable_concat_sequences": True,
}


def finished(folder: Path, architecture: str = "topk", sae: dict[str, Any] | None = None, **metadata: Any) -> SAE[Any]:
    training_sae(runner_config(architecture, sae=sae)).save_inference_model(str(folder))
    loaded = SAE.load_from_disk(str(folder))
    for name, value in {**KNOWN, **metadata}.items():
        loaded.cfg.metadata[name] = value
    return loaded


def config_of(sae: SAE[Any], **settings: Any) -> Any:
    defaults = {"training_tokens": 56 * 100, "evaluation_tokens": 64, "checkpoint_path": None}
    return finetune_config(sae, **{**defaults, **settings})


def test_the_metadata_say_where_and_on_what(tmp_path: Path):
    cfg = config_of(finished(tmp_path))
    for name, value in KNOWN.items():
        assert getattr(cfg, name) == (tuple(value) if name == "seqpos_slice" else value)
    assert cfg.training_context_size == 7
    overridden = config_of(finished(tmp_path), dataset_path="other/text", context_size=6, exclude_special_tokens=False)
    assert (overridden.dataset_path, overridden.context_size) == ("other/text", 6)
    assert overridden.exclude_special_tokens is False


def test_special_tokens_are_as_the_record_says_and_left_clean_without_one(tmp_path: Path):
    for said, expected in ((False, False), (None, True), (True, True), ([5], [5])):
        assert config_of(finished(tmp_path, exclude_special_tokens=said)).exclude_special_tokens == expected


def test_the_published_recipe_is_the_default(tmp_path: Path):
    sae = finished(tmp_path, "jumprelu", context_size=None, seqpos_slice=None)
    cfg = finetune_config(sae, checkpoint_path=None)
    assert (cfg.training_tokens, cfg.context_size, cfg.train_batch_size_tokens) == (25_000_000, 1024, 8192)
    assert cfg.objective == Objective.finetune()
    assert (cfg.lr, cfg.max_grad_norm, cfg.lr_warm_up_steps) == (5e-5, 1.0, 0)
    assert (cfg.lr_scheduler_name, cfg.lr_decay_steps) == ("constant", cfg.total_training_steps)  # linear, to 0
    assert (cfg.frozen_parameters, cfg.keep_decoder_norms, cfg.adapter) == (("threshold",), True, "none")
    assert (cfg.sae.dtype, cfg.sae.l0_coefficient) == ("float32", 0.01)
    assert cfg.n_eval_batches * cfg.store_batch_size_prompts * 1024 == 131_072
    n_evaluations = cfg.total_training_steps // (cfg.logger.wandb_log_frequency * cfg.logger.eval_every_n_wandb_logs)
    assert 18 <= n_evaluations <= 22
    assert cfg.patience_evaluations == 5


def test_a_short_run_evaluates_as_often_as_it_can(tmp_path: Path):
    cfg = config_of(finished(tmp_path), training_tokens=56 * 2)
    assert (cfg.total_training_steps, cfg.patience_evaluations) == (2, None)
    assert config_of(finished(tmp_path), lr_warm_up_steps=30).lr_decay_steps == 70
    assert config_of(finished(tmp_path), lr_scheduler_name="cosineannealing").lr_decay_steps == 0


@pytest.mark.parametrize(
    ("trained", "architecture", "expected"),
    [
        ("all", "jumprelu", (("threshold",), True, "none", 5e-5)),
        ("all", "topk", ((), True, "none", 5e-5)),
        ("decoder", "jumprelu", (("W_enc", "b_enc", "threshold"), True, "none", 5e-5)),
        ("decoder", "gated", (("W_enc", "b_gate", "b_mag", "r_mag"), True, "none", 5e-5)),
        ("scale_and_bias", "topk", (("W_enc", "b_enc"), False, "scale", 1e-3)),
        ("lora", "jumprelu", (("threshold",), True, "low_rank", 2e-4)),
    ],
)
def test_what_is_trained(trained: Any, architecture: str, expected: tuple[Any, ...], tmp_path: Path):
    cfg = config_of(finished(tmp_path, architecture), trained=trained)
    frozen, norms, adapter, lr = expected
    assert set(cfg.frozen_parameters) == set(frozen)
    assert (cfg.keep_decoder_norms, cfg.adapter, cfg.lr) == (norms, adapter, lr)


def test_thresholds_are_trained_when_asked_for(tmp_path: Path):
    assert config_of(finished(tmp_path, "jumprelu"), train_thresholds=True).frozen_parameters == ()
    with pytest.raises(ValueError, match="architecture 'topk' has no thresholds"):
        config_of(finished(tmp_path), train_thresholds=True)
    with pytest.raises(ValueError, match="trained='decoder', which leaves the encoder as it is"):
        config_of(finished(tmp_path, "jumprelu"), train_thresholds=True, trained="decoder")
    with pytest.raises(ValueError, match="do not say its l0_coefficient"):
        config_of(finished(tmp_path, "batchtopk"), train_thresholds=True)


def test_topk_under_layer_norm_goes_without_its_auxiliary_loss(tmp_path: Path):
    sae = finished(tmp_path)
    sae.cfg.normalize_activations = "layer_norm"
    assert config_of(sae).objective == Objective.finetune(auxiliary=0.0)


def test_a_normalisation_that_was_estimated_is_in_the_weights_already(tmp_path: Path):
    sae = finished(tmp_path)
    sae.cfg.normalize_activations = "expected_average_only_in"
    assert config_of(sae).sae.normalize_activations == "none"


def test_the_models_dtype(tmp_path: Path):
    sae = finished(tmp_path)
    assert config_of(sae, model_dtype="bfloat16").model_from_pretrained_kwargs == {
        "center_writing_weights": True,
        "dtype": "bfloat16",
    }
    assert config_of(sae, device="cuda").model_from_pretrained_kwargs["dtype"] == "bfloat16"
    sae.cfg.metadata.model_from_pretrained_kwargs = None
    assert config_of(sae, model_dtype="float16").model_from_pretrained_kwargs == {
        "center_writing_weights": False,  # SAELens's default
        "dtype": "float16",
    }
    assert config_of(
        sae, model_class_name="AutoModelForCausalLM", model_dtype="float16"
    ).model_from_pretrained_kwargs == {"dtype": "float16"}


def test_settings_that_follow_from_others(tmp_path: Path):
    assert config_of(finished(tmp_path), trained="lora", frozen_parameters=("W_dec",)).keep_decoder_norms is False
    assert config_of(finished(tmp_path), n_eval_batches=0).patience_evaluations is None
    assert config_of(finished(tmp_path)).verbose is True


@pytest.mark.parametrize("name", ["gpt2-small", "gpt2", "openai-community/gpt2", "GPT2"])
def test_other_names_of_the_same_model_are_accepted(name: str, tmp_path: Path):
    assert config_of(finished(tmp_path), model_name=name).model_name == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name": "gpt2-medium"}, r"model_name='gpt2-small', not 'gpt2-medium' .*set force=True"),
        (
            {"hook_name": "blocks.2.hook_resid_pre"},
            r"hook_name='blocks.1.hook_resid_pre', not 'blocks.2.hook_resid_pre'",
        ),
        ({"hook_head_index": 2}, "hook_head_index=None, not 2"),
    ],
)
def test_another_place_is_refused_unless_forced(settings: dict[str, Any], message: str, tmp_path: Path):
    sae = finished(tmp_path)
    with pytest.raises(ValueError, match=message):
        config_of(sae, **settings)
    forced = config_of(sae, **settings, force=True)
    assert all(getattr(forced, name) == value for name, value in settings.items())


@pytest.mark.parametrize(
    ("metadata", "settings", "message"),
    [
        ({"model_name": None}, {}, "do not say its model_name: give model_name="),
        ({"hook_name": None}, {}, "do not say its hook_name"),
        ({"dataset_path": None}, {}, "name no dataset: give dataset_path="),
        ({}, {"training_tokens": 55}, "training_tokens=55 is less than one step of train_batch_size_tokens=56"),
        ({}, {"trained": "encoder"}, "trained must be one of .*'lora'.*got 'encoder'"),
        ({}, {"lora_rank": 4}, "lora_rank=4 has no effect with trained='all'"),
        ({}, {"evaluation_tokens": 0}, "evaluation_tokens must be a whole number, 1 or more, got 0"),
        ({}, {"sae_settings": {"k": 5}}, "sae_settings has 'k', which would change what the SAE computes"),
        ({}, {"sae_settings": ["k"]}, "sae_settings must be a mapping"),
        ({}, {"training_tokens": "25M"}, "training_tokens must be a whole number, 1 or more, got '25M'"),
        ({}, {"context_size": 0}, "context_size must be a whole number, 1 or more, got 0"),
        ({}, {"store_batch_size_prompts": 0}, "store_batch_size_prompts must be a whole number"),
        ({}, {"model_dtype": "float99"}, "model_dtype must be one of .*'bfloat16'.*got 'float99'"),
        ({}, {"objective": None}, "objective must be an Objective, got None"),
        ({}, {"output_pat": "x"}, "Unknown key 'output_pat' .* Did you mean 'output_path'"),
        ({}, {"sae_settings": {"l1_coefficient": 1.0}}, "'topk' has no training setting 'l1_coefficient'"),
    ],
)
def test_what_cannot_work_is_refused(metadata: Any, settings: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        config_of(finished(tmp_path, **metadata), **settings)
