"""Fifty optimizer steps by the kernels, and by plain code: SAELens's SAE, whole logits, torch's Adam. One curve."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import build_trainer, runner_config, tiny_hooked_transformer, token_batch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from torch import Tensor
from transformer_lens import HookedTransformer

from e2e_sae_plugin import E2ESAETrainer, Objective

HOOK = "blocks.1.hook_resid_pre"
N_STEPS, LR, LIMIT = 50, 3e-3, 0.05
D_SAE = 256
"""Large enough that an L0 of a few is below the density at which ReLU SAEs are computed sparsely."""


def plain_curve(model: HookedTransformer, sae: TrainingSAE[Any], batches: list[Tensor]) -> list[float]:
    """Loss of every step: both passes whole, every tensor dense, autograd through all of it."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, betas=(0.9, 0.999), foreach=False, fused=False)
    losses: list[float] = []
    for n_step, tokens in enumerate(batches):
        with torch.no_grad():
            cached: Any = model.run_with_cache(tokens, names_filter=[HOOK])
        clean_logits, cache = cached
        sae_in = cache[HOOK].flatten(0, 1)
        coefficients = {"l1": sae.cfg.l1_coefficient} if hasattr(sae.cfg, "l1_coefficient") else {}
        output = sae.training_forward_pass(TrainStepInput(sae_in, coefficients, None, n_step, False))
        spliced = output.sae_out.view(cache[HOOK].shape)
        logits: Any = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda *_, out=spliced, **__: out)])
        log_y, log_y_hat = torch.log_softmax(clean_logits, -1), torch.log_softmax(logits, -1)
        kl = F.kl_div(log_y_hat, log_y, log_target=True, reduction="sum") / tokens.numel()
        loss = kl + output.losses.get("l1_loss", torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), LIMIT)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trainer_of(architecture: str, sae: dict[str, Any], active: float | None) -> E2ESAETrainer:
    """Args: active: lower the encoder's bias until this share of the features is active."""
    config = runner_config(
        architecture,
        sae={"d_sae": D_SAE, **sae},
        objective=Objective.e2e(),
        training_tokens=N_STEPS * 32,
        lr=LR,
        lr_end=LR,
        lr_decay_steps=0,
        adam_beta2=0.999,
        max_grad_norm=LIMIT,
        store_batch_size_prompts=2,
    )
    trainer = build_trainer(config, tiny_hooked_transformer(act_fn="gelu_new"))
    if active is not None:
        with torch.no_grad():
            acts = trainer.spliced_model.clean_pass(token_batch(16)).activation.flatten(0, 1)
            pre = trainer.sae.encode_with_hidden_pre(acts)[1].flatten()
            sae_bias: Any = trainer.sae.b_enc
            sae_bias -= pre.topk(int(active * len(pre))).values[-1]
    return trainer


@pytest.mark.parametrize(
    ("architecture", "sae", "active", "is_sparse"),
    [
        ("standard", {"l1_coefficient": 0.01}, None, False),
        pytest.param("standard", {"l1_coefficient": 0.001}, 0.012, True, marks=pytest.mark.slow),
        ("topk", {"k": 4}, None, True),
        pytest.param("topk", {"k": 4, "rescale_acts_by_decoder_norm": False}, None, True, marks=pytest.mark.slow),
    ],
    ids=["relu", "sparse relu", "topk", "topk without rescaling"],
)
def test_the_loss_curve_is_that_of_plain_code(
    architecture: str, sae: dict[str, Any], active: float | None, is_sparse: bool
):
    trainer = trainer_of(architecture, sae, active)
    model = tiny_hooked_transformer(act_fn="gelu_new")
    batches = [token_batch(4, 8, seed) for seed in range(N_STEPS)]
    expected = plain_curve(model, copy.deepcopy(trainer.sae), batches)
    outputs = [trainer.step(batch) for batch in batches]
    found = [float(output.loss.detach()) for output in outputs]
    assert [output.feature_acts.is_sparse for output in outputs[:10]] == [is_sparse] * 10  # training may change that
    assert found == pytest.approx(expected, rel=1e-3)  # Adam turns rounding into steps, where gradients are nearly 0
    assert found[:5] == pytest.approx(expected[:5], rel=1e-5)
    assert sum(expected[-10:]) < 0.95 * sum(expected[:10])
