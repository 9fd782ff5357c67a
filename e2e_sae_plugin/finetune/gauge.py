"""The scale of activations that an SAE is fine-tuned at, so that one learning rate suits encoder and decoder.

SAELens trains on activations that it normalises and folds their scale into the weights when it saves: `W_enc` times `s`,
`W_dec` over `s`. Where that scale is far from 1, as for models with large activations, a rate that moves the encoder does
not touch the decoder. So such an SAE is unfolded again while it is fine-tuned. The factor is a power of two: unfolding
and folding then do not round, and at step 0 the SAE is the original to the bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from e2e_sae_plugin.architectures import RUN_TIME_NORMALISATIONS

UNBALANCED = 1.5
"""Powers of two between the geometric mean of encoder and decoder, and either, from which on an SAE is unfolded."""


def balancing_factor(sae: SAE[Any]) -> float:
    """The power of two `s` for which `W_enc / s` and `W_dec * s` have about the same root mean square; 1 where they differ
    less than eightfold, or the scale is not folded (normalisation at run time) or means something else (tied weights)."""
    if sae.cfg.normalize_activations in RUN_TIME_NORMALISATIONS or "W_enc" not in dict(sae.named_parameters()):
        return 1.0
    encoder, decoder = (float(weight.detach().float().square().mean()) for weight in (sae.W_enc, sae.W_dec))
    if not (encoder > 0 and decoder > 0):
        return 1.0
    power = math.log2(encoder / decoder) / 4  # of squares, and half of the ratio each
    return 2.0 ** round(power) if abs(power) >= UNBALANCED else 1.0


@torch.no_grad()
def unfold_scale(sae: TrainingSAE[Any], factor: float) -> None:
    """Undo `sae.fold_activation_norm_scaling_factor(factor)`, exactly; the SAE then reads activations times `factor`."""
    if factor == 1:
        return
    sae.fold_activation_norm_scaling_factor(1 / factor)
    scale_sparsity(sae.cfg, factor)


def scale_sparsity(config: TrainingSAEConfig, factor: float) -> None:
    """Give sparsity terms the weight beside a squared error of activations times `factor` that they had at 1.

    The squared error grows with the square of the factor; an L1 weighted by decoder norms grows with the factor itself.
    """
    powers = {"l1_coefficient": 1, "l0_coefficient": 2, "pre_act_loss_coefficient": 1, "jumprelu_tanh_scale": -1}
    for name, power in powers.items():
        value = getattr(config, name, None)
        if value is not None:
            setattr(config, name, value * factor**power)
