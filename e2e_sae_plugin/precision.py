"""Number formats: what sums are accumulated in, and products of 16-bit numbers that are kept in fp32."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

FP16_SHIFT = 1024.0
"""A power of two, so that multiplying by it rounds nothing."""


@functools.cache
def _has_float64(device_type: str) -> bool:
    try:
        torch.zeros((), dtype=torch.float64, device=device_type)
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return fp64, or fp32 for a device without fp64, such as Apple's MPS."""
    return torch.float64 if _has_float64(device.type) else torch.float32


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for a 16-bit dtype, and any wider dtype as it is."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that factors of a product with `weight` are rounded to: autocast's if it is on, else the weight's."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `a @ b`, accumulated and kept in at least fp32. Not differentiable.

    A plain product of 16-bit matrices is rounded to 16 bits at its end. CUDA has products that are not; elsewhere the
    factors are converted first, so callers pass a tile of a large matrix at a time.

    Args:
        a: a matrix, such as hidden states; in 16 bits or wider.
        b: a matrix, such as weights. If it is in 16 bits, CUDA rounds `a` to its dtype.
        out: receives the product, in at least fp32.
    """
    if b.dtype == at_least_fp32(b.dtype):
        return torch.mm(a.to(b.dtype), b, out=out)
    if not _keeps_products(b.device):
        return torch.mm(a.float(), b.float(), out=out)
    # Gradients reach below the range of fp16, whose smallest number is 6e-8; probabilities and activations do not
    # reach its largest one.
    shift = FP16_SHIFT if b.dtype == torch.float16 and a.dtype != b.dtype else 1.0
    product = torch.mm((a * shift).to(b.dtype), b, out_dtype=torch.float32, out=out)
    return product if shift == 1 else product.mul_(1 / shift)


def gradient_scale(dtype: torch.dtype, n_tokens: int) -> float:
    """Return what a mean over `n_tokens` is multiplied by while its gradient goes through a model in `dtype`.

    In fp16, the gradient of a mean over thousands of tokens is rounded to 0; that of their sum is not. A power of two,
    so that dividing by it afterwards rounds nothing; 1 for dtypes with the range of fp32.
    """
    return 2.0 ** math.ceil(math.log2(max(n_tokens, 1))) if dtype == torch.float16 else 1.0


def ready_for_products(tile: Tensor) -> Tensor:
    """Return the tile in the dtype that `matmul` takes it in on its device, to convert it once for several products."""
    return tile if _keeps_products(tile.device) else tile.to(at_least_fp32(tile.dtype))


def _keeps_products(device: torch.device) -> bool:
    """Return whether the device multiplies 16-bit matrices into fp32 (torch has no such product on a CPU)."""
    return device.type == "cuda" and torch.version.cuda is not None and hasattr(torch.ops.aten.mm, "dtype")
