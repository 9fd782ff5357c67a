"""Frozen parameters stay to the bit, decoder rows keep their norms, and their gradients have no part along them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers import BUILT_IN_ARCHITECTURES, D_MODEL, build_trainer, parameters_of, runner_config, token_batch
from rounding import sum_bound
from torch import Tensor

from e2e_sae_plugin import E2ESAETrainer, Objective


@pytest.mark.parametrize("architecture", BUILT_IN_ARCHITECTURES)
def test_frozen_parameters_stay_to_the_bit_and_the_others_move(architecture: str):
    names = tuple(name for name, _ in build_trainer(runner_config(architecture)).sae.named_parameters())
    for frozen in names:
        config = runner_config(architecture, objective=Objective.finetune(), frozen_parameters=(frozen,), lr=1e-2)
        trainer = build_trainer(config)
        before = parameters_of(trainer.sae)
        for seed in range(3):
            trainer.step(token_batch(4, seed=seed))
        after = parameters_of(trainer.sae)
        assert trainer.n_skipped_steps == 0
        assert torch.equal(before[frozen], after[frozen])
        moved = [name for name in names if not torch.equal(before[name], after[name])]
        assert moved, (architecture, frozen)
        assert set(names) - set(moved) <= {frozen, "threshold", "r_mag", "b_mag", "b_gate"}


def test_decoder_norms_are_held_whatever_they_are():
    trainer = build_trainer(runner_config(keep_decoder_norms=True, lr=1e-1))
    norms = trainer.sae.W_dec.detach().norm(dim=1).clone()
    assert norms.std() > 0.01
    before = parameters_of(trainer.sae)["W_dec"]
    for seed in range(5):
        trainer.step(token_batch(4, seed=seed))
        torch.testing.assert_close(trainer.sae.W_dec.detach().norm(dim=1), norms, rtol=sum_bound(D_MODEL), atol=0)
    assert not torch.allclose(before, trainer.sae.W_dec, atol=1e-2)


def test_the_gradient_along_a_row_is_left_out(monkeypatch: pytest.MonkeyPatch):
    trainer = build_trainer(runner_config(keep_decoder_norms=True, max_grad_norm=None))
    free = build_trainer(runner_config(max_grad_norm=None))
    seen: dict[str, Tensor] = {}

    def keep(name: str, each: E2ESAETrainer) -> None:
        gradient = each.sae.W_dec.grad
        assert gradient is not None
        seen[name] = gradient.clone()

    for name, each in (("held", trainer), ("free", free)):
        monkeypatch.setattr(each, "_update", functools.partial(keep, name, each))
        each.step(token_batch(4, seed=1))
    rows = trainer.sae.W_dec.detach()
    assert (seen["free"] * rows).sum(1).abs().max() > 1e-4
    assert (seen["held"] * rows).sum(1).abs().max() < 1e-6
    # What is left is the gradient less its part along the row.
    unit = rows / rows.norm(dim=1, keepdim=True)
    along = (seen["free"] * unit).sum(1, keepdim=True) * unit
    torch.testing.assert_close(seen["held"], seen["free"] - along, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"frozen_parameters": ("W_decc",)},
            "frozen_parameters names 'W_decc', but a 'standard' SAE has the parameters",
        ),
        (
            {"frozen_parameters": ("W_enc", "b_enc", "W_dec", "b_dec")},
            "names every parameter.*nothing is left to train",
        ),
        ({"frozen_parameters": "W_dec"}, "frozen_parameters must be a list of strings, got 'W_dec'"),
        ({"frozen_parameters": ("W_dec",), "keep_decoder_norms": True}, "keep_decoder_norms=True has no effect"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        build_trainer(runner_config(**settings))
