"""What a training step hands back when the SAE ran on its tokens in several batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from e2e_sae_plugin.kernels.sparse import concatenate_acts


def merge_step_outputs(outputs: Sequence[TrainStepOutput], shares: Sequence[float]) -> TrainStepOutput:
    """One output of the whole step, detached.

    Args:
        outputs: of the batches, in the order of their tokens.
        shares: each batch's share of the step's tokens. `loss` and `losses` are means over a batch's tokens of its own,
            so their means over the step are these weighted sums.

    `hidden_pre` is only kept where there is one batch (else it is empty): it would be the largest tensor of the result,
    and nothing reads it after the step.
    """
    if len(outputs) == 1:
        return outputs[0]
    acts = concatenate_acts([output.feature_acts.detach() for output in outputs])
    return TrainStepOutput(
        sae_in=torch.cat([output.sae_in for output in outputs]),
        sae_out=torch.cat([output.sae_out.detach() for output in outputs]),
        feature_acts=acts,
        hidden_pre=outputs[0].sae_out.new_empty(0, acts.shape[1]),
        loss=_weighted_sum([output.loss for output in outputs], shares),
        losses={name: _weighted_sum([output.losses[name] for output in outputs], shares) for name in outputs[0].losses},
    )


def _weighted_sum(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([value.detach() * share for value, share in zip(values, shares, strict=True)]).sum()
