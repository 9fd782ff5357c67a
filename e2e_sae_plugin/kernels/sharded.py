"""What a rank that has some of an SAE's features needs of the other ranks: their tokens, and the sums over all features.

Every rank runs its features on all tokens. What they add up to (reconstructions, sparsity) is summed over the ranks, and
each keeps the rows of its own tokens, from which losses go on as with a replica. Backward, the gradients of all ranks' rows
are gathered, so that those of a rank's features are whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from e2e_sae_plugin.distributed import Ranks
from e2e_sae_plugin.kernels.sparse import ActiveFeatures
from e2e_sae_plugin.kernels.sparse_sae import Encoder, largest_in_rows


@dataclass(frozen=True)
class ShardedTokens:
    """The tokens of one forward pass, on ranks that each have a shard of the SAE's features.

    Every method talks to the other ranks.
    """

    ranks: Ranks
    counts: Sequence[int] | None
    """How many tokens each rank has; None where every rank has all of them."""

    @property
    def adds_b_dec(self) -> bool:
        """Whether this rank's part of a reconstruction is the one that has b_dec, which belongs to no feature."""
        return self.ranks.leads

    def everyones(self, own: Tensor) -> Tensor:
        """`[own tokens, ...]` -> `[all tokens, ...]`, in the order of the ranks."""
        return own if self.counts is None else self.ranks.all_rows(own, self.counts)

    def own_sums(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Of each `[all tokens, ...]` the sum over the ranks, for this rank's tokens; with its gradient."""
        return _OwnSums.apply(self, *parts)  # pyright: ignore[reportReturnType]

    def total(self, number: int) -> int:
        """The sum of all ranks' numbers."""
        return int(self.ranks.exchange([number]).sum())

    def largest(self, x: Tensor, encoder: Encoder, k: int) -> ActiveFeatures:
        """The k largest pre-activations of each token among all ranks' features, negative ones too: those that are this
        rank's. Of equal ones those of lower features are taken.

        Args:
            x: `[all tokens, d_in]`.
            encoder: of this rank's features, of which others may have another number.
            k: at most the number of all ranks' features together.
        """
        n_own = encoder.W_enc.shape[1]
        widest = max(int(self.ranks.exchange([n_own]).max()), k * self.ranks.size)  # the same chunks on all ranks
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for start, pre in encoder.chunks(x, widest):
            values, features = largest_in_rows(pre, min(k, n_own)) if n_own else (pre, pre.long())
            chosen = self._among_largest(values, k)
            token = torch.arange(start, start + len(pre), device=x.device)[:, None].expand_as(values)
            parts.append((values[chosen], features[chosen], token[chosen]))
        values, features, token = (torch.cat(part) for part in zip(*parts, strict=True))
        return ActiveFeatures.of(values, features, token, len(x), n_own)

    def _among_largest(self, values: Tensor, k: int) -> Tensor:
        """Which of `values [tokens, at most k]`, in the order of features, are among the k largest of all ranks' ones."""
        mine = F.pad(values, (0, k - values.shape[1]), value=-torch.inf)
        everywhere = self.ranks.all_rows(mine, [len(mine)] * self.ranks.size)
        in_order = everywhere.view(self.ranks.size, len(mine), k).transpose(0, 1).reshape(len(mine), -1)
        largest = in_order.sort(dim=1, descending=True, stable=True).indices[:, :k]
        chosen = torch.zeros_like(in_order, dtype=torch.bool).scatter_(1, largest, True)
        first = self.ranks.rank * k
        return chosen[:, first : first + values.shape[1]]


class _OwnSums(torch.autograd.Function):
    """`ShardedTokens.own_sums`. A part's rows of other ranks' tokens have their gradient there, so backward gathers them."""

    @staticmethod
    def forward(ctx: Any, tokens: ShardedTokens, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.tokens = tokens
        counts = tokens.counts
        if counts is None:
            return tuple(tokens.ranks.summed(part) for part in parts)
        return tuple(tokens.ranks.own_rows_of_sum(part, counts) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *(ctx.tokens.everyones(gradient) for gradient in gradients)
