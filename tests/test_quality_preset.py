"""`presets.quick_config`: the recipe to start with."""

from __future__ import annotations

import math
from typing import Any

import pytest
from sae_lens import SAE, LoggingConfig, TopKTrainingSAEConfig

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective
from e2e_sae_plugin.demo import demo_dataset, load_demo_model
from e2e_sae_plugin.presets import quick_config

HOOK = "blocks.3.hook_resid_pre"
QUIET: dict[str, Any] = {"logger": LoggingConfig(log_to_wandb=False), "checkpoint_path": None, "verbose": False}


def test_the_recipe_is_the_one_that_was_measured():
    cfg = quick_config(HOOK, 128, 102_400, **QUIET)
    assert cfg.sae == TopKTrainingSAEConfig(
        d_in=128, d_sae=1024, k=40, normalize_activations="expected_average_only_in"
    )
    assert cfg.objective == Objective.finetune()
    assert (cfg.local_first, cfg.b_dec_init_method) == (0.9, "auto")
    assert (cfg.train_batch_size_tokens, cfg.store_batch_size_prompts, cfg.context_size) == (512, 4, 128)
    assert (cfg.lr, cfg.lr_end, cfg.lr_scheduler_name) == (1e-2, 1e-4, "cosineannealing")
    assert cfg.total_training_steps == 200
    assert cfg.lr_warm_up_steps == 20  # a tenth of the run


def test_the_warm_up_of_a_long_run_is_a_hundred_steps():
    assert quick_config(HOOK, 128, 5_120_000, **QUIET).lr_warm_up_steps == 100


def test_the_rate_falls_with_the_root_of_the_number_of_features():
    cfg = quick_config(HOOK, 128, 102_400, d_sae=16 * 1024, **QUIET)
    assert math.isclose(cfg.lr, 1e-2 / 4)
    assert cfg.lr_end is not None
    assert math.isclose(cfg.lr_end, 1e-4 / 4)


def test_a_rate_of_the_users_own_brings_its_end_along_unless_that_is_given_too():
    assert quick_config(HOOK, 128, 102_400, lr=3e-3, **QUIET).lr_end == pytest.approx(3e-5)
    assert quick_config(HOOK, 128, 102_400, lr=3e-3, lr_end=1e-3, **QUIET).lr_end == 1e-3


def test_sizes_and_overrides_reach_the_config():
    cfg = quick_config(
        HOOK, 64, 64_000, d_sae=256, k=8, context_size=32, step_sequences=10, objective="e2e", local_first=0.5, **QUIET
    )
    assert (cfg.sae.d_in, cfg.sae.d_sae, cfg.step_size_prompts, cfg.micro_batch_size_prompts) == (64, 256, 10, 10)
    assert isinstance(cfg.sae, TopKTrainingSAEConfig)
    assert cfg.sae.k == 8
    assert (cfg.objective, cfg.local_first) == (Objective.e2e(), 0.5)


@pytest.mark.parametrize(
    "changed", [{"d_in": 0}, {"training_tokens": 0}, {"context_size": 0}, {"step_sequences": 0}, {"d_sae": 0}]
)
def test_sizes_below_one_are_refused_by_name(changed: dict[str, int]):
    arguments: dict[str, Any] = {"hook_name": HOOK, "d_in": 128, "training_tokens": 102_400, **changed}
    with pytest.raises(ValueError, match=f"{next(iter(changed))} must be at least 1, got 0"):
        quick_config(**arguments, **QUIET)


@pytest.mark.parametrize(
    "changed", [{"d_sae": "100"}, {"d_in": None}, {"k": 2.5}, {"training_tokens": float("inf")}, {"context_size": True}]
)
def test_sizes_that_are_no_whole_numbers_are_refused_by_name(changed: dict[str, Any]):
    name, value = next(iter(changed.items()))
    arguments: dict[str, Any] = {"hook_name": HOOK, "d_in": 128, "training_tokens": 102_400, **changed}
    with pytest.raises(ValueError, match=f"{name} must be a whole number, got {value!r}"):
        quick_config(**arguments, **QUIET)


def test_a_run_shorter_than_a_step_is_refused_as_in_any_config():
    with pytest.raises(ValueError, match="training_tokens=100 is less than one step"):
        quick_config(HOOK, 128, 100, **QUIET)


def test_the_config_comes_back_from_its_own_dict():
    cfg = quick_config(HOOK, 128, 102_400, **QUIET)
    assert E2ESAERunnerConfig.from_dict(cfg.to_dict()).to_dict() == cfg.to_dict()


@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples")
def test_ten_steps_of_it_run_on_the_bundled_model_and_stock_sae_lens_loads_the_result(tmp_path: Any):
    cfg = quick_config(
        HOOK, 128, 10 * 2 * 32, d_sae=256, k=8, context_size=32, step_sequences=2, output_path=str(tmp_path / "sae"),
        model_name="e2e-sae-demo", dataset_path="e2e-sae-demo", n_batches_for_norm_estimate=2, n_eval_batches=0, **QUIET,
    )  # fmt: skip
    dataset = demo_dataset("evaluation", 32).select(range(64))  # fewer files to tokenise
    runner = E2ESAETrainingRunner(cfg, override_model=load_demo_model(), override_dataset=dataset)
    runner.run()
    sae = SAE.load_from_disk(cfg.output_path or "")
    assert sae.cfg.architecture() == "topk"
    assert sae.cfg.metadata.local_first == 0.9


def test_fewer_steps_than_leave_an_end_to_end_one_are_refused():
    quick_config(HOOK, 128, 5120, **QUIET)
    with pytest.raises(ValueError, match=r"local_first=0.9 leaves none of the 9 steps \(512 tokens each\)"):
        quick_config(HOOK, 128, 9 * 512, **QUIET)


def test_an_sae_of_the_users_own_decides_the_rate_and_contradicts_no_d_sae():
    sae = TopKTrainingSAEConfig(d_in=128, d_sae=4096, k=20)
    cfg = quick_config(HOOK, 128, 102_400, sae=sae, **QUIET)
    assert cfg.sae == sae
    assert cfg.lr == pytest.approx(5e-3)
    with pytest.raises(ValueError, match="d_sae=64 contradicts sae, which has d_sae=4096"):
        quick_config(HOOK, 128, 102_400, d_sae=64, sae=sae, **QUIET)
