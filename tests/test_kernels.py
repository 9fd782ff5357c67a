"""Hand-written backward passes against plain code: the ReLU SAE against SAELens's own, the linear head against autograd."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from helpers import (
    build_trainer,
    proxy,
    runner_config,
    tiny_bridge,
    tiny_gemma2_model,
    tiny_gpt2_model,
    tiny_hooked_transformer,
    tiny_llama_model,
    tiny_neox_model,
    token_batch,
    training_sae,
)
from rounding import assert_equal_sums
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from e2e_sae_plugin import Objective, splice_into
from e2e_sae_plugin.kernels import kl, relu_sae
from e2e_sae_plugin.kernels.head import LinearHead
from e2e_sae_plugin.kernels.kl import fused_kl_sum

D, V, N = 6, 11, 200


def standard_sae(**settings: Any) -> Any:
    """Trained a little, so to say: biases and row lengths that matter, one dead feature, one zero decoder row."""
    sae: Any = training_sae(runner_config("standard", settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        sae.b_enc[3] = -1e3
        sae.W_dec[5] = 0
    return sae


def step_input(sae: Any) -> TrainStepInput:
    x = torch.randn(50, sae.cfg.d_in, generator=torch.Generator().manual_seed(2))
    return TrainStepInput(x, {"l1": 0.7}, None, 0, False)


def values_and_gradients(sae: Any, forward: Any, upstream: bool, own: bool) -> tuple[Any, dict[str, Tensor]]:
    """Gradients of `<probe, sae_out>` (what the spliced pass sends), of the SAE's own losses, or of both."""
    output = forward(step_input(sae))
    probe = torch.randn(output.sae_out.shape, generator=torch.Generator().manual_seed(3))
    total = torch.zeros(())
    if upstream:
        total = total + (output.sae_out * probe).sum()
    if own:
        total = total + 1.3 * output.losses["l1_loss"] + 0.2 * output.losses["mse_loss"]
    total.backward()
    gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    return output, gradients


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"])
@pytest.mark.parametrize("b_dec_on_input", [False, True])
@pytest.mark.parametrize(("upstream", "own"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("tile", [2048, 5, 1])
def test_relu_sae_equals_the_hosts_forward_and_backward(
    normalize: str, b_dec_on_input: bool, upstream: bool, own: bool, tile: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(relu_sae, "TILE_FEATURES", tile)
    sae = standard_sae(normalize_activations=normalize, apply_b_dec_to_input=b_dec_on_input)
    other = copy.deepcopy(sae)
    assert relu_sae.can_train(sae)
    ours, gradients = values_and_gradients(sae, lambda x: relu_sae.training_forward_pass(sae, x), upstream, own)
    host, expected = values_and_gradients(other, other.training_forward_pass, upstream, own)
    n_terms = sae.cfg.d_in + sae.cfg.d_sae + len(ours.sae_in)
    for name in ("sae_in", "sae_out", "feature_acts", "loss"):
        assert_equal_sums(getattr(ours, name), getattr(host, name), n_terms, name)
    assert ours.losses.keys() == host.losses.keys()
    for name in host.losses:
        assert_equal_sums(ours.losses[name], host.losses[name], n_terms, name)
    assert 0 < (ours.feature_acts > 0).float().mean() < 1
    assert gradients.keys() >= {"W_enc", "b_enc", "W_dec"}
    for name, gradient in expected.items():
        assert_equal_sums(gradients[name], gradient, 2 * n_terms, name)


@pytest.mark.parametrize("tile", [2048, 4])
@pytest.mark.parametrize("n_known", [None, 0, 3, 7])
def test_relu_sae_passes_the_numerical_gradient_check(tile: int, n_known: int | None, monkeypatch: pytest.MonkeyPatch):
    """However many tokens' pre-activations are known already."""
    monkeypatch.setattr(relu_sae, "TILE_FEATURES", tile)
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 4), (4, 9), (9,), (9, 4), (4,))
    x, *parameters = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    leaves = [p.requires_grad_() for p in parameters]

    def differentiable(*leaves: Tensor) -> Any:
        W_enc, b_enc = (leaf.detach() for leaf in leaves[:2])
        first = None if n_known is None else torch.addmm(b_enc, x[:n_known], W_enc)
        sae_out, _, weighted = relu_sae._ReLUSAE.apply(x, *leaves, False, first)  # pyright: ignore[reportGeneralTypeIssues]
        return sae_out, weighted

    torch.autograd.gradcheck(differentiable, leaves)


def test_relu_sae_is_left_to_the_host_where_it_is_another_computation():
    assert relu_sae.can_train(standard_sae())
    assert not relu_sae.can_train(standard_sae(lp_norm=2.0))
    assert not relu_sae.can_train(training_sae(runner_config("gated")))
    hooked = standard_sae()
    hooked.hook_sae_acts_post.add_hook(lambda acts, hook: acts)  # noqa: ARG005
    assert not relu_sae.can_train(hooked)
    compiled = standard_sae()
    compiled.training_forward_pass = functools.partial(compiled.training_forward_pass)  # where compile_sae puts its own
    assert not relu_sae.can_train(compiled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not relu_sae.can_train(standard_sae())


def test_a_step_with_and_without_the_relu_kernel_is_the_same(monkeypatch: pytest.MonkeyPatch):
    results = []
    for allowed in (True, False):
        with monkeypatch.context() as patch:
            if not allowed:
                patch.setattr(relu_sae, "can_train", lambda _: False)
            calls: list[int] = []
            kernel = relu_sae.training_forward_pass
            patch.setattr(relu_sae, "training_forward_pass", lambda *a, k=kernel, c=calls: (c.append(1), k(*a))[1])
            trainer = build_trainer(runner_config("standard", objective=Objective.e2e_downstream(beta=0.1)))
            output = trainer.step(token_batch(4))
            assert bool(calls) == allowed
            results.append((output, {n: p.detach().clone() for n, p in trainer.sae.named_parameters()}))
    (ours, our_weights), (host, host_weights) = results
    torch.testing.assert_close(ours.loss, host.loss)
    for name, weights in host_weights.items():
        torch.testing.assert_close(our_weights[name], weights, rtol=1e-4, atol=1e-5)


# The linear head.


def linear_head(bias: bool, transposed: bool, dtype: torch.dtype = torch.float32) -> LinearHead:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(*((D, V) if transposed else (V, D)), generator=generator).to(dtype)
    values = torch.randn(V, generator=generator).to(dtype)
    return LinearHead(weight.T if transposed else weight, values if bias else None)


def hidden_states(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    clean = torch.randn(N, D, generator=generator)
    return clean.to(dtype), (clean + 0.7 * torch.randn(N, D, generator=generator)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("chunk", [1, 50, 64, 70, 2 * N])
def test_linear_head_equals_the_same_map_as_an_opaque_function(
    bias: bool, transposed: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kl, "CHUNK_LOGIT_ELEMENTS", chunk * V)
    head = linear_head(bias, transposed)
    clean, spliced = hidden_states()
    results = []
    for unembed in (head, lambda hidden: head(hidden)):
        leaf = spliced.clone().requires_grad_()
        value = fused_kl_sum(clean, leaf, unembed, V)
        (2.0 * value).backward()
        results.append((value.detach(), leaf.grad))
    assert results[0][0] > 1
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fused_kl_sum(clean, spliced, head, V), results[0][0])


def test_linear_head_of_identical_hidden_states_has_no_kl_and_no_gradient():
    clean, _ = hidden_states()
    leaf = clean.clone().requires_grad_()
    value = fused_kl_sum(clean, leaf, linear_head(bias=True, transposed=False), V)
    value.backward()
    assert value.item() == 0
    assert leaf.grad is not None
    assert leaf.grad.abs().max() == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_linear_head_in_bf16_sums_in_fp32(autocast: bool):
    dtype = torch.float32 if autocast else torch.bfloat16
    head, (clean, spliced) = linear_head(True, False, dtype), hidden_states(dtype)
    leaf = spliced.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = fused_kl_sum(clean, leaf, head, V)
    value.backward()
    exact_leaf = spliced.float().requires_grad_()
    exact_head = LinearHead(head.weight.float(), head.bias.float())  # pyright: ignore[reportOptionalMemberAccess]
    exact = fused_kl_sum(clean.float(), exact_leaf, exact_head, V)
    exact.backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact.detach(), rtol=2e-2, atol=0)
    torch.testing.assert_close(leaf.grad.float(), exact_leaf.grad, rtol=0.05, atol=0.05)


def test_chunks_are_whole_multiples_of_64_tokens_where_that_many_fit(monkeypatch: pytest.MonkeyPatch):
    for elements, expected in ((1, 1), (50 * V, 50), (64 * V, 64), (200 * V, 192)):
        monkeypatch.setattr(kl, "CHUNK_LOGIT_ELEMENTS", elements)
        assert kl.chunk_tokens(V) == expected


@pytest.mark.parametrize(
    ("settings", "soft_cap"),
    [
        ({}, None),
        ({"normalization_type": None}, None),
        ({"output_logits_soft_cap": 2.0}, 2.0),
        ({"output_logits_soft_cap": 1e2}, 1e2),  # far above the untrained model's logits: still found
    ],
)
def test_the_linear_head_is_used_where_it_gives_the_models_logits(settings: dict[str, Any], soft_cap: float | None):
    transformer = tiny_hooked_transformer(**settings)
    model = splice_into(transformer, "blocks.1.hook_resid_pre")
    model.check()
    assert isinstance(model.unembed, LinearHead)
    assert model.unembed.soft_cap == soft_cap
    hidden = torch.randn(5, transformer.cfg.d_model, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.unembed(hidden), model.logits(hidden))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox", "bridge"])
def test_hugging_face_heads_and_bridges_have_a_linear_head(family: str):
    models: dict[str, Any] = {"gpt2": tiny_gpt2_model, "llama": tiny_llama_model, "gemma2": tiny_gemma2_model}
    models["neox"] = tiny_neox_model
    model = tiny_bridge() if family == "bridge" else proxy(models[family]())
    hook = {"bridge": "blocks.1.hook_resid_pre", "gpt2": "transformer.h.1", "neox": "gpt_neox.layers.1"}
    spliced = splice_into(model, hook.get(family, "model.layers.1"), needs_downstream=False)
    spliced.check()
    assert isinstance(spliced.unembed, LinearHead)
    assert (spliced.unembed.soft_cap is not None) == (family == "gemma2")


def test_a_head_on_whose_logits_the_model_computes_further_is_left_to_the_model():
    def quartered(module: Any, args: Any, output: Tensor) -> Tensor:
        return output / 4

    transformer = tiny_gpt2_model()
    model = proxy(transformer)
    splice_into(model, "transformer.h.1", needs_downstream=False).check()
    transformer.lm_head.register_forward_hook(quartered)
    spliced = splice_into(model, "transformer.h.1", needs_downstream=False)
    spliced.check()
    assert not isinstance(spliced.unembed, LinearHead)
