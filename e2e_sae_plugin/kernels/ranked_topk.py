"""BatchTopK and Matryoshka on several ranks: the features of one step are chosen among the tokens of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from torch import Tensor

from e2e_sae_plugin.distributed import Ranks


class RankedBatchTopK(BatchTopK):
    """SAELens's `BatchTopK` whose batch is that of all ranks: `k` features per token on average over all of it.

    Args:
        k: active features per token.
        ranks: between which the batch is divided.
    """

    def __init__(self, k: float, ranks: Ranks):
        super().__init__(k)
        self.ranks = ranks

    def n_active(self, n_tokens: int) -> int:
        """How many are chosen on all ranks together, of which this one has `n_tokens`."""
        return int(self.k * int(self.ranks.exchange([n_tokens]).sum()))

    def bound(self, candidates: Tensor, n_active: int) -> Tensor:
        """The smallest value that is chosen; where fewer are positive, one that all of these exceed.

        Args:
            candidates: the `n_active` largest positive values of this rank, or all, `[n]`: no others can be chosen.
        """
        return smallest_chosen(self.ranks, candidates, n_active)

    def forward(self, x: Tensor) -> Tensor:
        """`x [tokens, d_sae]` where chosen, else 0. Of values that equal the smallest one chosen all are."""
        acts = x.relu()
        n_active = self.n_active(acts.shape[:-1].numel())
        flat = acts.detach().flatten()
        largest = flat.topk(min(n_active, flat.numel()), sorted=False).values
        bound = self.bound(largest[~(largest <= 0)], n_active)
        # NaN is chosen, as by the host, so that the step's loss shows it.
        return torch.where((acts < bound) | (acts <= 0), 0, acts)


def smallest_chosen(ranks: Ranks, candidates: Tensor, n_active: int) -> Tensor:
    """The smallest of the `n_active` largest of all ranks' positive `candidates`; 0 where there are not more of them."""
    everywhere = ranks.rows(candidates)
    if len(everywhere) <= n_active or n_active == 0:
        return everywhere.new_zeros(()) if n_active else everywhere.new_tensor(torch.inf)
    return everywhere.topk(n_active, sorted=False).values.min()


@contextlib.contextmanager
def chosen_across(sae: Any, ranks: Ranks | None) -> Iterator[None]:
    """An SAE that chooses features across tokens does so across those of all ranks meanwhile; others stay as they are."""
    alone = getattr(sae, "activation_fn", None)
    if ranks is None or type(alone) is not BatchTopK:
        yield
        return
    sae.activation_fn = RankedBatchTopK(alone.k, ranks)
    try:
        yield
    finally:
        sae.activation_fn = alone


@torch.no_grad()
def share_threshold(sae: Any, ranks: Ranks, any_active: bool) -> None:
    """The running threshold of BatchTopK and Matryoshka as one process would have it.

    It moves towards the smallest active value, so the smallest of the ranks' new thresholds is that of all tokens.

    Args:
        any_active: whether a feature was active on a token of this rank; where none was, its threshold has not moved.
    """
    if isinstance(sae, BatchTopKTrainingSAE):
        own = sae.topk_threshold if any_active else torch.full_like(sae.topk_threshold, torch.inf)
        least = ranks.smallest(own)
        if bool(torch.isfinite(least)):
            sae.topk_threshold.copy_(least)
        return
    for buffer in sae.buffers():  # of a user's architecture, of which nothing is known
        if buffer.is_floating_point():
            buffer.copy_(ranks.summed(buffer) / ranks.size)
