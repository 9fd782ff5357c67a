"""The model on one device and the SAE on another: the same numbers as on one, and nothing computed across the two.

The second device is a stand-in that fails where a GPU would (`second_device`); with a GPU, the same is tried on that.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import (
    FAMILIES,
    build_trainer,
    hook_of,
    runner_config,
    token_batch,
    training_sae,
)
from second_device import SIDES, OnSecond, SecondDevice, other_device, places

from e2e_sae_plugin import Objective
from e2e_sae_plugin.preflight import FLOAT64_ARCHITECTURES, check_device

other = other_device


def trainer_on(
    sae_device: str, model_device: str, config: Any, family: str = "hooked_transformer", **settings: Any
) -> Any:
    config = copy.deepcopy(config)
    config.device, config.llm_device, config.sae.device = sae_device, model_device, sae_device
    model = FAMILIES[family]().to(model_device)
    sae = training_sae(runner_config_on_cpu(config)).to(sae_device)
    sae.cfg.device = sae_device
    return build_trainer(config, model, sae, **settings)


def runner_config_on_cpu(config: Any) -> Any:
    config = copy.deepcopy(config)
    config.sae.device = "cpu"
    return config


def test_the_second_device_refuses_what_a_gpu_refuses():
    with SecondDevice():
        here, there = torch.ones(2), torch.ones(2, device="second")
        assert isinstance(there, OnSecond)
        with pytest.raises(RuntimeError, match="same device"):
            _ = here + there
        assert (there + torch.ones(())).device == there.device


def assert_same_steps(config: Any, side: str, other: str, family: str, **settings: Any) -> None:
    here = trainer_on("cpu", "cpu", config, family, **settings)
    sae_device, model_device = places(side, other)
    apart = trainer_on(sae_device, model_device, config, family, **settings)
    batch = token_batch(4)
    for step in range(2):
        expected = here.step(batch)
        here.n_training_steps += 1
        got = apart.step(batch.to(model_device) if step else batch)
        apart.n_training_steps += 1
        torch.testing.assert_close(float(got.loss), float(expected.loss), rtol=1e-5, atol=1e-6)
    for (name, theirs), ours in zip(here.sae.named_parameters(), apart.sae.parameters(), strict=True):
        assert ours.device == torch.device(sae_device)
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=1e-4, atol=1e-5, msg=name)
    assert str(apart.act_freq_scores.device) == sae_device
    torch.testing.assert_close(apart.act_freq_scores.cpu(), here.act_freq_scores)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_steps_are_those_of_one_device(other: str, side: str, family: str):
    objective = Objective(kl=1.0, beta=0.01)
    config = runner_config("topk", hook_name=hook_of(family), objective=objective, store_batch_size_prompts=2)
    assert_same_steps(config, side, other, family)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "architecture",
    ["standard", "gated", "jumprelu", "abstopk", "batchtopk", "matryoshka_batchtopk", "matching_pursuit"],
)
def test_every_architecture(other: str, side: str, architecture: str):
    config = runner_config(architecture, store_batch_size_prompts=2)
    if side == "sae" and other.startswith("second") and architecture in FLOAT64_ARCHITECTURES:
        config.device = other
        with pytest.raises(
            ValueError, match=f"sae.architecture='{architecture}' needs float64, which device='second:0'"
        ):
            check_device(config)
        return
    assert_same_steps(config, side, other, "hooked_transformer")


@pytest.mark.parametrize(
    "sae", [{"normalize_activations": "covariance_whitening"}, {"dtype": "float64"}], ids=lambda sae: next(iter(sae))
)
def test_what_is_computed_in_float64_is_refused_on_a_device_without(other: str, sae: dict[str, Any]):
    config = runner_config("topk", sae=sae)
    check_device(config)
    config.device = other
    if other.startswith("second"):
        with pytest.raises(ValueError, match="needs float64, which device='second:0' does not have"):
            check_device(config)
    else:
        check_device(config)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({}, {"kl_top_k": 5}),
        ({}, {"kl_positions": 0.5}),
        ({"seqpos_slice": (1, 5), "train_batch_size_tokens": 16}, {}),
        ({"frozen_parameters": ("b_enc",), "keep_decoder_norms": True}, {}),
        ({"adapter": "low_rank", "adapter_rank": 2}, {}),
        ({"adapter": "scale"}, {}),
        ({"checkpoint_blocks": True}, {}),
        ({}, {"kl": 0.0, "mse": 1.0}),
        ({}, {"balance_kl": True, "mse": 1.0}),
    ],
    ids=str,
)
def test_every_option_that_makes_tensors(other: str, side: str, settings: dict[str, Any], objective: dict[str, Any]):
    config = runner_config("topk", objective=Objective(**objective), store_batch_size_prompts=2, **settings)
    assert_same_steps(config, side, other, "hooked_transformer")


@pytest.mark.parametrize("side", SIDES)
def test_excluded_tokens_may_lie_on_either_device(other: str, side: str):
    for device in ("cpu", other):
        excluded = torch.tensor([1, 2, 3]).to(device)
        assert_same_steps(runner_config("topk"), side, other, "hooked_transformer", excluded_tokens=excluded)
