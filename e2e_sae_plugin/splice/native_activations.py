"""GPT-2's GELU in one kernel, in the place of the eight that Hugging Face's modules for it take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation

# Both are `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
SPELLED_OUT = (NewGELUActivation, FastGELUActivation)


def gelu_tanh(x: Tensor) -> Tensor:
    """`x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`."""
    return F.gelu(x, approximate="tanh")


class NativeActivations:
    """Swaps a model's spelled-out GELUs for the kernel while a pass runs, and back whatever happens."""

    def __init__(self, model: nn.Module):
        native = nn.GELU(approximate="tanh")
        self._wanted = True
        self._swaps = [
            (parent, name, child, native)
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
        """An activation with hooks stays, so that they are called."""
        wanted = self._swaps if self._wanted else []
        swaps = [swap for swap in wanted if not (swap[2]._forward_hooks or swap[2]._backward_hooks)]
        try:
            for parent, name, _, native in swaps:
                parent._modules[name] = native
            yield
        finally:
            for parent, name, original, _ in swaps:
                parent._modules[name] = original
