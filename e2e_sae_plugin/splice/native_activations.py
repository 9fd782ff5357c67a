"""GPT-2's GELU in one kernel, in the place of the eight that Hugging Face's modules for it take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from e2e_sae_plugin.kernels.gelu import gelu_tanh

# Both are `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
SPELLED_OUT = (NewGELUActivation, FastGELUActivation)


class _NativeGelu(nn.Module):
    def __init__(self, may_overwrite: bool):
        super().__init__()
        self.may_overwrite = may_overwrite

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(x, may_overwrite=self.may_overwrite)


@dataclass(frozen=True)
class _Swap:
    parent: nn.Module
    name: str
    original: nn.Module

    def is_listened_to(self) -> bool:
        """An activation with hooks stays, so that they are called."""
        return bool(self.original._forward_hooks or self.original._backward_hooks)

    def may_overwrite(self) -> bool:
        """Whether nobody can have kept the activation's input."""
        return not any(module._forward_hooks or module._forward_pre_hooks for module in self.parent.modules())


class NativeActivations:
    """Swaps a model's spelled-out GELUs for the kernel while a pass runs, and back whatever happens."""

    def __init__(self, model: nn.Module):
        self._native = {may_overwrite: _NativeGelu(may_overwrite) for may_overwrite in (False, True)}
        self._wanted = True
        self._swaps = [
            _Swap(parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if type(child) in SPELLED_OUT
        ]

    def use(self, wanted: bool) -> bool:
        """Swap from now on, or do not; whether the model has any."""
        self._wanted = wanted
        return bool(self._swaps)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """For the time of a pass, whose hooks are in place."""
        swaps = [swap for swap in self._swaps if self._wanted and not swap.is_listened_to()]
        try:
            for swap in swaps:
                swap.parent._modules[swap.name] = self._native[swap.may_overwrite()]
            yield
        finally:
            for swap in swaps:
                swap.parent._modules[swap.name] = swap.original
