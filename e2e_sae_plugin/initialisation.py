"""What a run measures on the first batches, before its first step: activation scaling, and where `b_dec` starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from e2e_sae_plugin.trainer import E2ESAETrainer


def _raw_activations(trainer: E2ESAETrainer) -> Iterator[Tensor]:
    """`[tokens, d_in]` of one batch after the other."""
    for tokens in trainer.data_provider:
        trainer.stop_if_asked()
        yield trainer.raw_sae_in(trainer.clean_micro_batches(tokens))


def estimate_activation_scaling(trainer: E2ESAETrainer) -> None:
    """The estimates that SAELens's `fit` makes; a resumed run has them already."""
    scaler = trainer.activation_scaler
    estimate = {
        "expected_average_only_in": scaler.estimate_scaling_factor,
        "covariance_whitening": scaler.estimate_whitening,
    }.get(trainer.sae.cfg.normalize_activations)
    if estimate is None or scaler.scaling_factor is not None or scaler.whitening is not None:
        return
    estimate(
        d_in=trainer.sae.cfg.d_in,
        data_provider=_raw_activations(trainer),
        n_batches_for_norm_estimate=trainer.cfg.n_batches_for_norm_estimate,
    )


@torch.no_grad()
def initialise_b_dec(trainer: E2ESAETrainer) -> None:
    """`b_dec_init_method="mean"`: the mean activation in the space in which the SAE adds `b_dec`."""
    if trainer.runner_cfg.b_dec_init_method == "zeros" or trainer.n_training_samples > 0:
        return
    sae = trainer.sae
    sae.b_dec.zero_()  # `process_sae_in` subtracts it
    total, n_tokens = torch.zeros_like(sae.b_dec, dtype=torch.float64), 0
    for raw in itertools.islice(_raw_activations(trainer), trainer.cfg.n_batches_for_norm_estimate):
        activations = sae.process_sae_in(trainer.activation_scaler(raw))
        total += activations.sum(0, dtype=torch.float64)
        n_tokens += len(activations)
    sae.b_dec.copy_(total / max(n_tokens, 1))
