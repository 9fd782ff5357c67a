"""One step agrees with the paper's authors' library (`e2e-sae`): loss, its terms, and every gradient of the SAE.

`pytest tests/test_authors_parity.py -o log_cli=true -o log_cli_level=INFO` prints the largest relative errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from authors import HOW_TO_INSTALL, INSTALLED, import_authors
from sae_lens import LoggingConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainer, splice_into
from e2e_sae_plugin.metrics_log import MetricsLog
from e2e_sae_plugin.presets import objective_from_authors

logger = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason=HOW_TO_INSTALL),
    # Their library imports TransformerLens's old name of this module, and knows no other class of model than this one.
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning"),
]

TOLERANCE = 1e-4
N_LAYERS, D_MODEL, D_SAE, CONTEXT, N_PROMPTS, VOCABULARY = 5, 24, 96, 16, 6, 61
HOOK = "blocks.1.hook_resid_pre"
DOWNSTREAM = [f"blocks.{k}.hook_resid_pre" for k in range(2, N_LAYERS)]
SPARSITY = 3.0


@dataclass(frozen=True)
class Coefficients:
    """The weights of one objective as the authors' configs state them."""

    kl: float = 0.0
    downstream_total: float = 0.0
    local: float = 0.0


OBJECTIVES = {
    "local": Coefficients(local=1.0),
    "e2e": Coefficients(kl=1.0),
    "e2e+ds": Coefficients(kl=0.5, downstream_total=2.5),
}


@dataclass
class Step:
    """What a library computed in one step, in SAELens's names and orientation."""

    loss: Tensor
    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=N_LAYERS, d_model=D_MODEL, n_ctx=CONTEXT, n_heads=3, d_head=8, d_mlp=4 * D_MODEL,
            d_vocab=VOCABULARY, act_fn="gelu_new", normalization_type="LN", device="cpu", seed=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.unembed.W_U *= 8  # sharp outputs, so that the KL's direction matters
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (N_PROMPTS, CONTEXT), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """An SAE with unit-norm decoder rows; about half of its features fire on a token."""
    generator = torch.Generator().manual_seed(2)
    return {
        "W_enc": torch.randn(D_MODEL, D_SAE, generator=generator) * 0.2,
        "b_enc": torch.randn(D_SAE, generator=generator) * 0.1,
        "W_dec": F.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=1),
        "b_dec": torch.randn(D_MODEL, generator=generator) * 0.1,
    }


def authors_step(
    model: HookedTransformer, tokens: Tensor, weights: dict[str, Tensor], coefficients: Coefficients
) -> Step:
    losses, transformers = import_authors()
    local = coefficients.local > 0
    cache_positions = DOWNSTREAM if coefficients.downstream_total else None
    spliced = transformers.SAETransformer(model, [HOOK], D_SAE / D_MODEL, init_decoder_orthogonal=False)
    spliced.tlens_model.requires_grad_(False)
    sae = spliced.saes[HOOK.replace(".", "-")]
    with torch.no_grad():
        sae.encoder[0].weight.copy_(weights["W_enc"].T)
        sae.encoder[0].bias.copy_(weights["b_enc"])
        sae.decoder.weight.copy_(weights["W_dec"].T)
        sae.decoder.bias.copy_(weights["b_dec"])
    config = losses.LossConfigs(
        sparsity=losses.SparsityLoss(coeff=SPARSITY),
        in_to_orig=losses.InToOrigLoss(total_coeff=coefficients.downstream_total, hook_positions=DOWNSTREAM)
        if cache_positions
        else None,
        out_to_orig=None,
        out_to_in=losses.OutToInLoss(coeff=coefficients.local) if local else None,
        logits_kl=losses.LogitsKLLoss(coeff=coefficients.kl) if coefficients.kl else None,
    )
    clean_logits, clean_acts = spliced.forward_raw(tokens, run_entire_model=True, cache_positions=cache_positions)
    new_logits, new_acts = spliced(
        tokens, sae_positions=[HOOK], cache_positions=cache_positions, orig_acts=clean_acts if local else None
    )
    loss, terms = losses.calc_loss(clean_acts, new_acts, None if local else clean_logits, new_logits, config)
    loss.backward()
    gradients = {
        "W_enc": sae.encoder[0].weight.grad.T,
        "b_enc": sae.encoder[0].bias.grad,
        "W_dec": sae.decoder.weight.grad.T,
        "b_dec": sae.decoder.bias.grad,
    }
    return Step(loss.detach().squeeze(), {name: value.detach() for name, value in terms.items()}, gradients)


class GradientsInsteadOfUpdates(E2ESAETrainer):
    """Keeps each step's gradients, unclipped, and leaves the weights as they are."""

    gradients: dict[str, Tensor]

    def _clip_gradients(self) -> bool:
        self.gradients = {
            name: parameter.grad.clone()
            for name, parameter in self.sae.named_parameters()
            if parameter.grad is not None
        }
        return True

    def _update(self) -> None:
        self.optimizer.zero_grad()


def our_step(model: HookedTransformer, tokens: Tensor, weights: dict[str, Tensor], coefficients: Coefficients) -> Step:
    objective = objective_from_authors(
        kl=coefficients.kl,
        downstream_total=coefficients.downstream_total,
        local=coefficients.local,
        d_in=D_MODEL,
        layers_after=N_LAYERS - 1,
        n_downstream_hooks=len(DOWNSTREAM),
    )
    sae_cfg = StandardTrainingSAEConfig(
        d_in=D_MODEL, d_sae=D_SAE, l1_coefficient=SPARSITY / D_MODEL, apply_b_dec_to_input=False
    )
    cfg: Any = E2ESAERunnerConfig(
        sae=sae_cfg,
        hook_name=HOOK,
        objective=objective,
        context_size=CONTEXT,
        train_batch_size_tokens=tokens.numel(),
        store_batch_size_prompts=2,  # three micro-batches add up to the authors' one batch
        training_tokens=tokens.numel(),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    sae = StandardTrainingSAE(sae_cfg)
    sae.load_state_dict(weights)
    spliced = splice_into(model, HOOK, needs_downstream=objective.beta > 0)
    spliced.check()
    trainer = GradientsInsteadOfUpdates(cfg, sae, spliced, iter([tokens]), MetricsLog(None, to_wandb=False))
    output = trainer.step(tokens)
    return Step(output.loss, dict(output.losses), trainer.gradients)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def off_the_decoder(gradient: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """A gradient of `W_dec` without its component along each decoder row.

    That component is the one thing that differs by design: the authors normalise the rows in the forward pass, so theirs
    has none; SAELens leaves them free and weights the L1 by their norm.
    """
    rows = weights["W_dec"]
    return gradient - (gradient * rows).sum(1, keepdim=True) * rows


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_loss_and_gradients_are_the_authors(
    kind: str,
    model: HookedTransformer,
    tokens: Tensor,
    weights: dict[str, Tensor],
    record_property: Callable[[str, object], None],
):
    theirs = authors_step(model, tokens, weights, OBJECTIVES[kind])
    ours = our_step(model, tokens, weights, OBJECTIVES[kind])

    errors = {"loss": relative_error(ours.loss, theirs.loss)}
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        ours_gradient, theirs_gradient = ours.gradients[name], theirs.gradients[name]
        if name == "W_dec":
            ours_gradient, theirs_gradient = (off_the_decoder(g, weights) for g in (ours_gradient, theirs_gradient))
        assert float(theirs_gradient.abs().max()) > 1e-6, f"nothing is compared: {name} has no gradient"
        errors[name] = relative_error(ours_gradient, theirs_gradient)
    logger.info("%-7s %s", kind, "  ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    record_property("largest_relative_errors", errors)

    assert max(errors.values()) < TOLERANCE, errors


def test_terms_convert_one_by_one(model: HookedTransformer, tokens: Tensor, weights: dict[str, Tensor]):
    """The unweighted terms that are logged, not only their sum."""
    coefficients = OBJECTIVES["e2e+ds"]
    theirs = authors_step(model, tokens, weights, coefficients)
    ours = our_step(model, tokens, weights, coefficients)

    kl = theirs.terms["loss/train/logits_kl"]
    per_dimension = torch.stack([theirs.terms[f"loss/train/in_to_orig/{hook}"] for hook in DOWNSTREAM]).sum()
    l1 = theirs.terms[f"loss/train/sparsity/{HOOK}"]
    torch.testing.assert_close(ours.terms["kl_loss"], kl, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(
        ours.terms["downstream_mse_loss"], per_dimension * D_MODEL / (N_LAYERS - 1), rtol=TOLERANCE, atol=0
    )
    torch.testing.assert_close(ours.terms["l1_loss"], SPARSITY * l1, rtol=TOLERANCE, atol=0)


def test_kl_goes_from_the_clean_model(model: HookedTransformer, tokens: Tensor, weights: dict[str, Tensor]):
    """Both libraries compute `D_KL(y || y_hat)` and not the reverse, as a plain sum over the vocabulary says."""

    def replace(activation: Tensor, hook: Any) -> Tensor:
        feature_acts = torch.relu(activation @ weights["W_enc"] + weights["b_enc"])
        return feature_acts @ weights["W_dec"] + weights["b_dec"]

    with torch.no_grad():
        log_y = model(tokens).log_softmax(-1)
        log_y_hat = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, replace)]).log_softmax(-1)
    forward = (log_y.exp() * (log_y - log_y_hat)).sum(-1).mean()
    reverse = (log_y_hat.exp() * (log_y_hat - log_y)).sum(-1).mean()
    assert abs(float(forward - reverse)) > 0.1 * float(forward), "the two directions are too close to tell apart"

    theirs = authors_step(model, tokens, weights, OBJECTIVES["e2e"]).terms["loss/train/logits_kl"]
    ours = our_step(model, tokens, weights, OBJECTIVES["e2e"]).terms["kl_loss"]
    torch.testing.assert_close(theirs, forward, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(ours, forward, rtol=TOLERANCE, atol=0)
