"""One rank's part of an SAE's features: cut from the whole, read from files of the whole, put together again on rank 0."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from safetensors import safe_open
from torch import Tensor

from e2e_sae_plugin.distributed import Ranks

DIVIDED = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "decoder_norms": 0}
"""The dimension of each tensor that is the features'. What is not named here belongs to no feature: every rank has it."""


class Shard:
    """Which features are this rank's: the `d_sae / ranks` from the rank's number times that.

    Args:
        ranks: between which they are divided.
        d_sae: of the whole SAE; it divides by the ranks.
    """

    def __init__(self, ranks: Ranks, d_sae: int):
        self.ranks, self.d_sae = ranks, d_sae
        self.width = d_sae // ranks.size
        self.features = slice(ranks.rank * self.width, (ranks.rank + 1) * self.width)

    def _place(self, name: str, n_dimensions: int) -> tuple[slice, ...]:
        """Of a whole tensor, what is this rank's. `name` may say more after a slash, as those of an optimizer's state do."""
        dimension = DIVIDED.get(name.partition("/")[0])
        if dimension is None or n_dimensions <= dimension:  # Adam's count of steps has none
            return (slice(None),) * n_dimensions
        return (slice(None),) * dimension + (self.features,)

    def cut(self, whole: TrainingSAE[Any]) -> TrainingSAE[Any]:
        """A training SAE of this rank's features, of the same class, on the CPU. Its weights are copies."""
        weights = {
            name: value.detach()[self._place(name, value.ndim)].cpu().clone(memory_format=torch.contiguous_format)
            for name, value in whole.state_dict().items()
        }
        return _with_weights(whole, self.width, weights)

    def read(self, path: Path) -> dict[str, Tensor]:
        """This rank's part of the tensors in a safetensors file of a whole SAE; no more of it is held."""
        tensors: dict[str, Tensor] = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                shape = file.get_slice(name).get_shape()
                part = file.get_slice(name)[self._place(name, len(shape))] if shape else file.get_tensor(name)
                # Columns come with the whole's strides, which torch's fused Adam takes for rows of their own.
                tensors[name] = part.clone(memory_format=torch.contiguous_format)
        return tensors

    def join(self, parts: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The whole of what every rank has a part of, on rank 0 in main memory, one tensor after the other; None on the
        others. All ranks call it, with the same names."""
        whole: dict[str, Tensor] = {}
        for name, part in parts.items():
            dimension = DIVIDED.get(name.partition("/")[0])
            if dimension is None or part.ndim <= dimension:
                whole[name] = part.detach().cpu()
                continue
            joined = self.ranks.joined_by_leader(part, dimension)
            if joined is not None:
                whole[name] = joined
        return whole if self.ranks.leads else None

    def join_sae(self, shard: TrainingSAE[Any]) -> TrainingSAE[Any] | None:
        """The whole SAE on rank 0's CPU, None elsewhere. All ranks call it."""
        weights = self.join(shard.state_dict())
        return None if weights is None else _with_weights(shard, self.d_sae, weights)


def _with_weights(like: TrainingSAE[Any], d_sae: int, weights: dict[str, Tensor]) -> TrainingSAE[Any]:
    """An SAE like another one, of another width, on the CPU, that holds these very tensors."""
    # On the meta device, so that no weights are made only to be replaced.
    sae = type(like)(replace(copy.deepcopy(like.cfg), d_sae=d_sae, device="meta"))
    sae.load_state_dict(weights, assign=True)
    sae.cfg.device, sae.device = "cpu", torch.device("cpu")
    for (name, parameter), (_, mine) in zip(sae.named_parameters(), like.named_parameters(), strict=True):
        assert name in weights
        parameter.requires_grad_(mine.requires_grad)
    return sae.train(like.training)
