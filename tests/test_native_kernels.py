"""Torch's kernels in the place of the model's own code: the same numbers, the same hooks, and only where they fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import tiny_hooked_transformer, token_batch
from sae_lens.load_model import HookedProxyLM
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from e2e_sae_plugin import splice_into
from e2e_sae_plugin.splice.native_blocks import NativeBlocks

FITTING: list[dict[str, Any]] = [
    {},
    {"act_fn": "gelu_new"},
    {"act_fn": "gelu_fast"},
    {"act_fn": "relu"},
    {"act_fn": "silu", "gated_mlp": True},
    {"normalization_type": "LNPre"},
    {"normalization_type": "RMS"},
    {"normalization_type": "RMSPre"},
    {"normalization_type": None},
    {"attn_only": True},
    {"parallel_attn_mlp": True},
    {"positional_embedding_type": "rotary", "rotary_dim": 4},
    {"positional_embedding_type": "rotary", "rotary_dim": 2},
    {"positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_adjacent_pairs": True},
    {"n_key_value_heads": 2},
    {"use_attn_scale": False},
    {"scale_attn_by_inverse_layer_idx": True},
]
OWN_CODE: list[dict[str, Any]] = [
    {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "local", "local"]},
    {"positional_embedding_type": "alibi"},
    {"positional_embedding_type": "shortformer"},
    {"attn_scores_soft_cap": 1.0},
    {"use_qk_norm": True},
    {"act_fn": "solu_ln"},
    {"use_attn_result": True},
]


def model_of(overrides: dict[str, Any]) -> Any:
    return tiny_hooked_transformer(**overrides)


def hidden_and_gradient(spliced_model: Any, tokens: Tensor, native: bool) -> tuple[Tensor, Tensor, Tensor]:
    spliced_model.use_native_kernels(native)
    clean = spliced_model.clean_pass(tokens)
    generator = torch.Generator().manual_seed(0)
    activation = clean.activation + 0.5 * torch.randn(clean.activation.shape, generator=generator)
    leaf = activation.requires_grad_()
    spliced = spliced_model.spliced_pass(clean, leaf)
    probe = torch.randn(spliced.hidden.shape, generator=generator)
    return clean.hidden, spliced.hidden, torch.autograd.grad((spliced.hidden * probe).sum(), leaf)[0]


@pytest.mark.parametrize("overrides", FITTING, ids=str)
@pytest.mark.parametrize("hook_name", ["blocks.1.hook_resid_pre", "blocks.0.hook_attn_out"])
def test_native_blocks_compute_what_the_models_own_compute(overrides: dict[str, Any], hook_name: str):
    model = model_of(overrides)
    assert all(block is not None for block in NativeBlocks(model)._blocks)
    spliced_model = splice_into(model, hook_name, needs_downstream=False)
    spliced_model.check()
    own = hidden_and_gradient(spliced_model, token_batch(3), native=False)
    native = hidden_and_gradient(spliced_model, token_batch(3), native=True)
    for ours, expected in zip(native, own, strict=True):
        largest = float(
            expected.detach().abs().max()
        )  # attention without its scale makes rounding a hundred times larger
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3 * largest)
        assert largest > 0.01


@pytest.mark.parametrize("overrides", OWN_CODE, ids=str)
def test_blocks_of_another_make_run_their_own_code(overrides: dict[str, Any]):
    model = model_of(overrides)
    assert not NativeBlocks(model).any_fits
    spliced_model = splice_into(model, "blocks.1.hook_resid_pre", needs_downstream=False)
    assert spliced_model.use_native_kernels(True) is False
    with torch.no_grad():
        logits = spliced_model.unembed if spliced_model.check() is None else spliced_model.logits
        hidden = spliced_model.clean_pass(token_batch(2)).hidden
        assert hidden is not None
        torch.testing.assert_close(logits(hidden.flatten(0, 1)), model(token_batch(2)).flatten(0, 1))


@pytest.mark.parametrize(
    "inside",
    ["attn.hook_pattern", "attn.hook_v", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post", "ln1.hook_normalized"],
)
def test_a_users_hook_inside_a_block_is_called_and_has_its_effect(inside: str):
    model = tiny_hooked_transformer()
    spliced_model = splice_into(model, "blocks.1.hook_resid_pre", needs_downstream=False)
    spliced_model.check()
    before = spliced_model.clean_pass(token_batch(2)).hidden
    seen: list[Tensor] = []

    def halve(value: Tensor, hook: Any) -> Tensor:
        seen.append(value)
        return value / 2

    model.hook_dict[f"blocks.2.{inside}"].add_hook(halve)  # pyright: ignore[reportArgumentType]
    hooked = spliced_model.clean_pass(token_batch(2)).hidden
    assert seen
    spliced_model.use_native_kernels(False)
    expected = spliced_model.clean_pass(token_batch(2)).hidden
    assert before is not None
    assert hooked is not None
    assert expected is not None
    torch.testing.assert_close(hooked, expected, rtol=1e-4, atol=1e-4)
    assert (before - hooked).abs().max() > 1e-3
    model.reset_hooks(including_permanent=True)


def test_a_model_whose_own_code_gives_something_else_keeps_to_it():
    """A subclass of nothing known, but with a changed method: nobody can see that but by comparing."""
    model = tiny_hooked_transformer()
    attention = model.blocks[1].attn
    spliced_model = splice_into(model, "blocks.1.hook_resid_pre", needs_downstream=False)
    own_scores = attention.calculate_attention_scores
    attention.calculate_attention_scores = lambda q, k: 3 * own_scores(q, k)  # pyright: ignore
    spliced_model.check()
    with torch.no_grad():
        hidden = spliced_model.clean_pass(token_batch(2)).hidden
        assert hidden is not None
        torch.testing.assert_close(spliced_model.logits(hidden.flatten(0, 1)), model(token_batch(2)).flatten(0, 1))


def test_native_kernels_are_used_where_they_agree():
    spliced_model: Any = splice_into(tiny_hooked_transformer(), "blocks.1.hook_resid_pre", needs_downstream=False)
    spliced_model.check()
    assert spliced_model._native.wanted


def hugging_face(activation: str) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3,
        n_embd=16,
        n_head=2,
        vocab_size=64,
        n_positions=32,
        activation_function=activation,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,
    )
    tokenizer: Any = None
    return HookedProxyLM(GPT2LMHeadModel(config).eval(), tokenizer, hook_names=[])


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast"])
def test_spelled_out_gelus_are_swapped_while_a_pass_runs(activation: str):
    model = hugging_face(activation)
    modules = copy.copy(list(model.model.modules()))
    spliced_model = splice_into(model, "transformer.h.0", needs_downstream=False)
    assert spliced_model.use_native_kernels(True) is True
    spliced_model.check()
    own = hidden_and_gradient(spliced_model, token_batch(3), native=False)
    native = hidden_and_gradient(spliced_model, token_batch(3), native=True)
    for ours, expected in zip(native, own, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(ours, expected) for ours, expected in zip(native, own, strict=True))  # another kernel
    assert all(a is b for a, b in zip(model.model.modules(), modules, strict=True))


def test_other_activations_stay():
    assert (
        splice_into(hugging_face("gelu"), "transformer.h.0", needs_downstream=False).use_native_kernels(True) is False
    )


def test_an_activation_with_a_hook_is_not_swapped():
    model = hugging_face("gelu_new")
    seen: list[Tensor] = []
    model.model.transformer.h[2].mlp.act.register_forward_hook(lambda *args: seen.append(args[2]))
    spliced_model = splice_into(model, "transformer.h.0", needs_downstream=False)
    spliced_model.clean_pass(token_batch(2))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("model", "hook_name"),
    [
        (tiny_hooked_transformer(act_fn="gelu_new"), "blocks.1.mlp.hook_pre"),
        (hugging_face("gelu_new"), "transformer.h.1.mlp.c_fc"),
    ],
    ids=["transformer_lens", "hugging_face"],
)
def test_what_a_hook_took_of_a_gelus_input_is_not_overwritten(model: Any, hook_name: str):
    """In a clean pass the kernel writes to its input's memory, but not where the SAE has taken it."""
    spliced_model = splice_into(model, hook_name, needs_downstream=False)
    spliced_model.check()
    activations: list[Tensor] = []
    for native in (False, True):
        spliced_model.use_native_kernels(native)
        activations.append(spliced_model.clean_pass(token_batch(2)).activation)
    torch.testing.assert_close(activations[1], activations[0], rtol=1e-4, atol=1e-4)
    assert activations[0].min() < -0.5  # no GELU reaches that


def test_a_pre_hook_keeps_what_it_is_handed():
    model = tiny_hooked_transformer(act_fn="gelu_new")
    kept: list[tuple[Tensor, Tensor]] = []
    hook_pre: Any = model.blocks[2].mlp.hook_pre
    handle = hook_pre.register_forward_pre_hook(lambda _, args: kept.append((args[0], args[0].clone())))
    splice_into(model, "blocks.1.hook_resid_pre", needs_downstream=False).clean_pass(token_batch(2))
    handle.remove()
    assert kept
    assert all(torch.equal(tensor, copied) for tensor, copied in kept)


def test_a_users_hook_may_write_in_place():
    model: Any = tiny_hooked_transformer()
    model.add_perma_hook("blocks.2.attn.hook_z", lambda value, hook: value.mul_(0.9))  # noqa: ARG005
    spliced_model = splice_into(model, "blocks.1.hook_resid_pre", needs_downstream=False)
    spliced_model.check()
    own = hidden_and_gradient(spliced_model, token_batch(3), native=False)
    native = hidden_and_gradient(spliced_model, token_batch(3), native=True)
    for ours, expected in zip(native, own, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
