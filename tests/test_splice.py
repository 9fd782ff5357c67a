"""The two passes over every model family and kind of hook point, against ordinary forward passes with hooks."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from helpers import (
    D_MODEL,
    FAMILIES,
    N_LAYERS,
    VOCABULARY,
    module_names,
    proxy,
    randomise,
    shared_model,
    tiny_bridge,
    tiny_gpt2_model,
    tiny_hooked_transformer,
    tiny_neox_model,
    tiny_tokenizer,
    token_batch,
)
from naive_passes import (
    blocks_of,
    counted_blocks,
    every_module,
    every_parameter,
    naive_run,
    snapshot,
    spliced_logits,
)
from rounding import assert_equal_sums
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn

from e2e_sae_plugin import splice_into

TL_HOOKS = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z")


def hook_cases() -> list[Any]:
    cases = []
    for family in ("hooked_transformer", "bridge"):
        names = [f"blocks.1.{inside}" for inside in TL_HOOKS] + ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]
        cases += [(family, name) for name in names]
    for family in ("gpt2", "llama", "gemma2", "gpt_neox"):
        parts = module_names(family)
        layers = parts["layers"]
        names = [f"{layers}.0", f"{layers}.1.{parts['mlp']}", f"{layers}.1.{parts['attn']}", f"{layers}.2"]
        cases += [(family, name) for name in names]
    return [pytest.param(family, name, id=f"{family}-{name}") for family, name in cases]


def start_block(hook_name: str) -> int:
    """Independent of the package: the block that holds the hook, or the next one for what a block puts out."""
    block = int(next(part for part in hook_name.split(".") if part.isdigit()))
    return block + 1 if hook_name.endswith("hook_resid_post") or hook_name[-1].isdigit() else block


def later_residuals(family: str, hook_name: str) -> list[str]:
    first = start_block(hook_name) + 1
    if family in ("hooked_transformer", "bridge"):
        return [f"blocks.{k}.hook_resid_pre" for k in range(first, N_LAYERS)]
    return [f"{module_names(family)['layers']}.{k - 1}" for k in range(first, N_LAYERS)]


# The passes compute what the model computes.


@pytest.mark.parametrize(("family", "hook_name"), hook_cases())
def test_a_perfect_sae_leaves_the_logits_bit_equal(family: str, hook_name: str):
    model = shared_model(family)
    spliced_model = splice_into(model, hook_name, needs_downstream=False)
    activation = spliced_model.check()
    spliced_model.use_native_kernels(False)  # torch's kernels for the same round otherwise
    tokens = token_batch(1)
    with torch.no_grad():
        expected = model(tokens)
        clean = spliced_model.clean_pass(tokens)
        spliced = spliced_model.spliced_pass(clean, clean.activation.clone())
        assert torch.equal(spliced_logits(spliced_model, clean.hidden), expected)
        assert torch.equal(spliced_logits(spliced_model, spliced.hidden), expected)
    assert expected.std() > 0.1
    assert activation.shape[0] == 1
    assert activation.flatten(2).shape[-1] == D_MODEL
    assert spliced_model.vocabulary == VOCABULARY


@pytest.mark.parametrize(("family", "hook_name"), hook_cases())
def test_values_and_gradients_equal_a_full_forward_pass_with_hooks(family: str, hook_name: str):
    model = shared_model(family)
    downstream = later_residuals(family, hook_name)
    spliced_model = splice_into(model, hook_name, needs_downstream=bool(downstream))
    spliced_model.check()
    assert list(spliced_model.downstream_hooks) == downstream
    tokens = token_batch(3, seed=1)
    with torch.no_grad():
        clean_logits, clean_acts = naive_run(model, tokens, {}, [hook_name, *downstream])
    clean = spliced_model.clean_pass(tokens)
    n_terms = N_LAYERS * 8 * D_MODEL + VOCABULARY  # of the sums of a pass, one after the other
    assert_equal_sums(clean.activation, clean_acts[hook_name], n_terms)
    assert_equal_sums(spliced_logits(spliced_model, clean.hidden), clean_logits, n_terms)
    for hook in downstream:
        assert_equal_sums(clean.downstream[hook], clean_acts[hook], n_terms, hook)

    generator = torch.Generator().manual_seed(2)
    replacement = clean.activation + 0.5 * torch.randn(clean.activation.shape, generator=generator)
    probe = torch.randn(clean_logits.shape, generator=generator)

    def scalar(logits: Tensor, acts: dict[str, Tensor]) -> Tensor:
        return (logits * probe).sum() + sum((acts[hook] - clean_acts[hook]).pow(2).sum() for hook in downstream)

    ours, naive = replacement.clone().requires_grad_(), replacement.clone().requires_grad_()
    spliced = spliced_model.spliced_pass(clean, ours)
    our_value = scalar(spliced_logits(spliced_model, spliced.hidden), spliced.downstream)
    naive_logits, naive_acts = naive_run(model, tokens, {hook_name: naive}, downstream)
    naive_value = scalar(naive_logits, naive_acts)
    our_value.backward()
    naive_value.backward()
    assert (naive_logits - clean_logits).abs().max() > 0.05  # the replacement matters
    torch.testing.assert_close(our_value, naive_value, rtol=1e-5, atol=1e-4)
    assert naive.grad is not None
    assert naive.grad.abs().max() > 0.01
    assert ours.grad is not None
    assert_equal_sums(ours.grad, naive.grad, 2 * n_terms)


@pytest.mark.parametrize(("family", "hook_name"), hook_cases())
def test_the_spliced_pass_starts_at_the_block_of_the_sae(family: str, hook_name: str):
    model = shared_model(family)
    spliced_model = splice_into(model, hook_name, needs_downstream=False)
    spliced_model.check()
    tokens = token_batch()
    with counted_blocks(model) as counts:
        clean = spliced_model.clean_pass(tokens)
        assert counts == dict.fromkeys(range(N_LAYERS), 1)
        counts.clear()
        spliced_model.spliced_pass(clean, clean.activation.clone().requires_grad_())
        assert counts == dict.fromkeys(range(start_block(hook_name), N_LAYERS), 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_without_the_final_hidden_state_stop_after_the_last_wanted_activation(family: str):
    is_tl = family in ("hooked_transformer", "bridge")
    hook_name = "blocks.0.hook_resid_pre" if is_tl else f"{module_names(family)['layers']}.0"
    model = shared_model(family)
    tokens = token_batch()
    alone = splice_into(model, hook_name, needs_downstream=False)
    with counted_blocks(model) as counts:
        clean = alone.clean_pass(tokens, hidden=False)
    assert clean.hidden is None
    assert set(counts) <= ({0} if not is_tl else set())
    with_downstream = splice_into(model, hook_name)
    with counted_blocks(model) as counts:
        clean = with_downstream.clean_pass(tokens, hidden=False)
        counts.clear()
        spliced = with_downstream.spliced_pass(clean, clean.activation, hidden=False)
    assert spliced.hidden is None
    assert list(spliced.downstream) == list(with_downstream.downstream_hooks)
    assert N_LAYERS - 1 not in counts  # the last block feeds no downstream point
    for hook, value in spliced.downstream.items():
        assert torch.equal(value, clean.downstream[hook])


@pytest.mark.parametrize(
    "overrides",
    [
        {"parallel_attn_mlp": True},
        {"positional_embedding_type": "shortformer"},
        {"positional_embedding_type": "rotary", "rotary_dim": 4},
        {"normalization_type": None},
        {"normalization_type": "RMS", "output_logits_soft_cap": 2.0},
        {"attn_only": True},
    ],
    ids=str,
)
def test_variants_of_hooked_transformer_are_bit_equal_too(overrides: dict[str, Any]):
    model = tiny_hooked_transformer(**overrides)
    tokens = token_batch(1)
    for hook_name in ("blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"):
        spliced_model = splice_into(model, hook_name)
        spliced_model.check()
        spliced_model.use_native_kernels(False)
        clean = spliced_model.clean_pass(tokens)
        spliced = spliced_model.spliced_pass(clean, clean.activation)
        assert torch.equal(spliced_logits(spliced_model, spliced.hidden), model(tokens))
        assert all(torch.equal(spliced.downstream[hook], clean.downstream[hook]) for hook in clean.downstream)


def test_a_hooked_transformer_that_masks_left_padding_keeps_its_mask_in_the_spliced_pass():
    model = tiny_hooked_transformer()
    model.set_tokenizer(tiny_tokenizer(), default_padding_side="left")
    tokens = token_batch(2).clamp(min=4)
    tokens[0, :3] = 3  # pad
    spliced_model = splice_into(model, "blocks.1.hook_attn_out")
    with torch.no_grad():
        expected = model(tokens, prepend_bos=False)
        clean = spliced_model.clean_pass(tokens)
        spliced = spliced_model.spliced_pass(clean, clean.activation)
    assert clean.context.attention_mask is not None
    torch.testing.assert_close(spliced_logits(spliced_model, spliced.hidden), expected, rtol=0, atol=1e-6)


def test_batches_of_different_sizes_follow_each_other():
    spliced_model = splice_into(tiny_bridge(), "blocks.1.hook_resid_pre")
    passes = [spliced_model.clean_pass(token_batch(n)) for n in (1, 4, 2)]
    for clean in passes:
        spliced = spliced_model.spliced_pass(clean, clean.activation)
        assert clean.hidden is not None
        assert spliced.hidden is not None
        assert torch.equal(spliced.hidden, clean.hidden)


# The model stays as it was.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_frozen_and_its_dropout_is_off(family: str):
    model = FAMILIES[family]()
    model.train()
    for parameter in every_parameter(model):
        parameter.requires_grad_(True)
    before = [parameter.detach().clone() for parameter in every_parameter(model)]
    is_tl = family in ("hooked_transformer", "bridge")
    hook_name = "blocks.1.hook_mlp_out" if is_tl else f"{module_names(family)['layers']}.1.mlp"
    spliced_model = splice_into(model, hook_name)
    spliced_model.check()
    assert not any(module.training for module in every_module(model))
    clean = spliced_model.clean_pass(token_batch())
    leaf = clean.activation.clone().requires_grad_()
    spliced = spliced_model.spliced_pass(clean, leaf)
    value = spliced_logits(spliced_model, spliced.hidden).pow(2).sum()
    (value + sum(a.sum() for a in spliced.downstream.values())).backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in every_parameter(model))
    assert all(parameter.grad is None for parameter in every_parameter(model))
    assert not clean.activation.requires_grad
    assert clean.hidden is not None
    assert not clean.hidden.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, every_parameter(model), strict=True))


@pytest.mark.parametrize(("family", "hook_name"), hook_cases())
def test_hooks_and_swapped_layers_are_gone_after_normal_passes(family: str, hook_name: str):
    model = shared_model(family)
    spliced_model = splice_into(model, hook_name, needs_downstream=bool(later_residuals(family, hook_name)))
    model(token_batch())  # a bridge attaches some hooks of its own at its first pass
    before = snapshot(model)
    spliced_model.check()
    clean = spliced_model.clean_pass(token_batch())
    spliced = spliced_model.spliced_pass(clean, clean.activation)
    spliced_logits(spliced_model, spliced.hidden)
    assert snapshot(model) == before


class Boom(Exception):
    pass


def _raise(*_: Any) -> None:
    raise Boom


@pytest.mark.parametrize(("family", "hook_name"), hook_cases())
def test_hooks_and_swapped_layers_are_gone_after_an_exception_inside_a_pass(family: str, hook_name: str):
    model = shared_model(family)
    spliced_model = splice_into(model, hook_name, needs_downstream=bool(later_residuals(family, hook_name)))
    spliced_model.check()
    tokens = token_batch(1)
    expected = model(tokens)
    clean = spliced_model.clean_pass(tokens)
    before = snapshot(model)
    last = blocks_of(model)[-1]
    if start_block(hook_name) < N_LAYERS:
        handle = last.register_forward_pre_hook(_raise)
        with pytest.raises(Boom):
            spliced_model.spliced_pass(clean, clean.activation)
        handle.remove()
        assert snapshot(model) == before
    handle = last.register_forward_pre_hook(_raise)
    with pytest.raises(Boom):
        spliced_model.clean_pass(tokens)
    handle.remove()
    assert snapshot(model) == before
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("family", ["bridge", "gpt2", "gemma2"])
def test_the_body_is_back_after_an_exception_inside_the_head(family: str):
    model = shared_model(family)
    is_bridge = family == "bridge"
    spliced_model = splice_into(
        model, "blocks.1.hook_resid_pre" if is_bridge else f"{module_names(family)['layers']}.0"
    )
    spliced_model.check()
    tokens = token_batch(1)
    expected = model(tokens)
    clean = spliced_model.clean_pass(tokens)
    assert clean.hidden is not None
    head = (model.original_model if is_bridge else model.model).get_output_embeddings()
    handle = head.register_forward_pre_hook(_raise)
    with pytest.raises(Boom):
        spliced_model.logits(clean.hidden[0])
    handle.remove()
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("family", ["hooked_transformer", "bridge"])
def test_a_users_own_hooks_survive_and_keep_working(family: str):
    model = FAMILIES[family]()
    hook_name = "blocks.1.hook_resid_pre"
    calls: Counter[str] = Counter()
    points = model.hook_dict
    points[hook_name].add_hook(lambda *_, **__: calls.update(["ordinary"]))
    points[hook_name].add_hook(lambda *_, **__: calls.update(["permanent"]), is_permanent=True)
    points[hook_name].add_hook(lambda *_, **__: calls.update(["level 3"]), level=3)
    spliced_model = splice_into(model, hook_name)
    spliced_model.check()
    clean = spliced_model.clean_pass(token_batch())
    spliced_model.spliced_pass(clean, clean.activation)
    assert len(points[hook_name].fwd_hooks) == 3
    calls.clear()
    model(token_batch())
    assert calls == {"ordinary": 1, "permanent": 1, "level 3": 1}


def test_a_users_own_hooks_on_a_hugging_face_model_survive_and_hosts_hooks_do_not_disturb():
    model = HookedProxyLM(tiny_gpt2_model(), tiny_tokenizer())  # SAELens hooks every module by default
    calls: Counter[str] = Counter()
    model.model.get_submodule("transformer.h.1").register_forward_hook(lambda *_: calls.update(["user"]))
    spliced_model = splice_into(model, "transformer.h.1.mlp")
    spliced_model.check()
    tokens = token_batch(1)
    clean = spliced_model.clean_pass(tokens)
    spliced = spliced_model.spliced_pass(clean, clean.activation)
    assert torch.equal(spliced_logits(spliced_model, spliced.hidden), model(tokens))
    calls.clear()
    _, cache = model.run_with_cache(tokens, names_filter=["transformer.h.1.mlp"])
    assert calls == {"user": 1}
    assert torch.equal(cache["transformer.h.1.mlp"], clean.activation)


# What is refused.


@pytest.mark.parametrize(
    ("family", "hook_name", "match"),
    [
        ("hooked_transformer", "blocks.1.hook_resid_pr", r"no hook_name.*Near matches: blocks\.1\.hook_resid_pre"),
        ("bridge", "blocks.9.hook_resid_pre", r"no hook_name.*Near matches: blocks\.\d\.hook_resid_pre"),
        ("hooked_transformer", "hook_embed", "not inside a block"),
        ("llama", "model.layers.7", r"no hook_name.*Near matches: model\.layers"),
        ("llama", "model.layers.1.mlpp", r"no hook_name.*Near matches: model\.layers\.1\.mlp"),
        ("llama", "model.norm", r"not a decoder layer or inside one. Expected a path below one of \['model\.layers'\]"),
        ("gpt2", "blocks.1.hook_resid_pre", r"no hook_name 'blocks\.1\.hook_resid_pre'"),
    ],
)
def test_hooks_that_cannot_be_spliced_are_refused(family: str, hook_name: str, match: str):
    with pytest.raises(ValueError, match=match):
        splice_into(shared_model(family), hook_name)


def check_downstream(model: Any, hook_name: str, *downstream: str) -> None:
    splice_into(model, hook_name, downstream_hooks=downstream).check()


@pytest.mark.parametrize(
    ("hook_name", "downstream"),
    [
        ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"),  # an earlier block
        ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_pre"),  # earlier in the same block
        ("blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre"),  # the SAE's own place
        ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"),  # the same place under another name
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"),
        ("blocks.1.hook_resid_pre", "hook_embed"),
    ],
)
@pytest.mark.parametrize("family", ["hooked_transformer", "bridge"])
def test_downstream_hooks_at_or_before_the_sae_are_refused(family: str, hook_name: str, downstream: str):
    if family == "bridge" and downstream == "hook_embed":
        downstream = "embed.hook_out"
    with pytest.raises(ValueError, match=rf"'{downstream}' is not downstream of the SAE at '{hook_name}'"):
        check_downstream(shared_model(family), hook_name, "blocks.2.hook_resid_pre", downstream)


@pytest.mark.parametrize("downstream", ["transformer.h.0", "transformer.h.1.attn", "transformer.h.1.mlp"])
def test_downstream_modules_at_or_before_the_sae_are_refused(downstream: str):
    with pytest.raises(ValueError, match=rf"'{downstream}' is not downstream of the SAE at 'transformer.h.1.mlp'"):
        check_downstream(proxy(tiny_gpt2_model()), "transformer.h.1.mlp", "transformer.h.1", downstream)


def test_downstream_hooks_later_in_the_same_block_are_legal():
    check_downstream(tiny_hooked_transformer(), "blocks.1.hook_resid_pre", "blocks.1.hook_attn_out")
    check_downstream(tiny_hooked_transformer(), "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out")
    check_downstream(tiny_hooked_transformer(), "blocks.2.hook_attn_out", "blocks.2.hook_resid_post")
    check_downstream(proxy(tiny_gpt2_model()), "transformer.h.1.attn", "transformer.h.1.mlp")


def test_with_parallel_attention_the_mlp_is_not_downstream_of_the_attention():
    sequential = proxy(tiny_neox_model(use_parallel_residual=False))
    check_downstream(sequential, "gpt_neox.layers.1.attention", "gpt_neox.layers.1.mlp")
    with pytest.raises(ValueError, match=r"'gpt_neox.layers.1.mlp' is not downstream of the SAE"):
        check_downstream(proxy(tiny_neox_model()), "gpt_neox.layers.1.attention", "gpt_neox.layers.1.mlp")
    with pytest.raises(ValueError, match=r"'blocks\.1\.hook_mlp_out' is not downstream of the SAE"):
        check_downstream(
            tiny_hooked_transformer(parallel_attn_mlp=True), "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"
        )


def test_downstream_hooks_that_the_model_does_not_have_are_refused_with_near_matches():
    with pytest.raises(
        ValueError, match=r"downstream_hooks: the model has no hook 'blocks\.3\.hook_resid_pre'.*Near matches: blocks\."
    ):
        splice_into(tiny_hooked_transformer(), "blocks.1.hook_resid_pre", downstream_hooks=["blocks.3.hook_resid_pre"])


@pytest.mark.parametrize(
    ("family", "hook_name"),
    [
        ("hooked_transformer", "blocks.2.hook_resid_pre"),
        ("hooked_transformer", "blocks.2.hook_mlp_out"),
        ("hooked_transformer", "blocks.1.hook_resid_post"),
        ("bridge", "blocks.2.hook_resid_post"),
        ("llama", "model.layers.2"),
        ("llama", "model.layers.1"),
        ("gpt2", "transformer.h.2.attn"),
    ],
)
def test_no_downstream_hook_left_is_refused_where_one_is_needed(family: str, hook_name: str):
    with pytest.raises(ValueError, match=rf"beta is positive but no downstream hook is left after '{hook_name}'"):
        splice_into(shared_model(family), hook_name, needs_downstream=True)
    assert splice_into(shared_model(family), hook_name).downstream_hooks == ()


def test_non_causal_models_are_refused():
    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )
    with pytest.raises(ValueError, match="The model is not causal: changing the last token moves"):
        splice_into(proxy(randomise(bert)), "bert.encoder.layer.0").check()
    bidirectional = tiny_hooked_transformer(attention_dir="bidirectional")
    with pytest.raises(ValueError, match=r"The model is not causal.*autoregressive"):
        splice_into(bidirectional, "blocks.1.hook_resid_pre").check()


def test_models_without_a_language_model_head_are_refused():
    body = tiny_gpt2_model().transformer
    with pytest.raises(ValueError, match=r"GPT2Model has no language-model head.*AutoModelForCausalLM"):
        splice_into(proxy(body), "h.1")
    classifier = transformers.GPT2ForSequenceClassification(tiny_gpt2_model().config)
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification has no language-model head"):
        splice_into(proxy(classifier), "transformer.h.1")


def test_models_without_decoder_layers_are_refused():
    with pytest.raises(ValueError, match="Sequential has no list of decoder layers"):
        splice_into(proxy(nn.Sequential(nn.Linear(2, 2))), "0")


def test_models_of_another_class_are_refused_by_name():
    with pytest.raises(ValueError, match=r"Cannot splice an SAE into a GPT2LMHeadModel\. Expected a HookedTransformer"):
        splice_into(tiny_gpt2_model(), "transformer.h.1")


def test_logits_that_are_not_the_unembedding_of_the_final_hidden_state_are_refused():
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output: Any = super().forward(*args, **kwargs)
            output.logits = output.logits + (args[0] if args else kwargs["input_ids"])[..., None]
            return output

    config = transformers.LlamaConfig(
        num_hidden_layers=3, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=VOCABULARY,
        pad_token_id=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="are not its unembedding of the final hidden state"):
        splice_into(proxy(Shifted(config)), "model.layers.0").check()


@pytest.mark.parametrize("hook_name", [f"blocks.1.{inside}" for inside in TL_HOOKS])
def test_a_bridge_with_processed_weights_is_bit_equal_and_has_their_gradients(hook_name: str):
    model = FAMILIES["bridge"]()
    model.enable_compatibility_mode()
    spliced_model = splice_into(model, hook_name, needs_downstream=False)
    spliced_model.check()
    spliced_model.use_native_kernels(False)
    tokens = token_batch(1)
    expected = model(tokens)
    clean = spliced_model.clean_pass(tokens)
    leaf = clean.activation.clone().requires_grad_()
    spliced = spliced_model.spliced_pass(clean, leaf)
    logits = spliced_logits(spliced_model, spliced.hidden)
    assert torch.equal(logits, expected)
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * probe).sum().backward()
    naive = clean.activation.clone().requires_grad_()
    (naive_run(model, tokens, {hook_name: naive}, [])[0] * probe).sum().backward()
    torch.testing.assert_close(leaf.grad, naive.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "hook_name", "said"),
    [
        ("gpt2", "blocks.2.hook_resid_pre", "use transformer.h.1, whose output is the residual stream that enters"),
        ("gpt2", "blocks.2.hook_resid_post", "use transformer.h.2, whose output is the residual stream that leaves"),
        ("llama", "blocks.2.hook_resid_pre", "use model.layers.1, whose output"),
        ("llama", "blocks.0.hook_resid_pre", "The first that can be used is model.layers.0."),
        (
            "llama",
            "blocks.1.hook_mlp_out",
            "model.layers.1 for the whole layer, or a module inside it, model.layers.1.<mod",
        ),
        ("llama", "blocks.9.hook_resid_pre", "model.layers.0 to model.layers.2 are its layers, and it has no layer 9."),
        (
            "hooked_transformer",
            "model.layers.1",
            "use blocks.1.hook_resid_post, the residual stream that leaves block 1.",
        ),
        ("bridge", "transformer.h.0", "use blocks.0.hook_"),
        ("hooked_transformer", "blocks.1", "use blocks.1.hook_resid_post"),
        ("hooked_transformer", "model.layers.1.mlp", "more are in block 1."),
        ("hooked_transformer", "model.layers.9", "There is no block 9."),
        (
            "hooked_transformer",
            "block.1.hook_resid_pre",
            "'block.1.hook_resid_pre'. Near matches: blocks.1.hook_resid_pre",
        ),
    ],
)
def test_a_hook_name_of_the_other_family_is_refused_with_its_counterpart(family: str, hook_name: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        splice_into(FAMILIES[family](), hook_name)
    assert f"The model has no hook_name {hook_name!r}." in str(refused.value)


def test_the_counterpart_that_is_named_is_the_same_activation():
    bridge, tokens = tiny_bridge(), token_batch(1)
    bridge.original_model.eval()
    _, cache = bridge.run_with_cache(tokens)
    hugging_face = tiny_gpt2_model().eval()
    outputs: list[Tensor] = []
    for layer in hugging_face.transformer.h:
        layer.register_forward_hook(lambda *seen: outputs.append(seen[2][0] if isinstance(seen[2], tuple) else seen[2]))
    hugging_face(tokens)
    for name in ("blocks.2.hook_resid_pre", "blocks.1.hook_resid_post"):
        with pytest.raises(ValueError, match="use transformer") as refused:
            splice_into(proxy(tiny_gpt2_model()), name)
        layer = int(str(refused.value).split("use transformer.h.")[1].split(",")[0])
        torch.testing.assert_close(outputs[layer], cache[name], rtol=1e-4, atol=1e-5)
