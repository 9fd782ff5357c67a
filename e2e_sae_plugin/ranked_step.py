"""What a step does on several ranks besides its own part: which part that is, and what is added up between the ranks."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from torch.nn import Parameter

from e2e_sae_plugin.distributed import Ranks


def dividing(ranks: Ranks, batch: Tensor, n_trained_tokens: Callable[[Tensor], int]) -> Ranks | None:
    """The ranks, where each has something to train on in its part of the batch.

    None where all of one part's tokens are excluded: every rank then computes the whole step. All ranks have the whole
    batch, so they need not talk to know.
    """
    parts = batch.tensor_split(ranks.size)
    return ranks if all(n_trained_tokens(part) for part in parts) else None


def digest(batch: Tensor) -> float:
    """A number by which ranks that draw other data are found out."""
    return float(zlib.crc32(batch.cpu().contiguous().numpy().tobytes()))


def check_digests(ranks: Ranks, digests: Sequence[float], step: int) -> None:
    """Refuse to train on different data.

    Raises:
        ValueError: names the ranks.
    """
    others = [rank for rank, value in enumerate(digests) if value != digests[0]]
    if others:
        raise ValueError(
            f"At step {step} rank(s) {', '.join(map(str, others))} drew another batch than rank 0, but all {ranks.size} "
            "ranks have to draw the same ones. Give all of them the same dataset, in the same order (give a shuffle() its "
            "seed), and the same tokenizer."
        )


def sum_statistics(ranks: Ranks, output: TrainStepOutput, fired: Tensor) -> TrainStepOutput:
    """Loss and terms of the whole step, from each rank's part of them; `fired [d_sae]` becomes that of the whole step."""
    names = list(output.losses)
    values = torch.stack([value.detach().float() for value in (output.loss, *(output.losses[n] for n in names))])
    values = values.to(fired.device)
    ranks.sum_([fired, values])
    loss, *terms = (value.to(output.loss) for value in values)
    return dataclasses.replace(output, loss=loss, losses=dict(zip(names, terms, strict=True)))


def sum_gradients(ranks: Ranks, parameters: Sequence[Parameter]) -> None:
    """Every gradient becomes the sum of all ranks' ones. A parameter without one on any rank keeps none."""
    has_gradient = parameters[0].new_tensor([float(p.grad is not None) for p in parameters])
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.sum_([has_gradient, *(p.grad for p in parameters if p.grad is not None)])
    for parameter, n_ranks in zip(parameters, has_gradient.tolist(), strict=True):
        if n_ranks == 0:
            parameter.grad = None


def sharded_norm(ranks: Ranks, divided: Sequence[Parameter], everywhere: Sequence[Parameter]) -> Tensor:
    """The norm of all gradients together, the same on all ranks to the bit.

    Args:
        divided: parameters of which each rank has another part.
        everywhere: parameters that every rank has, with the same gradient.
    """
    norms = [
        float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        for parameters in (divided, everywhere)
    ]
    seen = ranks.exchange(norms)
    return (seen[:, 0].square().sum() + seen[0, 1].square()).sqrt().float().to((*divided, *everywhere)[0].device)


def with_all_tokens(ranks: Ranks, output: TrainStepOutput) -> TrainStepOutput:
    """For the log: `sae_in` and `sae_out` `[tokens, d_in]` of the whole step, no `feature_acts`, and an architecture's own
    metrics of the whole step (of those named `max_` and `min_` the largest and smallest, of others the mean)."""
    no_acts = output.sae_out.detach().new_empty(0, output.feature_acts.shape[1])
    sae_in, sae_out = ranks.rows(output.sae_in), ranks.rows(output.sae_out)
    names = list(output.metrics)
    mine = [float(value() if callable(value) else value) for value in output.metrics.values()]
    seen = ranks.exchange([len(output.sae_in), *mine])
    means = (seen * seen[:, :1] / seen[:, 0].sum()).sum(0)
    metrics: dict[str, Any] = {}
    for i, name in enumerate(names, 1):
        extreme = {"max_": seen[:, i].max(), "min_": seen[:, i].min()}.get(name[:4])
        metrics[name] = float(means[i] if extreme is None else extreme)
    return dataclasses.replace(output, sae_in=sae_in, sae_out=sae_out, feature_acts=no_acts, metrics=metrics)
