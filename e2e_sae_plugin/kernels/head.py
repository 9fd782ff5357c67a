"""The unembedding as plain weights, with logits that are accumulated and kept in fp32 whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from e2e_sae_plugin.precision import at_least_fp32, matmul, product_dtype

# Rows of the head whose logits are computed at once on a CPU: with a chunk's 128 tokens three tensors of 0.5 MB,
# which stay in its cache, and products a tenth faster than with twice the rows. On other devices a tile is the
# whole vocabulary.
TILE_VOCABULARY = 1024

Unembed = Callable[[Tensor], Tensor]
"""`[tokens, d_model]` (the final hidden state, after the final norm) -> `[tokens, vocabulary]`."""


@dataclass(frozen=True)
class LinearHead:
    """An unembedding `soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap)`.

    Called, it returns logits in at least fp32. A model in 16 bits rounds its own logits to 16 bits: where they lie near
    -100, as GPT-2's do, that is an error of up to 0.25 in each, which a softmax does not forgive.
    """

    weight: Float[Tensor, "vocabulary d_model"]
    """Any strides: a transposed view costs nothing."""
    bias: Float[Tensor, " vocabulary"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    """None for no soft cap."""

    def __call__(self, hidden: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens vocabulary"]:
        weight, bias = self.factors()
        with torch.autocast(weight.device.type, enabled=False):
            if weight.dtype == at_least_fp32(weight.dtype):
                logits = F.linear(hidden.to(weight), weight, bias)
            else:
                logits = _Float32Logits.apply(hidden, weight, bias)
            return self.shape(logits)  # pyright: ignore[reportArgumentType]

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in the dtype that products are taken in."""
        dtype = product_dtype(self.weight)
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def shape(self, products: Tensor) -> Tensor:
        """Return logits from `hidden @ weight.T + bias`: the scale and the soft cap."""
        if self.scale != 1:
            products = products * self.scale
        if self.soft_cap is not None:
            products = self.soft_cap * torch.tanh(products / self.soft_cap)
        return products

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of `shape` where it gives `logits`."""
        if self.soft_cap is None:
            return self.scale
        return (1 - (logits / self.soft_cap).square()) * self.scale

    @property
    def is_plain(self) -> bool:
        """Whether logits are the products themselves."""
        return self.scale == 1 and self.soft_cap is None


def vocabulary_tiles(weight: Tensor) -> list[slice]:
    """Return the rows of the head that are multiplied at a time on its device."""
    n_rows = TILE_VOCABULARY if weight.device.type == "cpu" else len(weight)
    return [slice(first, min(first + n_rows, len(weight))) for first in range(0, len(weight), n_rows)]


class _Float32Logits(torch.autograd.Function):
    """`hidden @ weight.T + bias` of 16-bit factors in fp32, with the gradient of `hidden`; a tile is converted at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = hidden.dtype
        hidden = hidden.detach().to(weight)
        logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
        for rows in vocabulary_tiles(weight):
            logits[:, rows] = matmul(hidden, weight[rows].T)
        return logits if bias is None else logits.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        gradient = grad_outputs[0].new_zeros(len(grad_outputs[0]), weight.shape[1])
        for rows in vocabulary_tiles(weight):
            gradient += matmul(grad_outputs[0][:, rows], weight[rows])
        return gradient.to(ctx.dtype), None, None
