"""SAELens's standard (ReLU, L1) training SAE with its backward written out: sparse, or in one `[tokens, d_sae]` tensor.

The host's own forward pass keeps three such tensors and makes some eight more on the way, most of them for the L1. Where
few features are active, as they are but for the first steps of a training, no such tensor is made (`SparseSAE`). Else
the activations are made in place of the pre-activations, the L1 is a product with a vector, and its gradient joins that
of the reconstruction in place; all of it some thousand features at a time, so that they stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardTrainingSAE
from torch import Tensor
from torch.autograd.function import once_differentiable

from e2e_sae_plugin.kernels.sharded import ShardedTokens
from e2e_sae_plugin.kernels.sparse import ActiveFeatures
from e2e_sae_plugin.kernels.sparse_sae import Encoder, SparseSAE, select_positive

TILE_FEATURES = 2048
"""Features whose activations are computed at once on a CPU: of 2,048 tokens 16 MB in fp32."""


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


def training_forward_pass(
    sae: StandardTrainingSAE, step_input: TrainStepInput, shards: ShardedTokens | None = None
) -> TrainStepOutput:
    """`StandardTrainingSAE.training_forward_pass`: same values and gradients, but `feature_acts` has no gradient and is a
    sparse COO tensor where few features are active, and `hidden_pre` is empty.

    Args:
        shards: where `sae` is one rank's shard, whose `feature_acts` are then those of all ranks' tokens.
    """
    with torch.no_grad():  # the normalisation has no parameters; b_dec's part of the gradient is `_ReLUSAE`'s
        x = sae.process_sae_in(step_input.sae_in if shards is None else shards.everyones(step_input.sae_in))
        active = select_positive(x, Encoder(sae.W_enc, sae.b_enc))
    parameters = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    b_dec_on_input, adds_b_dec = bool(sae.cfg.apply_b_dec_to_input), shards is None or shards.adds_b_dec
    if isinstance(active, ActiveFeatures):
        feature_acts = active.to_sparse()
        sae_out, weighted_acts, _ = SparseSAE.apply(*parameters, x, active, None, b_dec_on_input, True, adds_b_dec)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        sae_out, feature_acts, weighted_acts = _ReLUSAE.apply(x, *parameters, b_dec_on_input, active, adds_b_dec)  # pyright: ignore[reportGeneralTypeIssues]
    if shards is not None:
        sae_out, weighted_acts = shards.own_sums(sae_out, weighted_acts)
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


def feature_tiles(W_enc: Tensor) -> list[slice]:
    """Features that are dealt with at once: on a CPU so many that their activations stay in its cache, elsewhere all."""
    d_sae = W_enc.shape[1]
    size = TILE_FEATURES if W_enc.device.type == "cpu" else d_sae
    return [slice(first, min(first + size, d_sae)) for first in range(0, d_sae, size)]


class _ReLUSAE(torch.autograd.Function):
    """`x [tokens, d_in]` -> `sae_out`, `feature_acts` (no gradient), `sum_i feature_acts_i ||W_dec_i||` per token.

    `first`: pre-activations of the first tokens, where they are known. `adds_b_dec`: whether `sae_out` has it.
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
        adds_b_dec: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        known = x.new_empty(0, W_enc.shape[1]) if first is None else first
        rest = slice(len(known), None)
        acts = known if len(known) == len(x) else x.new_empty(len(x), W_enc.shape[1])
        norms = W_dec.norm(dim=1)
        sae_out = b_dec.repeat(len(x), 1) if adds_b_dec else x.new_zeros(len(x), W_dec.shape[1])
        weighted = x.new_zeros(len(x))
        for cols in feature_tiles(W_enc):
            tile = acts[:, cols]
            if acts is not known:
                tile[: len(known)] = known[:, cols]
                torch.addmm(b_enc[cols], x[rest], W_enc[:, cols], out=tile[rest])
            tile.relu_()
            sae_out.addmm_(tile, W_dec[cols])
            weighted.addmv_(tile, norms[cols])
        ctx.save_for_backward(x, acts, norms, W_enc, W_dec)
        ctx.b_dec_on_input, ctx.adds_b_dec = b_dec_on_input, adds_b_dec
        ctx.mark_non_differentiable(acts)
        ctx.set_materialize_grads(False)
        return sae_out, acts, weighted

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's type)
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d_out, _, d_weighted = grad_outputs
        x, acts, norms, W_enc, W_dec = ctx.saved_tensors
        if d_out is None and d_weighted is None:
            return None, None, None, None, None, None, None, None
        d_out = x.new_zeros(len(x), W_dec.shape[1]) if d_out is None else d_out.contiguous()
        d_W_enc, d_W_dec, d_b_enc = torch.empty_like(W_enc), torch.empty_like(W_dec), W_enc.new_empty(W_enc.shape[1])
        tiles = feature_tiles(W_enc)
        buffer = x.new_empty(len(x) * (tiles[0].stop if tiles else 0))
        for cols in tiles:
            tile, n = acts[:, cols], cols.stop - cols.start
            d_acts = torch.mm(d_out, W_dec[cols].T, out=buffer[: len(x) * n].view(len(x), n))
            torch.mm(tile.T, d_out, out=d_W_dec[cols])
            if d_weighted is not None:
                d_acts.addr_(d_weighted, norms[cols])
                # A decoder row of zero length has no direction: gradient 0 there, as in torch's norm.
                scale = torch.where(norms[cols] > 0, (d_weighted @ tile) / norms[cols], 0)[:, None]
                d_W_dec[cols].addcmul_(scale, W_dec[cols])
            torch.ops.aten.threshold_backward.grad_input(d_acts, tile, 0, grad_input=d_acts)  # d relu, in place
            torch.mm(x.T, d_acts, out=d_W_enc[:, cols])
            torch.sum(d_acts, 0, out=d_b_enc[cols])
        d_b_dec = d_out.sum(0) if ctx.adds_b_dec else d_out.new_zeros(d_out.shape[1])
        if ctx.b_dec_on_input:  # x = ... - b_dec: only the sum over tokens is needed, not one row per token
            d_b_dec -= W_enc @ d_b_enc
        return None, d_W_enc, d_b_enc, d_W_dec, d_b_dec, None, None, None
