"""What spliced passes are compared with: ordinary forward passes with hooks, counted blocks, what a pass leaves behind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from e2e_sae_plugin.splice import SplicedModel


def blocks_of(model: Any, hook_name: str | None = None) -> list[nn.Module]:
    """The model's blocks. `hook_name` says which list of layers of a Hugging Face model; None takes its first."""
    if not isinstance(model, HookedProxyLM):
        return list(model.blocks)
    if hook_name is None:
        return list(next(m for _, m in model.model.named_modules() if isinstance(m, nn.ModuleList)))
    layers: Any = model.model.get_submodule(re.split(r"\.\d+", hook_name)[0])
    return list(layers)


def every_module(model: Any) -> list[nn.Module]:
    modules = list(model.modules())
    if isinstance(model, TransformerBridge):
        modules += list(model.original_model.modules()) + list(model.hook_dict.values())
    return list({id(module): module for module in modules}.values())


def every_parameter(model: Any) -> list[nn.Parameter]:
    return [parameter for module in every_module(model) for parameter in module.parameters(recurse=False)]


def naive_run(model: Any, tokens: Tensor, replaced: dict[str, Tensor], caught_names: list[str]) -> tuple[Tensor, dict]:
    """Logits and activations of one ordinary forward pass over the whole model, hooked by the model's own means.

    Copies are caught and put in, as some models go on computing in the very tensor that a hook saw.
    """
    caught: dict[str, Tensor] = {}
    if isinstance(model, HookedProxyLM):
        handles = []

        def on_output(name: str) -> Callable[..., Any]:
            def hook(_: nn.Module, args: Any, output: Any) -> Any:
                is_sequence = isinstance(output, (tuple, list))
                value: Any = output[0] if is_sequence else output
                value = replaced[name].clone() if name in replaced else value
                caught[name] = value.clone()
                return type(output)((value, *output[1:])) if is_sequence else value

            return hook

        for name in {*replaced, *caught_names}:
            handles.append(model.model.get_submodule(name).register_forward_hook(on_output(name)))
        try:
            return model.model(tokens, use_cache=False).logits, caught
        finally:
            for handle in handles:
                handle.remove()

    def catch(activation: Tensor, hook: HookPoint, name: str) -> Tensor:
        value = replaced[name].clone() if name in replaced else activation
        caught[name] = value.clone()
        return value

    hooks: list[Any] = [
        (name, lambda activation, hook, name=name: catch(activation, hook, name)) for name in {*replaced, *caught_names}
    ]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", prepend_bos=False), caught


@contextmanager
def counted_blocks(model: Any, hook_name: str | None = None) -> Iterator[Counter[int]]:
    """How often each block runs to its end; arguments as for `blocks_of`."""
    counts: Counter[int] = Counter()
    blocks = blocks_of(model, hook_name)
    handles = [block.register_forward_hook(lambda *_, i=i: counts.update([i])) for i, block in enumerate(blocks)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def spliced_logits(model: SplicedModel, hidden: Tensor | None) -> Tensor:
    assert hidden is not None
    return torch.stack([model.logits(sequence) for sequence in hidden])


def snapshot(model: Any) -> list[Any]:
    """Everything that a pass could leave behind: modules in their places and every hook on them."""
    state: list[Any] = []
    for module in every_module(model):
        state.append((id(module), list(module._forward_hooks), list(module._forward_pre_hooks)))
        if isinstance(module, HookPoint):
            state.append([id(handle) for handle in module.fwd_hooks])
    return state
