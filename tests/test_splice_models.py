"""Models that are not of the usual build, or not as their loader left them: what works, what is refused, what is said."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import (
    D_HEAD,
    D_MODEL,
    N_CTX,
    N_LAYERS,
    VOCABULARY,
    hook_of,
    proxy,
    randomise,
    runner_config,
    shared_model,
    tiny_gpt2_model,
    tiny_hooked_transformer,
    tiny_llama_model,
    token_batch,
    token_dataset,
)
from sae_lens import HookedSAETransformer
from torch import Tensor

from e2e_sae_plugin import E2ESAETrainingRunner, evaluate, splice_into
from e2e_sae_plugin.kernels.head import LinearHead

HOOK = "blocks.1.hook_resid_pre"


def falcon() -> transformers.FalconForCausalLM:
    """Its block adds the attention's output to the MLP's in place, after the MLP's hook."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, num_attention_heads=2, vocab_size=VOCABULARY
    )
    return randomise(transformers.FalconForCausalLM(config))


def gemma4() -> transformers.Gemma4ForCausalLM:
    """The last two of six layers read keys and values that the layers 2 and 3 have made."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"global_head_dim": D_HEAD}  # which its signature does not have
    config = transformers.Gemma4TextConfig(
        hidden_size=D_MODEL, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1, head_dim=D_HEAD,
        vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=4, intermediate_size=32, num_kv_shared_layers=2, sliding_window=4, pad_token_id=3,
        layer_types=["sliding_attention", "full_attention"] * 3, max_position_embeddings=N_CTX,
        **settings,
    )  # fmt: skip
    return randomise(transformers.Gemma4ForCausalLM(config))


def opt() -> transformers.OPTForCausalLM:
    """Its decoder lies one level deeper, and its final hidden state is projected before the head."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, ffn_dim=32, num_attention_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=N_CTX, word_embed_proj_dim=8, do_layer_norm_before=False,
    )  # fmt: skip
    return randomise(transformers.OPTForCausalLM(config))


def granite() -> transformers.GraniteForCausalLM:
    """Divides its logits by 6."""
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, num_attention_heads=2, vocab_size=VOCABULARY,
        intermediate_size=32, max_position_embeddings=N_CTX, logits_scaling=6.0, pad_token_id=3,
    )  # fmt: skip
    return randomise(transformers.GraniteForCausalLM(config))


def hooked_logits(model: Any, hook_name: str, tokens: Tensor, value: Tensor) -> Tensor:
    """The model's own forward pass with `value` in the place of a module's output, changed in nothing else."""

    def replace(_: Any, __: Any, output: Any) -> Any:
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = model.get_submodule(hook_name).register_forward_hook(replace)
    try:
        return model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()


CASES: dict[str, tuple[Any, str]] = {
    "falcon, mlp": (falcon, "transformer.h.1.mlp"),
    "falcon": (falcon, "transformer.h.1"),
    "gemma4, before the layers that store": (gemma4, "model.layers.1"),
    "gemma4, between them": (gemma4, "model.layers.2"),
    "gemma4, after them": (gemma4, "model.layers.4"),
    "gemma4, inside a layer that reads": (gemma4, "model.layers.4.mlp"),
    "opt": (opt, "model.decoder.layers.1"),
    "granite": (granite, "model.layers.1.mlp"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_spliced_pass_is_the_models_own_with_the_activation_replaced(case: str):
    make, hook_name = CASES[case]
    model = make()
    tokens = token_batch()
    spliced_model = splice_into(proxy(model), hook_name, needs_downstream=False)
    spliced_model.check()
    assert isinstance(spliced_model.unembed, LinearHead)
    clean = spliced_model.clean_pass(tokens)
    noise = torch.randn(clean.activation.shape, generator=torch.Generator().manual_seed(1))
    changed = (clean.activation + noise).requires_grad_()
    hidden = spliced_model.spliced_pass(clean, changed).hidden
    assert hidden is not None
    logits = spliced_model.unembed(hidden.flatten(0, 1)).unflatten(0, tokens.shape)
    naive = (clean.activation + noise).requires_grad_()
    expected = hooked_logits(model, hook_name, tokens, naive.clone())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((x * probe).sum(), leaf)[0] for x, leaf in ((logits, changed), (expected, naive))]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3)
    assert float(gradients[1].abs().max()) > 0


def test_a_hook_has_what_it_saw_and_not_what_the_model_made_of_it():
    model: Any = falcon()
    seen: list[Tensor] = []
    mlp: Any = model.transformer.h[1].mlp
    handle = mlp.register_forward_hook(lambda *arguments: seen.append(arguments[2].clone()))
    tokens = token_batch()
    with torch.no_grad():
        model(tokens)
    handle.remove()
    clean = splice_into(proxy(model), "transformer.h.1.mlp").clean_pass(tokens)
    assert clean.activation.equal(seen[0])


def test_what_a_local_run_reads_in_falcon_is_the_mlps_output():
    config = runner_config("topk", hook_name="transformer.h.1.mlp", model_class_name="AutoModelForCausalLM")
    runner = E2ESAETrainingRunner(config, override_model=proxy(falcon()), override_dataset=token_dataset())
    runner.run()
    assert runner.spliced_model.copies_activations  # found out by the check, so that no step has read anything else


# What is refused, by name and before anything runs.


@pytest.mark.parametrize(
    ("hook_name", "message"),
    [
        ("blocks.1.hook_mlp_in", "does not call the hook 'blocks.1.hook_mlp_in'.*set_use_hook_mlp_in"),
        ("blocks.1.attn.hook_result", "does not call the hook 'blocks.1.attn.hook_result'.*set_use_attn_result"),
        ("blocks.1.attn.hook_pattern", r"'blocks.1.attn.hook_pattern' has the shape .*one vector per token"),
        ("blocks.1.attn.hook_attn_scores", r"'blocks.1.attn.hook_attn_scores' has the shape .*one vector per token"),
    ],
)
@pytest.mark.parametrize("n_heads", [2, 8])  # 8 as the check has tokens: a pattern then looks like heads
def test_hooks_that_never_run_or_have_no_activation_are_refused(hook_name: str, message: str, n_heads: int):
    model = tiny_hooked_transformer(n_heads=n_heads)
    with pytest.raises(ValueError, match=message):
        splice_into(model, hook_name).check()


def test_an_encoder_decoder_is_refused_with_its_class():
    config = transformers.T5Config(
        d_model=D_MODEL, num_layers=2, num_heads=2, d_kv=D_HEAD, d_ff=32, vocab_size=VOCABULARY
    )
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration cannot be run .* 'decoder\.block\.0'"):
        splice_into(proxy(model), "decoder.block.0").check()


def test_an_error_in_a_models_own_code_names_the_model_and_the_hook():
    class Failing(transformers.LlamaForCausalLM):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise KeyError("full_attention")

    model = tiny_llama_model()
    model.__class__ = Failing
    with pytest.raises(
        ValueError, match=r"Failing cannot be run .*'model.layers.0': it raises KeyError: 'full_attention'"
    ):
        splice_into(proxy(model), "model.layers.0").check()


def test_a_model_whose_blocks_share_what_is_not_known_is_refused():
    """A layer that hands something to a later one by an attribute: it is not there when the pass starts between them."""

    class Sharing(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module, store: dict[str, Tensor], writes: bool):
            super().__init__()
            self.inner, self.store, self.writes = inner, store, writes

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.writes:
                self.store["value"] = self.store.get("value", 0 * hidden_states) + hidden_states
            else:
                hidden_states = hidden_states + self.store.pop("value", torch.zeros_like(hidden_states))
            return self.inner(hidden_states, *args, **kwargs)

    model, store = tiny_llama_model(), {}
    model.model.layers[0] = Sharing(model.model.layers[0], store, True)
    model.model.layers[2] = Sharing(model.model.layers[2], store, False)
    with pytest.raises(ValueError, match="with the activation left as it is, its final hidden state changes"):
        splice_into(proxy(model), "model.layers.1", needs_downstream=False).check()


@pytest.mark.parametrize("family", ["hooked_transformer", "bridge", "llama", "gpt2"])
def test_contexts_longer_than_the_models_positions_are_refused_in_runs_and_evaluations(family: str):
    model, hook_name = shared_model(family), hook_of(family)
    config = runner_config("topk", hook_name=hook_name, context_size=2 * N_CTX, train_batch_size_tokens=4 * N_CTX)
    message = f"context_size={2 * N_CTX} is longer than the model's context of {N_CTX} tokens"
    with pytest.raises(ValueError, match=message):
        E2ESAETrainingRunner(config, override_model=model, override_dataset=token_dataset(context_size=2 * N_CTX))
    sae = E2ESAETrainingRunner(
        runner_config("topk", hook_name=hook_name), override_model=model, override_dataset=token_dataset()
    ).sae
    with pytest.raises(ValueError, match=message):
        evaluate(sae, model, token_batch(context_size=2 * N_CTX), hook_name=hook_name)


# What is said of models that are not as their loader left them.


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def test_hooks_that_a_user_left_on_the_model_are_named(caplog: pytest.LogCaptureFixture):
    model = tiny_hooked_transformer()
    splice_into(model, HOOK)
    assert warnings_of(caplog) == ""
    model.add_hook("blocks.0.hook_mlp_out", lambda tensor, *, hook: 0 * tensor)  # noqa: ARG005
    splice_into(model, HOOK)
    splice_into(model, HOOK)
    said = warnings_of(caplog)
    assert "hooks at blocks.0.hook_mlp_out (remove them with model.reset_hooks())" in said
    assert said.count("not clean") == 1


def test_saes_that_a_user_left_on_the_model_are_named(caplog: pytest.LogCaptureFixture):
    plain = tiny_hooked_transformer()
    model = HookedSAETransformer(plain.cfg)
    config = runner_config("topk")
    sae = E2ESAETrainingRunner(config, override_model=plain, override_dataset=token_dataset()).sae
    sae.cfg.metadata.hook_name = HOOK
    model.add_sae(sae)
    splice_into(model, "blocks.2.hook_resid_pre")
    assert f"SAEs at {HOOK} (remove them with model.reset_saes())" in warnings_of(caplog)


def test_forward_hooks_of_a_users_on_a_hugging_face_model_are_named(caplog: pytest.LogCaptureFixture):
    model = tiny_gpt2_model()
    splice_into(proxy(model), "transformer.h.0")
    assert warnings_of(caplog) == ""
    model.transformer.h[1].register_forward_hook(lambda *_: None)
    splice_into(proxy(model), "transformer.h.0")
    assert "forward hooks on transformer.h.1 (call remove() on their handles)" in warnings_of(caplog)


def test_a_compiled_model_is_run_uncompiled(caplog: pytest.LogCaptureFixture):
    model = tiny_hooked_transformer()
    compiled = torch.compile(model, backend="eager")  # compiles nothing before it is called
    spliced_model = splice_into(compiled, HOOK)
    spliced_model.check()
    assert "was compiled as a whole" in warnings_of(caplog)
    assert spliced_model.model is model
    inner = tiny_gpt2_model()
    spliced = splice_into(proxy(torch.compile(inner, backend="eager")), "transformer.h.0")  # pyright: ignore[reportArgumentType]
    spliced.check()


# The interface.


def test_without_a_check_the_vocabulary_and_the_head_are_found_out_when_they_are_asked_for():
    spliced_model = splice_into(tiny_hooked_transformer(), HOOK)
    assert spliced_model.vocabulary == VOCABULARY
    assert isinstance(spliced_model.unembed, LinearHead)


def test_the_last_block_has_no_downstream_hooks_and_needs_none():
    assert splice_into(tiny_hooked_transformer(), f"blocks.{N_LAYERS - 1}.hook_resid_post").downstream_hooks == ()


ORDER = """
import sys
sys.path.insert(0, {tests!r})
from helpers import tiny_hooked_transformer, token_batch
from e2e_sae_plugin import splice_into
model = splice_into(tiny_hooked_transformer(n_layers=6), "blocks.0.hook_resid_pre")
clean = model.clean_pass(token_batch())
print(",".join(clean.downstream), ",".join(model.spliced_pass(clean, clean.activation).downstream), sep=";")
"""


@pytest.mark.slow
def test_downstream_activations_have_one_order_in_both_passes_and_every_process():
    """Sets of strings have another order in each process."""
    code = ORDER.format(tests=str(Path(__file__).parent))
    found = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    }  # fmt: skip
    (line,) = found
    clean, spliced = line.split(";")
    assert clean == spliced == ",".join(f"blocks.{k}.hook_resid_pre" for k in range(1, 6))
