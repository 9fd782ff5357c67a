"""What a training step hands back when the SAE ran on its tokens in several batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from e2e_sae_plugin.kernels.sparse import concatenate_acts

KEPT_ELEMENTS = 2**24
"""Feature activations of a batch that are kept for the step's output: 64 MiB in fp32."""


def without_large_tensors(output: TrainStepOutput) -> TrainStepOutput:
    """One of several batches' output, detached, without what would be the largest tensors of the step while the next batch
    is computed: `hidden_pre`, and dense `feature_acts` of over `KEPT_ELEMENTS`, which are empty `[0, d_sae]` then."""
    acts = output.feature_acts.detach()
    empty = output.sae_out.new_empty(0, acts.shape[1])
    keeps = acts.is_sparse or acts.numel() <= KEPT_ELEMENTS
    return dataclasses.replace(
        output, sae_out=output.sae_out.detach(), feature_acts=acts if keeps else empty, hidden_pre=empty
    )


def merge_step_outputs(outputs: Sequence[TrainStepOutput], shares: Sequence[float]) -> TrainStepOutput:
    """One output of the whole step, detached.

    Args:
        outputs: of the batches, in the order of their tokens.
        shares: each batch's share of the step's tokens. `loss` and `losses` are means over a batch's tokens of its own,
            so their means over the step are these weighted sums. On one of several ranks they add up to its own share,
            and the sums to its part of the step's.

    `hidden_pre`, and `feature_acts` that are large, are only kept where there is one batch: see `without_large_tensors`.
    """
    if len(outputs) == 1:
        return outputs[0] if shares[0] == 1 else _weighted(outputs[0], shares[0])
    kept = [output.feature_acts for output in outputs if len(output.feature_acts)]
    whole = len(kept) == len(outputs)  # not, where a sparse batch follows large dense ones
    acts = concatenate_acts(kept) if whole else outputs[0].sae_out.new_empty(0, outputs[0].feature_acts.shape[1])
    return TrainStepOutput(
        sae_in=torch.cat([output.sae_in for output in outputs]),
        sae_out=torch.cat([output.sae_out for output in outputs]),
        feature_acts=acts,
        hidden_pre=outputs[0].sae_out.new_empty(0, acts.shape[1]),
        loss=_weighted_sum([output.loss for output in outputs], shares),
        losses={name: _weighted_sum([output.losses[name] for output in outputs], shares) for name in outputs[0].losses},
    )


def _weighted(output: TrainStepOutput, share: float) -> TrainStepOutput:
    losses = {name: value.detach() * share for name, value in output.losses.items()}
    return dataclasses.replace(output, loss=output.loss.detach() * share, losses=losses)


def _weighted_sum(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([value.detach() * share for value, share in zip(values, shares, strict=True)]).sum()
