"""What a run measures on the first batches, before its first step: activation scaling, and where `b_dec` starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2e_sae_plugin.checkpoint.finished import unfold_activation_scaling
from e2e_sae_plugin.precision import accumulation_dtype

if TYPE_CHECKING:
    from e2e_sae_plugin.trainer import E2ESAETrainer


MEAN_TOKENS = 32_768
"""Tokens for the mean activation: it is then within 0.6 % of the activations' standard deviation."""


def _raw_activations(trainer: E2ESAETrainer) -> Iterator[Tensor]:
    """`[tokens, d_in]` of one batch after the other. Ranks each run a part of it through the model, and get all of it."""
    ranks = trainer.ranks
    for tokens in trainer.data_provider:
        trainer.stop_if_any_rank_is_asked()
        own = tokens if ranks is None else ranks.part_of(tokens)
        raw = trainer.raw_sae_in(trainer.clean_micro_batches(own))
        yield raw if ranks is None else ranks.rows(raw)


def estimate_activation_scaling(trainer: E2ESAETrainer) -> None:
    """The estimates that SAELens's `fit` makes; a resumed run has them already."""
    scaler = trainer.activation_scaler
    estimate = {
        "expected_average_only_in": scaler.estimate_scaling_factor,
        "covariance_whitening": scaler.estimate_whitening,
    }.get(trainer.sae.cfg.normalize_activations)
    if estimate is None or scaler.scaling_factor is not None or scaler.whitening is not None:
        return
    n_batches, activations = trainer.cfg.n_batches_for_norm_estimate, _raw_activations(trainer)
    if trainer.leads:
        estimate(d_in=trainer.sae.cfg.d_in, data_provider=activations, n_batches_for_norm_estimate=n_batches)
    else:
        for _ in itertools.islice(activations, n_batches):
            pass
    if trainer.ranks is not None:
        found = trainer.ranks.from_leader((scaler.scaling_factor, scaler.whitening))
        scaler.scaling_factor, scaler.whitening = found
    if trainer.runner_cfg.from_pretrained_path is not None:  # `build_sae` reads weights for activations as they are
        unfold_activation_scaling(trainer.sae, scaler)


@torch.no_grad()
def initialise_b_dec(trainer: E2ESAETrainer) -> None:
    """Start `b_dec` at the mean activation, in the space in which the SAE adds it, where the config says so."""
    if trainer.n_training_samples > 0 or not _starts_at_mean(trainer):
        return
    sae = trainer.sae
    sae.b_dec.zero_()  # `process_sae_in` subtracts it
    wide = accumulation_dtype(sae.b_dec.device)
    total, n_tokens = torch.zeros_like(sae.b_dec, dtype=wide), 0
    n_batches = max(
        1, min(trainer.cfg.n_batches_for_norm_estimate, MEAN_TOKENS // trainer.cfg.train_batch_size_samples)
    )
    for raw in itertools.islice(_raw_activations(trainer), n_batches):
        activations = sae.process_sae_in(trainer.activation_scaler(raw))
        total += activations.sum(0, dtype=wide)
        n_tokens += len(activations)
    sae.b_dec.copy_(total / max(n_tokens, 1))


def _starts_at_mean(trainer: E2ESAETrainer) -> bool:
    method = trainer.runner_cfg.b_dec_init_method
    is_new = trainer.runner_cfg.from_pretrained_path is None and trainer.identity.get("override_sae") is None
    return method == "mean" or (method == "auto" and is_new)
