"""Few numbers in the place of weights: the chain rule against autograd, what stays put, and exact resumes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BUILT_IN_ARCHITECTURES,
    D_MODEL,
    build_trainer,
    parameters_of,
    runner_config,
    tiny_hooked_transformer,
    token_batch,
    token_dataset,
    training_sae,
)
from rounding import sum_bound
from sae_lens import SAE
from torch import Tensor

from e2e_sae_plugin import E2ESAETrainingRunner, Objective
from e2e_sae_plugin.adapters import LowRankAdapter, ScaleAdapter


def a_weighted_sum(weight: Tensor) -> Tensor:
    """A loss with a gradient that depends on the weight."""
    return (weight.pow(3) * torch.linspace(-1, 1, weight.numel()).view_as(weight)).sum()


@pytest.mark.parametrize("norms_are_held", [False, True])
def test_the_gradients_of_a_low_rank_change_are_those_of_autograd(norms_are_held: bool):
    sae = training_sae(runner_config())
    adapter = LowRankAdapter(sae, ("W_enc", "W_dec"), rank=3, seed=0)
    norms = adapter.base["W_dec"].norm(dim=1, keepdim=True) if norms_are_held else None
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    adapter.write(norms)
    expected: dict[str, Tensor] = {}
    for name in ("W_enc", "W_dec"):
        a, b = (adapter.parameters[f"{name}.{factor}"].detach().clone().requires_grad_() for factor in "AB")
        weight = adapter.base[name] + a @ b
        if name == "W_dec" and norms is not None:
            weight = weight / weight.norm(dim=1, keepdim=True) * norms
        torch.testing.assert_close(sae.get_parameter(name).detach(), weight.detach())
        gradients = torch.autograd.grad(a_weighted_sum(weight), (a, b))
        expected |= {f"{name}.{factor}": gradient for factor, gradient in zip("AB", gradients, strict=True)}
        gradient = torch.autograd.grad(a_weighted_sum(sae.get_parameter(name)), sae.get_parameter(name))[0]
        if name == "W_dec" and norms is not None:  # as `DecoderNorms.project_gradient` leaves it
            rows = sae.W_dec.detach()
            gradient = gradient - (gradient * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True) * rows
        sae.get_parameter(name).grad = gradient
    adapter.pull_gradients()
    assert sae.W_dec.grad is None
    for name, gradient in expected.items():
        torch.testing.assert_close(adapter.parameters[name].grad, gradient, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_scale_is_that_of_autograd():
    sae = training_sae(runner_config())
    adapter = ScaleAdapter(sae)
    scale = (1 + 0.3 * torch.randn(sae.cfg.d_sae, 1)).requires_grad_()
    with torch.no_grad():
        adapter.parameters["W_dec.scale"].copy_(scale)
    adapter.write(None)
    (expected,) = torch.autograd.grad(a_weighted_sum(scale * adapter.base["W_dec"]), scale)
    sae.W_dec.grad = torch.autograd.grad(a_weighted_sum(sae.W_dec), sae.W_dec)[0]
    adapter.pull_gradients()
    torch.testing.assert_close(adapter.parameters["W_dec.scale"].grad, expected)


@pytest.mark.parametrize("architecture", BUILT_IN_ARCHITECTURES)
def test_a_low_rank_run_changes_its_weights_by_that_rank(architecture: str):
    config = runner_config(
        architecture, objective=Objective.finetune(), adapter="low_rank", adapter_rank=2, lr=1e-2, max_grad_norm=None
    )
    trainer = build_trainer(config)
    before = parameters_of(trainer.sae)
    for seed in range(4):
        trainer.step(token_batch(4, seed=seed))
    after = parameters_of(trainer.sae)
    for name in trainer.adapter.weights if trainer.adapter else ():
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert values[1] > 1e-3
        assert values[2] < 1e-5 * values[0]
    assert not torch.equal(before["b_dec"], after["b_dec"])  # what no adapter stands for is trained as ever
    assert len(trainer.optimizer.param_groups[0]["params"]) == len(trainer.trained_parameters())
    assert trainer.sae.W_dec not in trainer.optimizer.state


def test_a_low_rank_run_holds_the_decoders_norms():
    config = runner_config(adapter="low_rank", keep_decoder_norms=True, lr=3e-2)
    trainer = build_trainer(config)
    norms = trainer.sae.W_dec.detach().norm(dim=1).clone()
    before = parameters_of(trainer.sae)["W_dec"]
    for seed in range(5):
        trainer.step(token_batch(4, seed=seed))
    torch.testing.assert_close(trainer.sae.W_dec.detach().norm(dim=1), norms, rtol=sum_bound(D_MODEL), atol=0)
    assert not torch.allclose(before, trainer.sae.W_dec, atol=1e-2)


def test_scales_leave_every_direction_and_frozen_parameters_where_they_are():
    frozen = ("W_enc", "b_enc")
    config = runner_config(adapter="scale", frozen_parameters=frozen, lr=1e-2)
    trainer = build_trainer(config)
    before = parameters_of(trainer.sae)
    for seed in range(5):
        trainer.step(token_batch(4, seed=seed))
    after = parameters_of(trainer.sae)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    cosines = torch.cosine_similarity(before["W_dec"], after["W_dec"], dim=1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines))
    assert (after["W_dec"].norm(dim=1) / before["W_dec"].norm(dim=1) - 1).abs().max() > 1e-2
    assert not torch.equal(before["b_dec"], after["b_dec"])


def test_a_skipped_step_leaves_no_gradient_behind(monkeypatch: pytest.MonkeyPatch):
    trainer = build_trainer(runner_config(adapter="scale", lr=1e-2))
    before = parameters_of(trainer.sae)
    monkeypatch.setattr(trainer, "_clip_gradients", lambda: False)
    trainer.step(token_batch(4))
    assert trainer.n_skipped_steps == 1
    assert all(p.grad is None for p in [*trainer.sae.parameters(), *trainer.trained_parameters().values()])
    assert all(torch.equal(before[name], value) for name, value in parameters_of(trainer.sae).items())


@pytest.mark.parametrize(
    "settings", [{"adapter": "low_rank", "keep_decoder_norms": True}, {"adapter": "scale"}], ids=["low_rank", "scale"]
)
def test_a_resumed_run_ends_with_the_same_sae(settings: dict[str, Any], tmp_path: Path):
    def run(name: str, **more: Any) -> Path:
        config = runner_config(
            objective=Objective.finetune(), lr=1e-2, checkpoint_every_minutes=1e-9, keep_checkpoints=100,
            **settings, **more, output_path=str(tmp_path / name), checkpoint_path=str(tmp_path / "checkpoints"),
        )  # fmt: skip
        given = {"override_dataset": token_dataset(), "override_model": tiny_hooked_transformer()}
        E2ESAETrainingRunner(config, **given, override_sae=training_sae(config)).run()
        return tmp_path / name

    whole = run("whole")
    folders = [path for path in sorted((tmp_path / "checkpoints").rglob("[0-9]*")) if (path / "cfg.json").exists()]
    assert len(folders) == 10
    for index in (0, 5, 8):
        again = run(f"again{index}", resume_from_checkpoint=str(folders[index]))
        for file in ("sae_weights.safetensors", "metrics.jsonl"):
            assert (whole / file).read_bytes() == (again / file).read_bytes()
    # A checkpoint is a stock SAE.
    assert set(SAE.load_from_disk(str(whole)).state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "lora"}, "adapter must be 'none', 'low_rank' or 'scale', got 'lora'"),
        ({"adapter_rank": 4}, "adapter_rank=4 has no effect with adapter='none'"),
        ({"adapter": "low_rank", "adapter_rank": 17}, "adapter_rank must be from 1 to d_in=16, got 17"),
        ({"adapter": "scale", "keep_decoder_norms": True}, "changes the decoder's norms"),
        ({"architecture": "matching_pursuit", "adapter": "scale"}, "which reads with its decoder"),
    ],
)
def test_adapters_that_mean_nothing_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        runner_config(**settings)


def test_nothing_left_to_adapt_is_refused():
    config = runner_config(adapter="low_rank", frozen_parameters=("W_enc", "W_dec"))
    build = functools.partial(build_trainer, config)
    with pytest.raises(ValueError, match="has nothing to adapt: W_enc and W_dec are among frozen_parameters"):
        build()
