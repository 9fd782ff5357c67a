"""One clean pass for several SAEs is what each SAE's own clean pass is, to the bit, and is run once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import FAMILIES, module_names, shared_model, token_batch
from sae_lens.load_model import HookedProxyLM
from torch import nn

from e2e_sae_plugin import splice_into
from e2e_sae_plugin.splice import CleanPass, SplicedModel
from e2e_sae_plugin.splice.shared import SharedCleanPasses


def places(family: str, needs_downstream: bool = True) -> list[SplicedModel]:
    """At a block's input (twice), inside blocks, at a block's output; with and without later hooks."""
    if family in ("hooked_transformer", "bridge"):
        names = [f"blocks.1.{name}" for name in ("hook_resid_pre", "hook_mlp_out", "attn.hook_z", "hook_resid_post")]
    else:
        parts = module_names(family)
        names = [f"{parts['layers']}.{name}" for name in ("0", f"1.{parts['mlp']}", f"1.{parts['attn']}", "2")]
    models = [splice_into(shared_model(family), name, needs_downstream=needs_downstream) for name in names[:3]]
    models += [splice_into(shared_model(family), name, needs_downstream=False) for name in (names[0], names[3])]
    for model in models:
        model.check()
    return models


@contextmanager
def counted_passes(family: str) -> Iterator[list[int]]:
    """Sequences that entered the first block at each of the model's passes."""
    model, found = shared_model(family), []
    module = model.model if isinstance(model, HookedProxyLM) else model
    layers = next(each for each in module.modules() if isinstance(each, nn.ModuleList))

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(len(args[0] if args else kwargs.get("hidden_states", kwargs.get("resid_pre"))))

    handle = layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def assert_same(ours: CleanPass, single: CleanPass, model: SplicedModel, hidden: bool) -> None:
    assert ours.activation.equal(single.activation)
    assert ours.block_input.equal(single.block_input)
    for hook in model.downstream_hooks:
        assert ours.downstream[hook].equal(single.downstream[hook])
    assert (ours.hidden is not None) == hidden
    if hidden:
        assert ours.hidden is not None
        assert single.hidden is not None
        assert ours.hidden.equal(single.hidden)


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_passes_are_the_single_ones_to_the_bit_and_run_once(family: str, hidden: bool):
    models, batch = places(family), token_batch(4)
    with counted_passes(family):  # whose hook makes a block run its own code
        single = [[model.clean_pass(chunk, hidden=hidden) for chunk in batch.split(2)] for model in models]
    shared = SharedCleanPasses(models, hidden=hidden)
    with counted_passes(family) as counted, shared.over(batch):
        ours = [[model.clean_pass(chunk, hidden=hidden) for chunk in batch.split(2)] for model in models]
        again = models[0].clean_pass(batch.split(2)[1], hidden=hidden)
    assert counted == [2, 2]
    assert shared.n_passes == 2
    assert again.activation is ours[0][1].activation
    for model, our_passes, single_passes in zip(models, ours, single, strict=True):
        for our_pass, single_pass in zip(our_passes, single_passes, strict=True):
            assert_same(our_pass, single_pass, model, hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spliced_pass_from_a_shared_clean_pass_has_the_same_output_and_gradient(family: str):
    models, batch = places(family), token_batch(3)
    shared = SharedCleanPasses(models, hidden=True)

    def output_and_gradient(model: SplicedModel, clean: CleanPass) -> list[torch.Tensor]:
        activation = (clean.activation * 0.9).requires_grad_()
        spliced = model.spliced_pass(clean, activation)
        assert spliced.hidden is not None
        values = [spliced.hidden, *(spliced.downstream[hook] for hook in model.downstream_hooks)]
        return [
            *values,
            torch.autograd.grad(torch.stack([value.pow(2).sum() for value in values]).sum(), activation)[0],
        ]

    single = [output_and_gradient(model, model.clean_pass(batch)) for model in models]
    with shared.over(batch):
        ours = [output_and_gradient(model, model.clean_pass(batch)) for model in models]
    for one, other in zip(ours, single, strict=True):
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_tokens_that_are_not_of_the_current_batch_get_a_pass_of_their_own():
    model, other = places("hooked_transformer")[:2]
    shared = SharedCleanPasses([model, other], hidden=True)
    batch, others = token_batch(4), token_batch(4, seed=1)
    with counted_passes("hooked_transformer") as counted:
        model.clean_pass(batch)
        with shared.over(batch):
            model.clean_pass(batch)
            assert model.clean_pass(others).activation.equal(other.clean_pass(others).block_input)
            model.clean_pass(batch.clone())
        model.clean_pass(batch)
    assert len(counted) == 6
    assert shared.n_passes == 1


def test_parts_of_a_batch_are_told_apart():
    """By where they begin and by how many sequences they have."""
    (model, *_), batch = places("gpt2"), token_batch(4)
    shared = SharedCleanPasses([model], hidden=True)
    with shared.over(batch):
        whole, first, second = (model.clean_pass(part) for part in (batch, batch[:2], batch[2:]))
    assert shared.n_passes == 3
    assert [len(clean.activation) for clean in (whole, first, second)] == [4, 2, 2]
    assert not first.activation.equal(second.activation)


def test_nothing_is_kept_when_the_batch_is_done_even_if_a_step_fails():
    model = places("hooked_transformer")[0]
    shared = SharedCleanPasses([model], hidden=True)
    batch = token_batch(2)

    def fails() -> None:
        with shared.over(batch):
            model.clean_pass(batch)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fails()
    assert not shared._passes
    model.clean_pass(batch)
    assert shared.n_passes == 1


def test_without_the_final_hidden_state_the_pass_stops_at_the_last_hook_that_anyone_needs():
    models, batch = places("hooked_transformer", needs_downstream=False)[:3], token_batch(2)
    reached: list[str] = []
    last = shared_model("hooked_transformer").blocks[2]
    handle = last.register_forward_pre_hook(lambda *_: reached.append("the last block"))
    try:
        with SharedCleanPasses(models, hidden=False).over(batch):
            assert models[0].clean_pass(batch, hidden=False).hidden is None
        assert not reached
        with SharedCleanPasses(models, hidden=True).over(batch):
            assert models[0].clean_pass(batch, hidden=False).hidden is not None
        assert reached
    finally:
        handle.remove()
