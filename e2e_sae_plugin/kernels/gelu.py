"""GPT-2's GELU, `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, as `x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))`.

The two are equal; on a CPU a sigmoid takes a fifth of a tanh's time. Its slope comes with it, in the same tiles, and is
kept in the input's stead, so that backward is one product. Half of torch's time on a CPU; torch's own kernel elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715

TILE_ELEMENTS = 2**18
"""Per thread, of the tiles that one operation after the other goes over: 1 MB in fp32, about a core's cache. Smaller ones
take longer to hand out than to compute."""


def gelu_tanh(x: Tensor, *, may_overwrite: bool = False) -> Tensor:
    """GELU of any shape; the result may lie in `x`'s memory if `may_overwrite`, and no gradient is asked for."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
        return F.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gelu.apply(x)  # pyright: ignore[reportReturnType]
    x = x.detach()
    out = x if may_overwrite else torch.empty_like(x)
    _compute(x, out, None)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, slope = torch.empty_like(x), torch.empty_like(x)
        _compute(x, out, slope)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's type)
        ctx: Any, *grad_outputs: Tensor
    ) -> Tensor:
        return grad_outputs[0] * ctx.saved_tensors[0]


def _compute(x: Tensor, out: Tensor, slope: Tensor | None) -> None:
    """Fill `out`, which may be `x` if there is no `slope`, and `slope`, the derivative."""
    tile = TILE_ELEMENTS * torch.get_num_threads()
    scale = x.new_tensor(SLOPE)
    buffer, dz = x.new_empty(2, min(tile, x.numel()))
    slopes = None if slope is None else slope.view(-1).split(tile)
    for i, (part, result) in enumerate(zip(x.view(-1).split(tile), out.view(-1).split(tile), strict=True)):
        # s = sigmoid(z), z = SLOPE (x + CUBIC x^3)
        s = torch.addcmul(scale, part, part, value=SLOPE * CUBIC, out=buffer[: len(part)]).mul_(part).sigmoid_()
        torch.mul(part, s, out=result)
        if slopes is not None:
            # d/dx x s = s + x s (1 - s) dz/dx
            torch.addcmul(scale, part, part, value=3 * SLOPE * CUBIC, out=dz[: len(part)])
            rest = torch.addcmul(result, result, s, value=-1, out=slopes[i])
            torch.addcmul(s, rest, dz[: len(part)], out=slopes[i])
