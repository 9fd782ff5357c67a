"""SAELens's standard (ReLU, L1) training SAE with its backward written out: sparse, or in two `[tokens, d_sae]` tensors.

The host's own forward pass keeps three such tensors and makes some eight more on the way, most of them for the L1. Where
few features are active, as they are but for the first steps of a training, no such tensor is made (`SparseSAE`). Else
the activations are made in place of the pre-activations, the L1 is a product with a vector, and its gradient joins that
of the reconstruction in place.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardTrainingSAE
from torch import Tensor

from e2e_sae_plugin.kernels.sparse import ActiveFeatures
from e2e_sae_plugin.kernels.sparse_sae import Encoder, SparseSAE, select_positive


def can_train(sae: Any) -> bool:
    """Whether `training_forward_pass` below stands for `sae`'s own: the host's class, ReLU, L1, no hooks, no autocast."""
    return (
        type(sae) is StandardTrainingSAE
        and "training_forward_pass" not in vars(sae)  # `compile_sae` puts the compiled one there
        and sae.cfg.lp_norm == 1
        and isinstance(sae.activation_fn, torch.nn.ReLU)
        and not torch.is_autocast_enabled(sae.W_enc.device.type)
        and not any(point.fwd_hooks or point.bwd_hooks for point in sae.hook_dict.values())
    )


def training_forward_pass(sae: StandardTrainingSAE, step_input: TrainStepInput) -> TrainStepOutput:
    """`StandardTrainingSAE.training_forward_pass`: same values and gradients, but `feature_acts` has no gradient and is a
    sparse COO tensor where few features are active, and `hidden_pre` is empty."""
    with torch.no_grad():  # the normalisation has no parameters; b_dec's part of the gradient is `_ReLUSAE`'s
        x = sae.process_sae_in(step_input.sae_in)
        active = select_positive(x, Encoder(sae.W_enc, sae.b_enc))
    parameters = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    b_dec_on_input = bool(sae.cfg.apply_b_dec_to_input)
    if isinstance(active, ActiveFeatures):
        feature_acts = active.to_sparse()
        sae_out, weighted_acts, _ = SparseSAE.apply(*parameters, x, active, None, b_dec_on_input, True)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        sae_out, feature_acts, weighted_acts = _ReLUSAE.apply(x, *parameters, b_dec_on_input, active)  # pyright: ignore[reportGeneralTypeIssues]
    sae_out = sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(sae_out), sae.d_head)
    mse_loss = sae.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
    l1_loss = (step_input.coefficients["l1"] * weighted_acts).mean()
    return TrainStepOutput(
        sae_in=step_input.sae_in,
        sae_out=sae_out,
        feature_acts=feature_acts,
        hidden_pre=sae_out.new_empty(0, feature_acts.shape[1]),
        loss=mse_loss + l1_loss,
        losses={"mse_loss": mse_loss, "l1_loss": l1_loss},
    )


class _ReLUSAE(torch.autograd.Function):
    """`x [tokens, d_in]` -> `sae_out`, `feature_acts` (no gradient), `sum_i feature_acts_i ||W_dec_i||` per token.

    `first`: pre-activations of the first tokens, where they are known.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        b_dec_on_input: bool,
        first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_first = 0 if first is None else len(first)
        if n_first == len(x) and first is not None:
            acts = first.relu_()
        else:
            acts = x.new_empty(len(x), W_enc.shape[1])
            if first is not None:
                acts[:n_first] = first
            torch.addmm(b_enc, x[n_first:], W_enc, out=acts[n_first:])
            acts.relu_()
        norms = W_dec.norm(dim=1)
        ctx.save_for_backward(x, acts, norms, W_enc, W_dec)
        ctx.b_dec_on_input = b_dec_on_input
        ctx.mark_non_differentiable(acts)
        ctx.set_materialize_grads(False)
        return torch.addmm(b_dec, acts, W_dec), acts, acts @ norms

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, _, d_weighted = grad_outputs
        x, acts, norms, W_enc, W_dec = ctx.saved_tensors
        d_acts = d_W_dec = d_b_dec = None
        if d_out is not None:
            d_acts, d_W_dec, d_b_dec = d_out @ W_dec.T, acts.T @ d_out, d_out.sum(0)
        if d_weighted is not None:
            d_acts = torch.outer(d_weighted, norms) if d_acts is None else d_acts.addr_(d_weighted, norms)
            # A decoder row of zero length has no direction: gradient 0 there, as in torch's norm.
            scale = torch.where(norms > 0, (d_weighted @ acts) / norms, 0)[:, None]
            d_W_dec = scale * W_dec if d_W_dec is None else d_W_dec.addcmul_(scale, W_dec)
        if d_acts is None:
            return None, None, None, None, None, None, None
        torch.ops.aten.threshold_backward.grad_input(d_acts, acts, 0, grad_input=d_acts)  # d relu, in place
        d_b_enc = d_acts.sum(0)
        if ctx.b_dec_on_input:  # x = ... - b_dec: only the sum over tokens is needed, not one row per token
            through_input = W_enc @ d_b_enc
            d_b_dec = -through_input if d_b_dec is None else d_b_dec - through_input
        return None, x.T @ d_acts, d_b_enc, d_W_dec, d_b_dec, None, None
