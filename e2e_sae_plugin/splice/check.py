"""What is found out about a model before it is trained on: what it refuses, and which shortcuts give its own numbers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from e2e_sae_plugin.kernels.kl import Unembed
from e2e_sae_plugin.splice.quantised import causal_tolerance

if TYPE_CHECKING:
    from e2e_sae_plugin.splice.base import CleanPass, SplicedModel

logger = logging.getLogger(__name__)


def check_splice(spliced_model: SplicedModel, context_size: int) -> Tensor:
    """`SplicedModel.check`."""
    tokens = torch.arange(max(2, context_size), 0, -1, device=spliced_model.token_device)[None]
    with torch.no_grad():
        logits = spliced_model.full_logits(tokens)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise ValueError(f"The model gives no logits [batch, pos, vocabulary] but {_describe(logits)}.")
        spliced_model.vocabulary = logits.shape[-1]
        _check_causal(spliced_model, tokens, logits)
        clean, rebuilt = _with_fitting_kernels(spliced_model, tokens, logits)
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"The model's logits are not finite on the token ids {tokens[0].tolist()}, without any SAE. Its weights are "
            f"damaged, or its dtype ({logits.dtype}) is too narrow for them."
        )
    if not torch.allclose(rebuilt.float(), logits[0].float(), rtol=1e-2, atol=1e-2):
        raise ValueError(
            "The model's logits are not its unembedding of the final hidden state "
            f"(difference {float((rebuilt.float() - logits[0].float()).abs().max()):.2g}), so the KL cannot be "
            "computed in chunks. Please report the model class: " + type(spliced_model.model).__name__
        )
    _check_downstream(spliced_model, clean)
    assert clean.hidden is not None
    spliced_model.unembed = _fastest_unembedding(spliced_model, clean.hidden[0])
    return clean.activation


def _with_fitting_kernels(spliced_model: SplicedModel, tokens: Tensor, logits: Tensor) -> tuple[CleanPass, Tensor]:
    """Clean pass and logits of the model's own code; torch's kernels stay in use if they give the same."""
    clean, rebuilt = _clean_logits(spliced_model, tokens)
    if spliced_model.use_native_kernels(False):
        native, (clean, rebuilt) = rebuilt, _clean_logits(spliced_model, tokens)
        tolerance = float(logits.abs().max()) * torch.finfo(logits.dtype).eps ** 0.5
        if float((native - rebuilt).abs().max()) <= tolerance:
            spliced_model.use_native_kernels(True)
        else:
            logger.info("This model is run by its own code, not by torch's faster kernels, which differ from it.")
    return clean, rebuilt


def _clean_logits(spliced_model: SplicedModel, tokens: Tensor) -> tuple[CleanPass, Tensor]:
    clean = spliced_model.clean_pass(tokens)
    assert clean.hidden is not None
    return clean, spliced_model.logits(clean.hidden[0])


@torch.no_grad()
def _fastest_unembedding(spliced_model: SplicedModel, hidden: Tensor) -> Unembed:
    """The linear head if it gives the model's logits, on hidden states large enough to reach any soft cap too."""
    head = spliced_model.linear_head()
    if head is None:
        return spliced_model.logits
    logits = spliced_model.logits(hidden)
    probe = torch.cat([hidden, hidden * (1e3 / float(logits.abs().max().clamp_min(1e-3)))])
    expected = spliced_model.logits(probe).float()
    got = head(probe.to(head.weight)).to(logits.device).float()
    same = got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-3, atol=1e-3)
    return head if same else spliced_model.logits


def _check_causal(spliced_model: SplicedModel, tokens: Tensor, logits: Tensor) -> None:
    changed = tokens.clone()
    changed[0, -1] = 0  # not the token it is (those count down to 1)
    moved = (spliced_model.full_logits(changed)[0, :-1].float() - logits[0, :-1].float()).abs().max()
    if float(moved) > causal_tolerance(spliced_model.model) * float(logits.float().abs().max()):
        raise ValueError(
            f"The model is not causal: changing the last token moves the logits of earlier positions by {moved:.2g}. "
            "End-to-end training needs an autoregressive language model."
        )


def _check_downstream(spliced_model: SplicedModel, clean: CleanPass) -> None:
    """Downstream means: computed in the spliced pass, from the SAE's output, and not that output itself."""
    if not spliced_model.downstream_hooks:
        return
    activation = clean.activation.detach().clone().requires_grad_()
    with torch.enable_grad():
        spliced = spliced_model.spliced_pass(clean, activation)
    for hook in spliced_model.downstream_hooks:
        value = spliced.downstream.get(hook)
        same_place = value is not None and value.shape == activation.shape
        # Blocks may be on several devices.
        same_place = same_place and value is not None and torch.equal(value.to(activation.device), activation)
        if value is None or not value.requires_grad or same_place:
            raise ValueError(not_downstream(hook, spliced_model.position.hook_name))


def not_downstream(hook: str, hook_name: str) -> str:
    """The error for a downstream hook that is none."""
    return (
        f"objective.downstream_hooks: {hook!r} is not downstream of the SAE at {hook_name!r}: its activation does not "
        "depend on the SAE's output, or is that output. Name hooks that the model computes after the SAE."
    )


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
