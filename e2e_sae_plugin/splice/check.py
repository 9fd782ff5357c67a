"""Checks of a model before it is trained on: what it refuses, and which shortcuts give its own numbers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from e2e_sae_plugin.kernels.head import Unembed
from e2e_sae_plugin.precision import at_least_fp32
from e2e_sae_plugin.splice.quantised import causal_tolerance

if TYPE_CHECKING:
    from e2e_sae_plugin.splice.base import CleanPass, SplicedModel, SplicedPass

logger = logging.getLogger(__name__)

REBUILT_TOLERANCE = 1e-2
"""Relative and absolute, between the model's logits and its own head on its final hidden state."""
HEAD_TOLERANCE = 1e-3
ROUNDINGS = 8
"""Roundings to the model's dtype that its head may make on the way to one logit: product, bias, scale, soft cap."""


class SpliceError(ValueError):
    """Raised for a model, or a hook of it, that cannot be trained on."""


@dataclass(frozen=True)
class ModelOutput:
    """What a check finds out about a model's logits."""

    vocabulary: int
    """Number of logits per token."""
    unembed: Unembed
    """From final hidden states `[tokens, d_model]` to logits in at least fp32."""


def check_splice(spliced_model: SplicedModel, context_size: int) -> Tensor:
    """Run `SplicedModel.check`; whatever a model's own code raises becomes a `SpliceError` that names the model and hook."""
    try:
        return _check(spliced_model, max(2, context_size))
    except (SpliceError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise SpliceError(
            f"{_class_of(spliced_model)} cannot be run from the block of {spliced_model.position.hook_name!r}: it raises "
            f"{type(error).__name__}: {reason}. A causal language model of transformers or TransformerLens is needed; "
            "docs/guides/models.md lists those that work."
        ) from error


def _check(spliced_model: SplicedModel, context_size: int) -> Tensor:
    tokens = torch.arange(context_size, 0, -1, device=spliced_model.token_device)[None]
    with torch.no_grad():
        logits = spliced_model.full_logits(tokens)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise SpliceError(f"The model gives no logits [batch, pos, vocabulary] but {_describe(logits)}.")
        _check_causal(spliced_model, tokens, logits)
        clean, rebuilt = _with_fitting_kernels(spliced_model, tokens, logits)
    if not torch.isfinite(logits).all():
        raise SpliceError(
            f"The model's logits are not finite on the token ids {tokens[0].tolist()}, without any SAE. Its weights are "
            f"damaged, or its dtype ({logits.dtype}) is too narrow for them."
        )
    difference = (rebuilt.float() - logits[0].float()).abs()
    if not bool((difference <= REBUILT_TOLERANCE * (1 + logits[0].float().abs())).all()):
        raise SpliceError(
            f"The logits of {_class_of(spliced_model)} are not its unembedding of the final hidden state (difference "
            f"{float(difference.max()):.2g}), so the KL cannot be computed in chunks. Please report the model class."
        )
    _check_activation(spliced_model, tokens, clean)
    _check_spliced_pass(spliced_model, clean)
    assert clean.hidden is not None
    spliced_model.output = ModelOutput(logits.shape[-1], _fitting_unembedding(spliced_model, clean.hidden[0]))
    return clean.activation


def _with_fitting_kernels(spliced_model: SplicedModel, tokens: Tensor, logits: Tensor) -> tuple[CleanPass, Tensor]:
    """Clean pass and logits of the model's own code; torch's kernels stay in use if they give the same."""
    clean, rebuilt = _clean_logits(spliced_model, tokens)
    if spliced_model.use_native_kernels(False):
        native, (clean, rebuilt) = rebuilt, _clean_logits(spliced_model, tokens)
        tolerance = float(logits.abs().max()) * torch.finfo(logits.dtype).eps ** 0.5
        if float((native - rebuilt).abs().max()) <= tolerance:
            spliced_model.use_native_kernels(True)
            clean = spliced_model.clean_pass(tokens)
        else:
            logger.info("This model is run by its own code, not by torch's faster kernels, which differ from it.")
    return clean, rebuilt


def _clean_logits(spliced_model: SplicedModel, tokens: Tensor) -> tuple[CleanPass, Tensor]:
    clean = spliced_model.clean_pass(tokens)
    assert clean.hidden is not None
    return clean, spliced_model.logits(clean.hidden[0])


@torch.no_grad()
def _fitting_unembedding(spliced_model: SplicedModel, hidden: Tensor) -> Unembed:
    """The first linear head that gives the model's logits, on hidden states large enough to reach any soft cap too."""

    def own(hidden: Tensor) -> Tensor:
        return spliced_model.logits(hidden).float()

    logits = own(hidden)
    probe = torch.cat([hidden, hidden * (1e3 / float(logits.abs().max().clamp_min(1e-3)))])
    expected = own(probe)
    for head in spliced_model.linear_heads():
        got = head(probe.to(head.weight)).to(expected.device)
        if got.shape == expected.shape and _is_near(got, expected, hidden.dtype):
            return head
    if at_least_fp32(hidden.dtype) != hidden.dtype:
        logger.warning(
            "The output embedding of %s is not a plain linear map, so its logits are rounded to %s before the softmax: the "
            "KL can be off by tens of percent. Load the model in float32 for exact ones.",
            _class_of(spliced_model),
            hidden.dtype,
        )
    return own


def _is_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits `[tokens, vocabulary]` differ by no more than what a head in `dtype` rounds off.

    Single logits may be several roundings of a token's largest product off. On average they are not, which tells a wrong
    scale from a rounding.
    """
    eps = torch.finfo(dtype).eps
    error, largest = (got - expected).abs(), expected.abs().amax(1, keepdim=True)
    each = error <= HEAD_TOLERANCE + max(HEAD_TOLERANCE, ROUNDINGS * eps) * largest
    average = error.square().mean().sqrt() <= max(HEAD_TOLERANCE, eps) * expected.square().mean().sqrt()
    return bool(each.all()) and bool(average)


def _check_causal(spliced_model: SplicedModel, tokens: Tensor, logits: Tensor) -> None:
    changed = tokens.clone()
    changed[0, -1] = 0  # not the token it is (those count down to 1)
    moved = (spliced_model.full_logits(changed)[0, :-1].float() - logits[0, :-1].float()).abs().max()
    if float(moved) > causal_tolerance(spliced_model.model) * float(logits.float().abs().max()):
        raise SpliceError(
            f"The model is not causal: changing the last token moves the logits of earlier positions by {moved:.2g}. "
            "End-to-end training needs an autoregressive language model."
        )


def _check_activation(spliced_model: SplicedModel, tokens: Tensor, clean: CleanPass) -> None:
    """Refuse what is not one vector for each token, or one per head: attention patterns, dimensions before the batch."""
    hook_name = spliced_model.position.hook_name
    activation = clean.activation
    shape = tuple(activation.shape) if isinstance(activation, Tensor) else ()
    fits = len(shape) in (3, 4) and shape[:2] == tokens.shape and activation.is_floating_point()
    if fits and len(shape) == 4:  # heads or a pattern? The latter's last dimension grows with the tokens
        shorter = spliced_model.clean_pass(tokens[:, :-1]).activation
        fits = shorter.shape[1] == shape[1] - 1 and shorter.shape[2:] == activation.shape[2:]
    if not fits:
        raise SpliceError(
            f"hook_name {hook_name!r} has {_describe(activation)} for tokens of shape {tuple(tokens.shape)}. An SAE needs "
            "one vector per token, [batch, pos, d] or [batch, pos, heads, d_head], such as the residual stream, an MLP's "
            "output or attn.hook_z."
        )


def _check_spliced_pass(spliced_model: SplicedModel, clean: CleanPass) -> None:
    """Refuse a model whose output changes when the activation itself is spliced in, or has no gradient when another is."""
    hook_name = spliced_model.position.hook_name
    assert clean.hidden is not None
    with torch.no_grad():
        same = spliced_model.spliced_pass(clean, clean.activation.clone()).hidden
    assert same is not None
    difference = float((same.float() - clean.hidden.float()).abs().max())
    if difference > float(clean.hidden.float().abs().max()) * torch.finfo(clean.hidden.dtype).eps ** 0.5:
        raise SpliceError(
            f"{_class_of(spliced_model)} cannot be run from the block of {hook_name!r}: with the activation left as it is, "
            f"its final hidden state changes by {difference:.2g}. Its blocks share something that is not known here; use "
            "a hook in an earlier block, or report the model class."
        )
    # Another one: TransformerBridge leaves out a replacement that is equal to what it would replace.
    changed = (clean.activation * 1.5 + 0.5).requires_grad_()
    with torch.enable_grad():
        spliced = spliced_model.spliced_pass(clean, changed)
    if spliced.hidden is None or not spliced.hidden.requires_grad:
        raise SpliceError(
            f"The output of {_class_of(spliced_model)} does not depend on the activation at {hook_name!r}. Use a hook that "
            "the model computes with."
        )
    later = [hook for hook in spliced_model.downstream_hooks if _is_later(spliced_model, hook, spliced, changed)]
    spliced_model.downstream_hooks = tuple(later)


def _is_later(spliced_model: SplicedModel, hook: str, spliced: SplicedPass, activation: Tensor) -> bool:
    """Whether a downstream hook is computed from the SAE's output; one of the user's that is not is refused."""
    hook_name, value = spliced_model.position.hook_name, spliced.downstream.get(hook)
    if value is None or not value.requires_grad:
        raise SpliceError(not_downstream(hook, hook_name))
    # Blocks may be on several devices.
    is_same = value.shape == activation.shape and torch.equal(value.to(activation.device), activation)
    if is_same and not spliced_model.chooses_downstream:
        raise SpliceError(not_downstream(hook, hook_name))
    return not is_same  # in BLOOM, whose MLP adds the residual, what leaves the block is what leaves the MLP


def not_downstream(hook: str, hook_name: str) -> str:
    """Return the error for a downstream hook that is none."""
    return (
        f"objective.downstream_hooks: {hook!r} is not downstream of the SAE at {hook_name!r}: its activation does not "
        "depend on the SAE's output, or is that output. Name hooks that the model computes after the SAE."
    )


def not_called(hook_name: str) -> str:
    """Return the error for a hook that a forward pass does not call."""
    return (
        f"The model does not call the hook {hook_name!r} in a forward pass. Use another hook, or turn on what it belongs to "
        "(TransformerLens has switches such as model.set_use_attn_result(True) and model.set_use_hook_mlp_in(True))."
    )


def _class_of(spliced_model: SplicedModel) -> str:
    model: Any = spliced_model.model
    wrapped = getattr(model, "original_model", None) or getattr(model, "model", None)
    return type(model if wrapped is None else wrapped).__name__


def _describe(value: Any) -> str:
    return f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
