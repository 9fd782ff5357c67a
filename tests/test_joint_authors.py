"""A joint splice agrees with the `SAETransformer` of the paper's authors at the same positions: loss and every gradient."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from authors import HOW_TO_INSTALL, INSTALLED, import_authors
from sae_lens import LoggingConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from test_authors_parity import (
    D_MODEL,
    D_SAE,
    N_LAYERS,
    SPARSITY,
    TOLERANCE,
    Coefficients,
    off_the_decoder,
    relative_error,
)
from test_authors_parity import model as model  # a fixture
from test_authors_parity import tokens as tokens
from torch import Tensor
from transformer_lens import HookedTransformer

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainer, splice_into
from e2e_sae_plugin.joint.splice import JointPlace, JointSplice
from e2e_sae_plugin.joint.step import JointStep
from e2e_sae_plugin.metrics_log import MetricsLog
from e2e_sae_plugin.presets import objective_from_authors

logger = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason=HOW_TO_INSTALL),
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning"),
]

HOOKS = ("blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.4.hook_resid_pre")
DOWNSTREAM = ("blocks.2.hook_resid_pre", "blocks.3.hook_resid_pre", "blocks.4.hook_resid_pre")


OBJECTIVES = {
    "kl": Coefficients(kl=1.0),
    "kl+ds": Coefficients(kl=0.5, downstream_total=2.5),
    "kl+local": Coefficients(kl=1.0, local=0.5),
    "all": Coefficients(kl=0.5, downstream_total=2.5, local=0.5),
}


def weights_of(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2 + number)
    return {
        "W_enc": torch.randn(D_MODEL, D_SAE, generator=generator) * 0.2,
        "b_enc": torch.randn(D_SAE, generator=generator) * 0.1,
        "W_dec": F.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=1),
        "b_dec": torch.randn(D_MODEL, generator=generator) * 0.1,
    }


def authors_step(
    model: HookedTransformer, tokens: Tensor, coefficients: Coefficients
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    losses, transformers = import_authors()
    cache = list(DOWNSTREAM) if coefficients.downstream_total else []
    spliced = transformers.SAETransformer(model, list(HOOKS), D_SAE / D_MODEL, init_decoder_orthogonal=False)
    spliced.tlens_model.requires_grad_(False)
    for number, hook in enumerate(HOOKS):
        sae, weights = spliced.saes[hook.replace(".", "-")], weights_of(number)
        with torch.no_grad():
            sae.encoder[0].weight.copy_(weights["W_enc"].T)
            sae.encoder[0].bias.copy_(weights["b_enc"])
            sae.decoder.weight.copy_(weights["W_dec"].T)
            sae.decoder.bias.copy_(weights["b_dec"])
    config = losses.LossConfigs(
        sparsity=losses.SparsityLoss(coeff=SPARSITY),
        in_to_orig=losses.InToOrigLoss(total_coeff=coefficients.downstream_total, hook_positions=cache)
        if cache
        else None,
        out_to_orig=None,
        out_to_in=losses.OutToInLoss(coeff=coefficients.local) if coefficients.local else None,
        logits_kl=losses.LogitsKLLoss(coeff=coefficients.kl),
    )
    clean_logits, clean_acts = spliced.forward_raw(tokens, run_entire_model=True, cache_positions=cache)
    new_logits, new_acts = spliced(tokens, sae_positions=list(HOOKS), cache_positions=cache)
    loss, _ = losses.calc_loss(clean_acts, new_acts, clean_logits, new_logits, config)
    loss.backward()
    gradients: dict[str, dict[str, Tensor]] = {}
    for hook in HOOKS:
        sae = spliced.saes[hook.replace(".", "-")]
        gradients[hook] = {
            "W_enc": sae.encoder[0].weight.grad.T,
            "b_enc": sae.encoder[0].bias.grad,
            "W_dec": sae.decoder.weight.grad.T,
            "b_dec": sae.decoder.bias.grad,
        }
    return loss.detach().squeeze(), gradients


def our_step(
    model: HookedTransformer, tokens: Tensor, coefficients: Coefficients
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    objective = objective_from_authors(
        kl=coefficients.kl,
        downstream_total=coefficients.downstream_total,
        local=coefficients.local,
        d_in=D_MODEL,
        layers_after=N_LAYERS - 1,
        n_downstream_hooks=len(DOWNSTREAM),
    )
    trainers: dict[str, E2ESAETrainer] = {}
    places: dict[str, JointPlace] = {}
    for number, hook in enumerate(HOOKS):
        sae_cfg = StandardTrainingSAEConfig(
            d_in=D_MODEL, d_sae=D_SAE, l1_coefficient=SPARSITY / D_MODEL, apply_b_dec_to_input=False
        )
        cfg: Any = E2ESAERunnerConfig(
            sae=sae_cfg,
            hook_name=hook,
            objective=objective,
            context_size=tokens.shape[1],
            train_batch_size_tokens=tokens.numel(),
            store_batch_size_prompts=2,  # three micro-batches add up to the authors' one batch
            training_tokens=tokens.numel(),
            logger=LoggingConfig(log_to_wandb=False),
            verbose=False,
        )
        sae = StandardTrainingSAE(sae_cfg)
        sae.load_state_dict(weights_of(number))
        spliced = splice_into(model, hook, needs_downstream=objective.beta > 0 and number == 0)
        spliced.check()
        places[hook] = JointPlace(spliced)
        trainers[hook] = E2ESAETrainer(cfg, sae, spliced, iter([tokens]), MetricsLog(None, to_wandb=False))
    # Given in another order than the model's.
    step = JointStep(JointSplice(dict(reversed(places.items()))), trainers, {}, objective)
    step._gradient(tokens, tokens.numel())
    assert step.loss is not None
    gradients = {
        hook: {name: p.grad for name, p in trainer.sae.named_parameters() if p.grad is not None}
        for hook, trainer in trainers.items()
    }
    return step.loss, gradients


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_loss_and_gradients_of_three_saes_are_the_authors(kind: str, model: HookedTransformer, tokens: Tensor):
    their_loss, theirs = authors_step(model, tokens, OBJECTIVES[kind])
    our_loss, ours = our_step(model, tokens, OBJECTIVES[kind])
    errors = {"loss": relative_error(our_loss, their_loss)}
    for number, hook in enumerate(HOOKS):
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            pair = ours[hook][name], theirs[hook][name]
            if name == "W_dec":
                pair = off_the_decoder(pair[0], weights_of(number)), off_the_decoder(pair[1], weights_of(number))
            assert float(pair[1].abs().max()) > 1e-6, f"nothing is compared: {hook} {name} has no gradient"
            errors[f"{hook} {name}"] = relative_error(*pair)
    logger.info("%-9s loss %.1e  largest of the gradients %.1e", kind, errors["loss"], max(errors.values()))
    assert max(errors.values()) < TOLERANCE, errors
