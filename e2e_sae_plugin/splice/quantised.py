"""Quantised weights: what they have to be kept from for gradients to go through them, and how exact they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

EXACT_CAUSALITY, EIGHT_BIT_CAUSALITY = 1e-2, 0.1
"""By how much of the largest logit an earlier position may move when a later token changes. An 8-bit product finds its
outlier columns in all tokens at once, so that each token has a little to do with all others."""


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU.

    Where the processor multiplies in bf16, a pass without gradients repacks them for a product that has no gradient, in all
    passes from then on.

    Raises:
        ValueError: they have been repacked.
    """
    module: Any
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit weights of {name!r} have been repacked by an earlier pass of the model on the CPU, and no "
                "gradient goes through them any more. Load the model anew, and splice before it runs."
            )
        module.support_avx512bf16_for_cpu = False


def causal_tolerance(model: nn.Module) -> float:
    """See `EXACT_CAUSALITY`."""
    has_int8 = any(p.dtype == torch.int8 for p in model.parameters())
    return EIGHT_BIT_CAUSALITY if has_int8 else EXACT_CAUSALITY
