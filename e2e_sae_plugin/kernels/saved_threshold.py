"""The threshold that BatchTopK and Matryoshka SAEs are saved with, as JumpReLU SAEs.

While it trains, such an SAE chooses `k` features per token on average over a batch. SAELens saves it with a running mean of
the smallest value chosen, which starts at 0 and moves by `topk_threshold_lr` (0.01) a step: after fewer than some 500 steps,
or while activations still grow, the saved SAE has many times the L0 that was trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from torch import Tensor, nn

from e2e_sae_plugin.distributed import Ranks
from e2e_sae_plugin.kernels.sparse_sae import Encoder, select_batch_topk


@torch.no_grad()
def settle_threshold(sae: Any, sae_in: Tensor, n_tokens: int, ranks: Ranks | None = None) -> None:
    """Set the threshold so that `k` features per token exceed it on average over these tokens; other SAEs stay as they are.

    Training does not use the threshold. One that is not finite, after a step that was skipped, is not taken.

    Args:
        sae: in training form; with several ranks the whole SAE, or this rank's shard.
        sae_in: `[tokens, d_in]`, normalised as the SAE trains on them: this rank's tokens or, with a shard, everyone's.
        n_tokens: of all ranks together.
        ranks: between which the tokens or the features are divided.
    """
    if not isinstance(sae, BatchTopKTrainingSAE):
        return
    n_active = int(sae.cfg.k * n_tokens)
    norms = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
    largest = select_batch_topk(sae.process_sae_in(sae_in), Encoder(sae.W_enc, sae.b_enc, norms), n_active + 1).values
    if ranks is not None:
        largest = ranks.rows(largest)
    largest = largest.topk(min(n_active + 1, len(largest))).values
    if not bool(torch.isfinite(largest).all()):
        return
    # Half-way between the smallest value that is chosen and the next: the saved form folds norms into its weights, so that
    # its values differ by rounding, and one that lay on the threshold could exceed it.
    threshold = largest[-2:].mean() if len(largest) > n_active else largest.new_zeros(())  # fewer are positive
    sae.topk_threshold.copy_(threshold)


class _AboveThreshold(nn.Module):
    """The activation function of SAELens's JumpReLU SAEs."""

    def __init__(self, threshold: Tensor):
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > self.threshold.to(x.dtype), x, 0).relu()


@contextlib.contextmanager
def as_saved(sae: Any) -> Iterator[bool]:
    """Choose features by the threshold meanwhile, as the saved form does; False for other SAEs, which stay as they are."""
    if not isinstance(sae, BatchTopKTrainingSAE):
        yield False
        return
    in_training = sae.activation_fn
    sae.activation_fn = _AboveThreshold(sae.topk_threshold)
    try:
        yield True
    finally:
        sae.activation_fn = in_training
