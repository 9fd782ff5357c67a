"""KL, cross-entropy and their gradients in bf16 and fp16, against fp64 on the same final hidden states and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import proxy, tiny_gemma2_model, tiny_gpt2_model, tiny_hooked_transformer, token_batch
from torch import Tensor

from e2e_sae_plugin import Objective, splice_into
from e2e_sae_plugin.kernels.head import LinearHead
from e2e_sae_plugin.kernels.kl import fused_kl_sum
from e2e_sae_plugin.kernels.kl_top_k import top_k_kl_sum
from e2e_sae_plugin.precision import gradient_scale
from e2e_sae_plugin.spliced_losses import clean_micro_batch, spliced_terms

DTYPES = [torch.bfloat16, torch.float16]
VALUE, GRADIENT = 1e-2, 2e-2
"""Relative errors that are allowed. Logits in fp32 leave those of one rounding of the gradient to 16 bits, 4e-3."""
D, N = 32, 24


def head_of(dtype: torch.dtype, vocabulary: int, shift: float, soft_cap: float | None, scale: float) -> LinearHead:
    generator = torch.Generator().manual_seed(vocabulary)
    weight = torch.randn(vocabulary, D, generator=generator) / D**0.5
    bias = torch.full((vocabulary,), shift)
    return LinearHead(weight.to(dtype), bias.to(dtype), scale=scale, soft_cap=soft_cap)


def hidden_states(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    clean = 2 * torch.randn(N, D, generator=generator)
    return clean.to(dtype), (clean + 0.2 * torch.randn(N, D, generator=generator)).to(dtype)


def exact_kl(clean: Tensor, spliced: Tensor, head: LinearHead, k: int | None = None) -> tuple[Tensor, Tensor]:
    """KL sum and gradient of `spliced`, in fp64 from the very numbers that the 16-bit tensors hold."""
    leaf = spliced.detach().double().requires_grad_()
    exact = LinearHead(
        head.weight.double(), None if head.bias is None else head.bias.double(), head.scale, head.soft_cap
    )
    a, b = exact(clean.double()), exact(leaf)
    if k is not None:
        top = a.topk(k, dim=1).indices
        a, b = a.gather(1, top), b.gather(1, top)
    log_y, log_y_hat = a.log_softmax(1), b.log_softmax(1)
    value = (log_y.exp() * (log_y - log_y_hat)).sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocabulary", "shift", "soft_cap", "scale"),
    [(1_000, 0.0, None, 1.0), (50_257, -100.0, None, 1.0), (4_096, -100.0, None, 0.5), (4_096, 0.0, 3.0, 1.0)],
)
def test_kl_and_gradient_are_those_of_fp64(
    dtype: torch.dtype, vocabulary: int, shift: float, soft_cap: float | None, scale: float
):
    head = head_of(dtype, vocabulary, shift, soft_cap, scale)
    clean, spliced = hidden_states(dtype)
    leaf = spliced.clone().requires_grad_()
    value = fused_kl_sum(clean, leaf, head, vocabulary)
    value.backward()
    expected, gradient = exact_kl(clean, spliced, head)
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert relative(value, expected) < VALUE
    assert relative(leaf.grad, gradient) < GRADIENT
    # A model's own logits, rounded to its dtype, miss this by far where they lie near -100: or the test shows nothing.
    if shift and dtype == torch.bfloat16:
        assert head.bias is not None
        own = [head.shape(h @ head.weight.T + head.bias).float().log_softmax(1) for h in (clean, spliced)]
        rounded = (own[0].exp() * (own[0] - own[1])).sum()
        assert relative(rounded, expected) > 5 * VALUE


def test_a_vocabulary_of_262144_tokens_near_minus_100():
    head = head_of(torch.bfloat16, 262_144, -100.0, None, 1.0)
    clean, spliced = (hidden[:4] for hidden in hidden_states(torch.bfloat16))
    leaf = spliced.clone().requires_grad_()
    value = fused_kl_sum(clean, leaf, head, 262_144)
    value.backward()
    expected, gradient = exact_kl(clean, spliced, head)
    assert leaf.grad is not None
    assert relative(value, expected) < VALUE
    assert relative(leaf.grad, gradient) < GRADIENT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_the_kl_of_the_likeliest_tokens_is_that_of_fp64(dtype: torch.dtype, soft_cap: float | None):
    head = head_of(dtype, 2_000, -100.0 if soft_cap is None else 0.0, soft_cap, 1.0)
    clean, spliced = hidden_states(dtype)
    leaf = spliced.clone().requires_grad_()
    value = top_k_kl_sum(clean, leaf, head, 16)
    value.backward()
    expected, gradient = exact_kl(clean, spliced, head, k=16)
    assert leaf.grad is not None
    assert relative(value, expected) < VALUE
    assert relative(leaf.grad, gradient) < GRADIENT


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_itself_gives_fp32_logits_with_their_gradient(dtype: torch.dtype):
    head = head_of(dtype, 3_000, -100.0, None, 1.0)
    _, hidden = hidden_states(dtype)
    leaf = hidden.clone().requires_grad_()
    logits = head(leaf)
    assert logits.dtype == torch.float32
    assert head.bias is not None
    torch.testing.assert_close(
        logits.double(), hidden.double() @ head.weight.double().T + head.bias.double(), rtol=1e-5, atol=1e-4
    )
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    logits.backward(probe)
    assert leaf.grad is not None
    assert relative(leaf.grad, probe.double() @ head.weight.double()) < torch.finfo(dtype).eps


def models() -> dict[str, tuple[Any, str]]:
    """Of each family one, with logits near -100 where a bias can put them there."""
    hooked = tiny_hooked_transformer()
    hooked.unembed.b_U.data -= 100
    return {
        "hooked_transformer": (hooked, "blocks.1.hook_resid_pre"),
        "gpt2": (proxy(tiny_gpt2_model()), "transformer.h.0"),
        "soft cap": (proxy(tiny_gemma2_model()), "model.layers.0"),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["hooked_transformer", "gpt2", "soft cap"])
def test_a_model_in_16_bits_keeps_its_linear_head_and_its_kl(name: str, dtype: torch.dtype):
    model, hook_name = models()[name]
    model.to(dtype)
    spliced_model = splice_into(model, hook_name, needs_downstream=False)
    spliced_model.check()
    assert isinstance(spliced_model.unembed, LinearHead)
    micro = clean_micro_batch(spliced_model, token_batch(), hidden=True)
    noise = 0.1 * torch.randn(micro.clean.activation.shape, generator=torch.Generator().manual_seed(3))
    sae_out = (micro.clean.activation.float() + noise).flatten(0, 1).flatten(1)
    terms = spliced_terms(spliced_model, Objective.e2e(), [micro], [("", 1.0, sae_out)])
    # The final hidden states of both passes are the model's own; from there on all is exact.
    hidden = spliced_model.spliced_pass(micro.clean, sae_out.to(dtype).reshape(micro.clean.activation.shape)).hidden
    assert hidden is not None
    assert micro.clean.hidden is not None
    clean_hidden, spliced_hidden = (h.flatten(0, 1) for h in (micro.clean.hidden, hidden))
    expected, d_hidden = exact_kl(clean_hidden, spliced_hidden, spliced_model.unembed)
    n_tokens = len(spliced_hidden)
    assert relative(terms.named["kl_loss"], expected / n_tokens) < VALUE
    # The rest of the way is the model's own backward pass, in its dtype, from the exact gradient.
    leaf = sae_out.clone().requires_grad_()
    again = spliced_model.spliced_pass(micro.clean, leaf.to(dtype).reshape(micro.clean.activation.shape)).hidden
    assert again is not None
    (gradient,) = torch.autograd.grad(again, leaf, d_hidden.to(dtype).reshape(again.shape))
    assert relative(terms.gradients[0], gradient.double() / n_tokens) < GRADIENT


def test_gradients_of_an_fp16_model_do_not_vanish_in_a_large_step():
    """The gradient of a mean over many tokens is below fp16's smallest number, 6e-8; scaled, it is not."""
    model = tiny_hooked_transformer().to(torch.float16)
    spliced_model = splice_into(model, "blocks.1.hook_resid_pre", needs_downstream=False)
    micro = clean_micro_batch(spliced_model, token_batch(), hidden=True)
    noise = 1e-3 * torch.randn(micro.clean.activation.shape, generator=torch.Generator().manual_seed(3))
    sae_out = (micro.clean.activation.float() + noise).flatten(0, 1)
    alone = spliced_terms(spliced_model, Objective.e2e(), [micro], [("", 1.0, sae_out)]).gradients[0]
    n = 64
    step = spliced_terms(spliced_model, Objective.e2e(), n * [micro], [("", 1.0, torch.cat(n * [sae_out]))]).gradients[
        0
    ]
    assert float(step.abs().median()) < 6e-8
    assert relative(n * step[: len(alone)], alone.double()) < GRADIENT
    assert gradient_scale(torch.bfloat16, n) == 1
