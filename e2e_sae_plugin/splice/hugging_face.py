"""Plain Hugging Face models through SAELens's `HookedProxyLM`, hooked at module paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn

from e2e_sae_plugin.kernels.head import LinearHead
from e2e_sae_plugin.splice.base import BlockInput, HookFunction, SplicedModel
from e2e_sae_plugin.splice.given_model import uncompiled
from e2e_sae_plugin.splice.layer_swap import LayerSwap
from e2e_sae_plugin.splice.positions import HookPosition, hugging_face_position, no_such_hook
from e2e_sae_plugin.splice.recompute import Recompute


def find_layers(model: nn.Module, hook_name: str) -> str:
    """Path of the list of decoder layers that `hook_name` lies in.

    Raises:
        ValueError: the hook lies in no list of decoder layers.
    """
    names = [name for name, _ in model.named_modules() if name]
    if hook_name not in names:
        lists = [(name, len(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        # A vision tower may have layers too; the decoder is what the model's config counts.
        n_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
        path, length = next((each for each in lists if each[1] == n_layers), lists[0] if lists else (None, 0))
        raise ValueError(no_such_hook(hook_name, names, path, length))
    match = re.match(r"(.+?)\.\d+(\.|$)", hook_name)
    if match is None or not isinstance(model.get_submodule(match[1]), nn.ModuleList):
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise ValueError(
            f"hook_name {hook_name!r} is not a decoder layer or inside one. Expected a path below one of {lists[:3]}, "
            f"for instance {lists[0]}.0."
            if lists
            else f"{type(model).__name__} has no list of decoder layers."
        )
    return match[1]


class SplicedHuggingFace(SplicedModel):
    """A Hugging Face causal language model, hooked at the outputs of its modules."""

    model: HookedProxyLM  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: HookedProxyLM,
        hook_name: str,
        downstream_hooks: Sequence[str] | None,
        needs_downstream: bool | None,
    ):
        self._language_model: nn.Module = uncompiled(model.model)
        self._layers_path = find_layers(self._language_model, hook_name)
        layers = self._language_model.get_submodule(self._layers_path)
        assert isinstance(layers, nn.ModuleList)
        self._swap = LayerSwap(self._language_model, layers)
        self._names = [name for name, _ in self._language_model.named_modules() if name]
        super().__init__(model, hook_name, downstream_hooks, needs_downstream)

    def hook_names(self) -> Sequence[str]:
        return self._names

    def _find_position(self, hook_name: str) -> HookPosition:
        return hugging_face_position(hook_name, self._layers_path, len(self._swap.layers), self._names)

    @contextmanager
    def _hooked(self, functions: Mapping[str, HookFunction]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, function in functions.items():
                module = self._language_model.get_submodule(name)
                stack.callback(module.register_forward_hook(_on_output(function)).remove)
            yield

    def _capture_block_input(self) -> Any:
        return self._swap.capture_input(self.position.start_block, copies=self.copies_activations)

    def _prepare(self, tokens: Tensor) -> Tensor:
        return tokens

    def _run(self, context: Tensor, start: BlockInput | None, recompute: Recompute | None) -> Tensor:
        return self._swap.run(context, start, self.position, recompute)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._swap.logits(hidden)

    def linear_heads(self) -> Sequence[LinearHead]:
        return self._swap.linear_heads()

    def use_native_kernels(self, wanted: bool) -> bool:
        return self._swap.activations.use(wanted)

    def full_logits(self, tokens: Tensor) -> Tensor:
        return self._language_model(input_ids=tokens, use_cache=False).logits

    @property
    def token_device(self) -> torch.device:
        return self._swap.token_device


def _on_output(function: HookFunction) -> Callable[[nn.Module, Any, Any], Any]:
    def on_output(_: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
        if not isinstance(output, tuple | list):
            return function(output)
        value = function(output[0])
        return None if value is None else type(output)((value, *output[1:]))

    return on_output
