"""`E2ESAERunnerConfig`: what happens to every field of the host's config, what is refused, and round trips."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pickle
import re
from typing import Any

import pytest
from helpers import BUILT_IN_ARCHITECTURES, runner_config, sae_config
from sae_lens import TopKTrainingSAEConfig
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from e2e_sae_plugin import E2ESAERunnerConfig, Objective, paper_config
from e2e_sae_plugin.architectures import FIXED_L0
from e2e_sae_plugin.config_fields import FIELDS_KEPT, FIELDS_REFUSED, FIELDS_WITHOUT_EFFECT, field_treatment

HOST_FIELDS = {f.name for f in dataclasses.fields(LanguageModelSAERunnerConfig)}


# Every field of the host.


@pytest.mark.parametrize("name", sorted(HOST_FIELDS))
def test_every_field_of_the_host_is_classified(name: str):
    assert field_treatment(name) is not None, (
        f"SAELens's config has a field {name!r} that config.py does not list: decide whether end-to-end training keeps "
        "its meaning, warns that it has no effect, or refuses it."
    )


def test_the_classes_of_fields_are_disjoint_and_hold_only_fields_of_the_host():
    refused = frozenset(FIELDS_REFUSED)
    assert FIELDS_KEPT | FIELDS_WITHOUT_EFFECT | refused == HOST_FIELDS
    assert len(FIELDS_KEPT) + len(FIELDS_WITHOUT_EFFECT) + len(refused) == len(HOST_FIELDS)
    assert field_treatment("no_such_field") is None
    assert (field_treatment("lr"), field_treatment("compile_llm")) == ("kept", "refused")
    assert field_treatment("n_batches_in_buffer") == "no_effect"


def test_an_existing_config_of_the_host_is_accepted_with_its_values():
    settings: dict[str, Any] = {
        "sae": sae_config(), "model_name": "tiny", "hook_name": "blocks.1.hook_resid_pre", "context_size": 8,
        "train_batch_size_tokens": 64, "training_tokens": 640, "lr": 0.01, "checkpoint_path": None,
    }  # fmt: skip
    host = LanguageModelSAERunnerConfig(**settings, logger=LoggingConfig(log_to_wandb=False))
    ours = E2ESAERunnerConfig(**settings, local_first=0.0, logger=LoggingConfig(log_to_wandb=False))
    assert {name: getattr(ours, name) for name in HOST_FIELDS} == {name: getattr(host, name) for name in HOST_FIELDS}
    assert ours.objective == Objective.finetune()
    assert ours.max_grad_norm == 1.0


def test_it_is_generic_in_the_sae_config_as_the_host_is():
    given = {field.name: getattr(runner_config("topk"), field.name) for field in dataclasses.fields(E2ESAERunnerConfig)}
    config = E2ESAERunnerConfig[TopKTrainingSAEConfig](**given)
    assert type(config) is E2ESAERunnerConfig
    assert config == E2ESAERunnerConfig(**given)
    assert pickle.loads(pickle.dumps(config)) == config
    assert E2ESAERunnerConfig[Any].from_dict(json.loads(json.dumps(config.to_dict()))) == config


IDLE_VALUES: dict[str, Any] = {
    "n_batches_in_buffer": 7,
    "activations_mixing_fraction": 0.25,
    "act_store_device": "with_model",
    "prefetch_llm_batches": True,
    "llm_compilation_mode": "default",
    "dead_feature_threshold": 1e-3,
    "hook_eval": "something",
    "is_dataset_tokenized": False,
    "dataset_trust_remote_code": False,
}


@pytest.mark.filterwarnings("ignore:The 'hook_eval' field is deprecated:DeprecationWarning")  # the host's
@pytest.mark.parametrize("name", sorted(FIELDS_WITHOUT_EFFECT))
def test_fields_without_effect_warn_once_by_name(name: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        runner_config(verbose=True, **{name: IDLE_VALUES[name]})
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("e2e_sae_plugin")]
    assert warnings == [f"No effect in end-to-end training: {name}={IDLE_VALUES[name]!r}."]


def test_several_fields_without_effect_share_one_warning(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        runner_config(verbose=True, n_batches_in_buffer=7, prefetch_llm_batches=2)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("e2e_sae_plugin")]
    assert warnings == ["No effect in end-to-end training: n_batches_in_buffer=7, prefetch_llm_batches=2."]


def test_defaults_do_not_warn(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        saved = runner_config(verbose=True).to_dict()
        E2ESAERunnerConfig.from_dict(saved)  # names the store's device, as the host resolved it
    assert not caplog.records


# Refusals.


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_cached_activations": True}, "use_cached_activations=True is refused.*runs the model.*Leave it at False"),
        ({"cached_activations_path": "x"}, "cached_activations_path='x' is refused.*Leave it at None"),
        ({"compile_llm": True}, "compile_llm=True is refused.*run_with_cache"),
        ({"model_kwargs": {"a": 1}}, "model_kwargs={'a': 1} is refused.*run_with_cache"),
        ({"model_class_name": "HookedMamba"}, "model_class_name='HookedMamba' is not supported.*state-space"),
        ({"model_class_name": "HookedFoo"}, r"Expected one of \['HookedTransformer', 'TransformerBridge', 'Auto"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a positive finite number, or None for no clipping, got -1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a positive"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be a positive"),
        ({"max_grad_norm": math.inf}, "max_grad_norm must be a positive"),
        ({"store_batch_size_prompts": 0}, "store_batch_size_prompts must be at least 1, got 0"),
        ({"context_size": 0}, "context_size must be at least 1, got 0"),
        ({"train_batch_size_tokens": 0}, "train_batch_size_tokens must be at least 1"),
        ({"training_tokens": 0}, "training_tokens must be at least 1"),
        ({"training_tokens": 31}, "training_tokens=31 is less than one step of train_batch_size_tokens=32"),
        ({"objective": {"kl": 0}}, "kl, beta and mse all 0"),
        ({"objective": "end"}, "objective 'end' is not known"),
        ({"train_batch_size_tokens": "32"}, r"train_batch_size_tokens must be a whole number, got '32' \(str\)"),
        ({"lr": "1e-3"}, "lr must be a number, got '1e-3'"),
        ({"lr": 0.0}, "lr must be a positive finite number, got 0.0"),
        ({"lr": math.nan}, "lr must be a positive finite number, got nan"),
        ({"seed": 2**70}, "seed must have at most 63 bits"),
        ({"autocast": "false"}, "autocast must be True or False, got 'false'"),
        ({"sae": {"d_sae": "32"}}, "sae.d_sae must be a whole number, got '32'"),
        ({"sae": {"d_sae": -5}}, "sae.d_sae must be at least 1, got -5"),
        ({"sae": {"d_in": 0}}, "sae.d_in must be at least 1, got 0"),
        ({"sae": {"l1_coefficient": math.nan}}, "sae.l1_coefficient must be a finite number, 0 or more, got nan"),
        ({"sae": {"l1_coefficient": -1.0}}, "sae.l1_coefficient must be a finite number, 0 or more, got -1.0"),
        ({"architecture": "topk", "sae": {"k": 0}}, r"sae.k \(active features per token\) must be above 0.*got 0"),
        ({"architecture": "topk", "sae": {"k": 33}}, "at most d_sae=32, got 33"),
        ({"eval_batch_size_prompts": 0}, "eval_batch_size_prompts must be at least 1, got 0"),
        (
            {"n_batches_for_norm_estimate": 0, "b_dec_init_method": "mean"},
            "n_batches_for_norm_estimate must be at least 1, got 0",
        ),
        (
            {"logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=0)},
            "logger.wandb_log_frequency must be at least 1",
        ),
        ({"objective": Objective(auxiliary=1.0)}, "auxiliary=1.0 has no effect: architecture 'standard' has no aux"),
        ({"objective": Objective(matryoshka_levels="sampled")}, "matryoshka_levels='sampled' has no effect"),
        ({"local_first": -0.1}, "local_first must be a share of training_tokens, at least 0 and below 1, got -0.1"),
        ({"local_first": 1.0}, "local_first must be a share.*For local training alone use objective=Objective.local"),
        ({"local_first": math.nan}, "local_first must be a share"),
        ({"local_first": 0.5, "objective": Objective.local()}, "local_first=0.5 has no effect: the objective is local"),
        ({"local_first": 0.5}, "local_first=0.5 cannot be trained with architecture 'standard' and objective.mse=0"),
        ({"b_dec_init_method": "median"}, "b_dec_init_method must be 'auto', 'mean' or 'zeros', got 'median'"),
        (
            {"b_dec_init_method": "mean", "from_pretrained_path": "x"},
            "b_dec_init_method='mean' would overwrite the b_dec of from_pretrained_path",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        runner_config(**settings)


@pytest.mark.parametrize(
    ("tokens", "settings", "nearest"),
    [
        (33, {}, "32 or 40"),
        (39, {}, "32 or 40"),
        (7, {}, "8"),
        (9, {}, "8 or 16"),
        (32, {"seqpos_slice": (1, -1)}, "30 or 36; 24 in micro-batches of store_batch_size_prompts=4"),
        (32, {"seqpos_slice": (None, None, 3)}, "30 or 33; 36 in micro-batches of store_batch_size_prompts=4"),
    ],
)
def test_a_step_that_is_not_whole_sequences_is_refused_with_the_nearest_two(
    tokens: int, settings: dict[str, Any], nearest: str
):
    with pytest.raises(
        ValueError, match=rf"train_batch_size_tokens={tokens} is not a whole .*Nearest usable: {nearest}\."
    ):
        runner_config(train_batch_size_tokens=tokens, **settings)
    for usable in re.findall(r"\d+", nearest.split(" in ")[0]):
        runner_config(train_batch_size_tokens=int(usable), **settings)


UNTRAINABLE = {
    "topk": {"layer_norm", "constant_norm_rescale"},
    "abstopk": {"layer_norm", "constant_norm_rescale"},
    "batchtopk": {"layer_norm", "constant_norm_rescale"},
    "matryoshka_batchtopk": {"layer_norm", "constant_norm_rescale"},
    "matching_pursuit": {"covariance_whitening"},
}
NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening")


@pytest.mark.parametrize("architecture", BUILT_IN_ARCHITECTURES)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_normalisations_are_refused_where_the_host_cannot_train_them(architecture: str, normalisation: str):
    sae = {"normalize_activations": normalisation}
    if normalisation not in UNTRAINABLE.get(architecture, set()):
        assert runner_config(architecture, sae=sae).sae.normalize_activations == normalisation
        return
    with pytest.raises(ValueError, match=r"normalize_activations=.* (cannot be trained with|is not supported for)"):
        runner_config(architecture, sae=sae)


# Batches.


def test_step_size_counts_the_positions_that_are_trained_on():
    config = runner_config(train_batch_size_tokens=32)
    assert (config.training_context_size, config.step_size_prompts) == (8, 4)
    config = runner_config(train_batch_size_tokens=30, seqpos_slice=(1, -1))
    assert (config.training_context_size, config.step_size_prompts) == (6, 5)


@pytest.mark.parametrize(
    ("step", "most", "micro"), [(12, 12, 12), (12, 100, 12), (12, 11, 6), (12, 5, 4), (12, 1, 1), (7, 6, 1), (9, 8, 3)]
)
def test_the_micro_batch_is_the_largest_divisor_within_the_bound(step: int, most: int, micro: int):
    config = runner_config(train_batch_size_tokens=8 * step, store_batch_size_prompts=most)
    assert config.micro_batch_size_prompts == micro


# Round trips.


def through_json(value: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))


def test_numbers_that_python_takes_for_the_type_are_taken():
    numpy = pytest.importorskip("numpy")
    config = runner_config(training_tokens=numpy.int64(320), lr=1, autocast=0, n_batches_for_norm_estimate=0)
    assert config.training_tokens == 320
    assert runner_config(training_tokens=3.2e2).training_tokens == 320


def test_a_local_first_part_is_accepted_where_sparsity_needs_no_other_coefficient():
    for architecture in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "matching_pursuit"):
        assert runner_config(architecture, local_first=0.5).local_first == 0.5
    assert runner_config("standard", local_first=0.5, objective=Objective(kl=1, mse=0.5)).local_first == 0.5


@pytest.mark.parametrize("architecture", BUILT_IN_ARCHITECTURES)
def test_round_trip_through_json_keeps_every_field(architecture: str):
    config = runner_config(
        architecture,
        objective=Objective.e2e_downstream(
            0.25,
            kl=0.5,
            downstream_hooks=["blocks.2.hook_resid_pre"],
            auxiliary=0.125 if "topk" in architecture else None,
        ),
        max_grad_norm=None,
        local_first=0.25 if architecture in FIXED_L0 else 0,
        b_dec_init_method="mean",
        train_batch_size_tokens=30,
        seqpos_slice=(1, -1),
        exclude_special_tokens=[1, 2],
        checkpoint_path="somewhere",
        llm_device="cpu",
        lr_warm_up_steps=3,
        model_from_pretrained_kwargs={"center_writing_weights": True},
    )
    again = E2ESAERunnerConfig.from_dict(through_json(config.to_dict()))
    assert again == config
    assert type(again.sae) is SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    assert again.to_dict() == config.to_dict()
    assert again.checkpoint_path == config.checkpoint_path  # the run's id is not appended twice


@pytest.mark.parametrize("architecture", BUILT_IN_ARCHITECTURES)
def test_the_host_part_loads_with_the_hosts_own_from_dict(architecture: str):
    config = runner_config(architecture, objective=Objective.e2e_downstream(0.25), max_grad_norm=3.0)
    host_dict = through_json(config.host_dict())
    assert set(host_dict) == HOST_FIELDS
    host = LanguageModelSAERunnerConfig.from_dict(host_dict)
    assert type(host) is LanguageModelSAERunnerConfig
    assert host.sae == config.sae
    assert (host.hook_name, host.lr, host.training_tokens) == (config.hook_name, config.lr, config.training_tokens)
    with pytest.raises(TypeError, match="unexpected keyword argument"):  # why host_dict exists
        LanguageModelSAERunnerConfig.from_dict(through_json(config.to_dict()))


def test_a_host_runner_cfg_is_read_with_the_default_objective():
    host = LanguageModelSAERunnerConfig(
        sae=sae_config("topk"), context_size=8, train_batch_size_tokens=32, training_tokens=64, verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    config = E2ESAERunnerConfig.from_dict(through_json(host.to_dict()))
    assert config.objective == Objective.finetune()
    assert config.sae == host.sae
    assert config.checkpoint_path == host.checkpoint_path


def test_a_hand_written_mapping_may_leave_out_defaults():
    config = E2ESAERunnerConfig.from_dict(
        {"sae": {"architecture": "topk", "d_in": 16, "d_sae": 32, "k": 4}, "context_size": 8, "objective": "local"}
    )
    assert (config.sae.architecture(), config.context_size, config.objective) == ("topk", 8, Objective.local())
    assert config.train_batch_size_tokens == 4096


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"trainin_tokens": 5}, "Unknown key 'trainin_tokens' in config. Did you mean 'training_tokens'"),
        ({"zzzz": 5}, r"Unknown key 'zzzz' in config. Expected some of \["),
        ({"sae": {"l1_coeficient": 1}}, "Unknown key 'l1_coeficient' in sae. Did you mean 'l1_coefficient'"),
        ({"sae": {"k": 1}}, "Unknown key 'k' in sae"),  # another architecture's
        ({"sae": {"architecture": "standart"}}, r"sae.architecture must be one of \['abstopk', .* got 'standart'"),
        ({"sae": {"architecture": None}}, "sae.architecture must be one of .* got None"),
        ({"logger": {"log_to_wandbb": False}}, "Unknown key 'log_to_wandbb' in logger. Did you mean 'log_to_wandb'"),
        ({"objective": {"betta": 1}}, "objective has an unknown key 'betta'.*Did you mean 'beta'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unknown_keys_in_a_saved_config_are_refused_with_near_matches(changes: dict[str, Any], match: str):
    saved = through_json(runner_config().to_dict())
    for key, value in changes.items():
        saved[key] = {**saved[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=match):
        E2ESAERunnerConfig.from_dict(saved)


# The paper's runs: method.md section 5 (tables 2 and 3) and section 3 (conversion).

# fmt: off
PAPER_LAMBDAS = {
    (2, "ce"):  {"local": 0.8, "e2e": 0.5, "e2e+ds": 10},   (2, "l0"):  {"local": 4,  "e2e": 1.5, "e2e+ds": 35},
    (6, "ce"):  {"local": 4,   "e2e": 3,   "e2e+ds": 50},   (6, "l0"):  {"local": 6,  "e2e": 1.5, "e2e+ds": 50},
    (10, "ce"): {"local": 6,   "e2e": 1.5, "e2e+ds": 1.75}, (10, "l0"): {"local": 10, "e2e": 1.5, "e2e+ds": 1.75},
}
# fmt: on
PAPER_BETA = {2: 0.0036169, 6: 0.00390625, 10: 0.00013021}


@pytest.mark.parametrize("kind", ["local", "e2e", "e2e+ds"])
@pytest.mark.parametrize(("layer", "matched"), PAPER_LAMBDAS)
def test_paper_config_has_the_numbers_of_the_paper(layer: int, matched: Any, kind: Any):
    config = paper_config(layer, kind, matched, verbose=False)
    kl, mse = {"local": (0.0, 1 / 768), "e2e": (1.0, 0.0), "e2e+ds": (0.5, 0.0)}[kind]
    assert config.objective.kl == kl
    assert config.objective.mse == mse
    assert config.objective.beta == pytest.approx(PAPER_BETA[layer] if kind == "e2e+ds" else 0.0, rel=2e-5)
    assert config.objective.downstream_hooks is None
    sae: Any = config.sae
    assert sae.l1_coefficient == PAPER_LAMBDAS[layer, matched][kind] / 768
    assert (sae.architecture(), sae.d_in, sae.d_sae) == ("standard", 768, 46_080)
    assert sae.apply_b_dec_to_input is False
    assert config.hook_name == f"blocks.{layer}.hook_resid_pre"
    assert (config.model_name, config.model_class_name) == ("gpt2-small", "HookedTransformer")
    assert config.model_from_pretrained_kwargs == {"center_writing_weights": True}
    assert (config.lr, config.lr_end, config.lr_scheduler_name) == (5e-4, 5e-5, "cosineannealing")
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.999)
    assert config.lr_warm_up_steps * config.step_size_prompts == 20_000
    assert config.max_grad_norm == 10.0
    assert (config.step_size_prompts, config.context_size) == (16, 1024)
    assert config.total_training_tokens == 400_000 * 1024
    assert "owt" in config.dataset_path or "openwebtext" in config.dataset_path


def test_paper_config_takes_overrides_and_refuses_runs_that_the_paper_does_not_have():
    assert paper_config(6, "e2e", lr=1e-3, verbose=False).lr == 1e-3
    for arguments in [(3, "e2e", "ce"), (6, "e2e+down", "ce"), (6, "e2e", "l1")]:
        given: Any = arguments
        with pytest.raises(ValueError, match=r"The paper has no run for layer=.*Expected layer 2, 6 or 10"):
            paper_config(*given)
