"""Models that come wrapped: compiled, with SAEs of SAELens, or TransformerLens's own behind a bridge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    FAMILIES,
    hook_of,
    proxy,
    runner_config,
    shared_model,
    tiny_bridge,
    tiny_gpt2_model,
    tiny_hooked_transformer,
    tiny_tokenizer,
    token_batch,
    token_dataset,
)
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from e2e_sae_plugin import E2ESAETrainingRunner, splice_into

TOKENS = token_batch(2)


def hidden_of(model: Any, hook_name: str) -> Tensor:
    spliced = splice_into(model, hook_name, needs_downstream=False)
    spliced.check()
    hidden = spliced.clean_pass(TOKENS, hidden=True, downstream=False).hidden
    assert hidden is not None
    return hidden


@pytest.mark.parametrize("family", ["hooked_transformer", "bridge", "gpt2"])
def test_a_compiled_model_is_spliced_as_the_one_in_it(family: str):
    compiled: Any = torch.compile(FAMILIES[family](), backend="eager")
    expected = hidden_of(shared_model(family), hook_of(family))
    torch.testing.assert_close(hidden_of(compiled, hook_of(family)), expected, rtol=0, atol=0)


def test_hooks_of_a_compiled_hugging_face_model_have_its_own_names():
    compiled: Any = torch.compile(tiny_gpt2_model(), backend="eager")
    expected = hidden_of(shared_model("gpt2"), "transformer.h.0")
    torch.testing.assert_close(hidden_of(proxy(compiled), "transformer.h.0"), expected, rtol=0, atol=0)


def test_a_run_on_a_compiled_model_is_that_on_the_one_in_it():
    def run(model: Any) -> tuple[dict[str, Tensor], dict[str, str | None]]:
        runner = E2ESAETrainingRunner(runner_config(training_tokens=64), token_dataset(), model)
        return dict(runner.run().state_dict()), runner.identity

    weights, identity = run(tiny_hooked_transformer())
    compiled_weights, compiled_identity = run(torch.compile(tiny_hooked_transformer(), backend="eager"))
    assert compiled_identity == identity  # so that one goes on where the other stopped
    for name, value in weights.items():
        torch.testing.assert_close(compiled_weights[name], value, rtol=0, atol=0)


def test_a_model_of_transformer_lens_behind_a_bridge_is_refused_by_name():
    settings = {
        "n_layers": 3, "d_model": 16, "n_ctx": 16, "d_head": 8, "n_heads": 2, "d_vocab": 64, "act_fn": "gelu",
        "normalization_type": "LN",
    }  # fmt: skip
    native = TransformerBridge.boot_native(settings, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"boot_native.*HookedTransformer"):
        splice_into(native, "blocks.1.hook_resid_pre")


def test_a_bridge_of_saelens_has_the_hooks_of_transformer_lens():
    model = SAETransformerBridge.boot_transformers(
        "gpt2", hf_model=tiny_gpt2_model(), tokenizer=tiny_tokenizer(), device="cpu"
    )
    for hook_name in ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"):
        expected = hidden_of(tiny_bridge(), hook_name)
        torch.testing.assert_close(hidden_of(model, hook_name), expected, rtol=0, atol=0)
