"""SAELens's TopK and BatchTopK training SAEs, where only the encoder's product is dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK, TopKTrainingSAE
from torch import Tensor

from e2e_sae_plugin.kernels.ranked_topk import RankedBatchTopK, smallest_chosen
from e2e_sae_plugin.kernels.sharded import ShardedTokens
from e2e_sae_plugin.kernels.sparse import ActiveFeatures
from e2e_sae_plugin.kernels.sparse_sae import (
    DeadFeatures,
    Encoder,
    SparseSAE,
    among_all,
    dead_columns,
    select_batch_topk,
    select_dead,
    select_topk,
)

ACTIVATIONS = {TopKTrainingSAE: (TopK,), BatchTopKTrainingSAE: (BatchTopK, RankedBatchTopK)}


def can_train(sae: Any, is_shard: bool = False) -> bool:
    """Whether `training_forward_pass` below stands for `sae`'s own: the host's classes, no hooks, no autocast.

    Args:
        is_shard: whether other ranks have more of its features.
    """
    return (
        type(sae) in ACTIVATIONS
        and type(sae.activation_fn) in ACTIVATIONS[type(sae)]
        and sae.activation_fn.k == sae.cfg.k
        and (is_shard or sae.cfg.k <= sae.cfg.d_sae)  # else the host has an error to raise
        and "training_forward_pass" not in vars(sae)  # `compile_sae` puts the compiled one there
        and not torch.is_autocast_enabled(sae.W_enc.device.type)
        and not any(point.fwd_hooks or point.bwd_hooks for point in sae.hook_dict.values())
    )


def training_forward_pass(
    sae: TopKTrainingSAE, step_input: TrainStepInput, shards: ShardedTokens | None = None
) -> TrainStepOutput:
    """The host's `training_forward_pass`: same values and gradients, but `feature_acts` is a sparse COO tensor without
    gradient, and `hidden_pre` is empty.

    With `rescale_acts_by_decoder_norm` the norms decide which features are active, and cancel in the reconstruction and
    in its gradient. A decoder row of zero length contributes 0, where the host's division by its norm gives NaN.

    Args:
        shards: where `sae` is one rank's shard, whose `feature_acts` are then those of all ranks' tokens.

    Raises:
        ValueError: a feature is dead and `normalize_activations` is one that the host's auxiliary loss refuses.
    """
    dead, n_dead = _dead_features(sae, step_input.dead_neuron_mask, shards)
    with torch.no_grad():  # the normalisation has no parameters; b_dec's part of the gradient is `SparseSAE`'s
        x = sae.process_sae_in(step_input.sae_in if shards is None else shards.everyones(step_input.sae_in))
        norms = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
        encoder = Encoder(sae.W_enc, sae.b_enc, norms)
        active, acts = active_features(sae, x, encoder, shards)
        k_dead = min(step_input.sae_in.shape[-1] // 2, n_dead)
        dead_acts = None if dead is None else _dead_acts(x, encoder, dead, k_dead, n_dead, shards)
    adds_b_dec = shards is None or shards.adds_b_dec
    flags = (bool(sae.cfg.apply_b_dec_to_input), False, adds_b_dec)
    sae_out, _, dead_out = SparseSAE.apply(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, x, active, dead_acts, *flags)  # pyright: ignore[reportGeneralTypeIssues]
    if shards is not None and dead is None:
        (sae_out,) = shards.own_sums(sae_out)
    elif shards is not None:
        sae_out, dead_out = shards.own_sums(sae_out, dead_out)
    sae_out = sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(sae_out), sae.d_head)
    mse_loss = sae.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
    aux_loss = sae_out.new_tensor(0.0)
    if dead is not None:
        aux_loss = _dead_loss(sae, step_input.sae_in, sae_out, dead_out, n_dead)
    output = TrainStepOutput(
        sae_in=step_input.sae_in,
        sae_out=sae_out,
        feature_acts=active.to_sparse(acts),
        hidden_pre=acts.new_empty(0, active.n_features),
        loss=mse_loss + aux_loss,
        losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": aux_loss},
    )
    if isinstance(sae, BatchTopKTrainingSAE):
        sae.update_topk_threshold(acts)  # the smallest positive value, which needs no shape
        output.metrics["topk_threshold"] = sae.topk_threshold
    return output


def _dead_features(
    sae: TopKTrainingSAE, dead_mask: Tensor | None, shards: ShardedTokens | None
) -> tuple[Tensor | None, int]:
    """Which features are dead, and how many with those of other ranks; None, and 0, where none is anywhere."""
    if dead_mask is None:
        return None, 0
    dead = dead_mask.nonzero()[:, 0]
    n_dead = len(dead) if shards is None else shards.total(len(dead))
    if not n_dead:
        return None, 0
    if sae.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
        raise ValueError(
            f"TopK's auxiliary loss for dead features (there are {n_dead}) does not support normalize_activations="
            f"{sae.cfg.normalize_activations!r}: its residual would be in another space than its reconstruction. "
            "Use 'none' or 'expected_average_only_in'."
        )
    return dead, n_dead


def _dead_acts(
    x: Tensor, encoder: Encoder, dead: Tensor, k: int, n_dead: int, shards: ShardedTokens | None
) -> ActiveFeatures | DeadFeatures:
    """Activations of the k dead features of each token that are used, as far as they are this rank's."""
    if shards is None:
        return select_dead(x, encoder, dead, k)
    if k == n_dead:
        return select_dead(x, encoder, dead, len(dead))  # all are
    columns = dead_columns(encoder, dead)
    return among_all(shards.largest(x, columns, k), columns, dead, encoder.W_enc.shape[1])


def active_features(
    sae: TopKTrainingSAE, x: Tensor, encoder: Encoder, shards: ShardedTokens | None = None
) -> tuple[ActiveFeatures, Tensor]:
    """The active features with what the decoder multiplies by, and the activations that the host reports."""
    if isinstance(sae, BatchTopKTrainingSAE):
        across = sae.activation_fn if isinstance(sae.activation_fn, RankedBatchTopK) else None
        n_active = int(sae.cfg.k * len(x)) if across is None else across.n_active(len(x))
        active = select_batch_topk(x, encoder, n_active)
        ranks = shards.ranks if shards is not None else None if across is None else across.ranks
        if ranks is not None:
            active = active.where(~(active.values < smallest_chosen(ranks, active.values, n_active)))
    elif shards is not None:
        active = shards.largest(x, encoder, int(sae.cfg.k))
    else:
        active = select_topk(x, encoder, sae.cfg.k)
    acts = active.values.relu()
    if encoder.scale is None:
        return replace(active, values=acts), acts
    norms = encoder.scale[active.features]
    return replace(active, values=torch.where(norms == 0, 0, acts / norms)), acts


def _dead_loss(sae: TopKTrainingSAE, sae_in: Tensor, sae_out: Tensor, dead_out: Tensor, n_dead: int) -> Tensor:
    """The host's `calculate_topk_aux_loss`, given the dead features' reconstruction of the residual."""
    residual = (sae_in - sae_out).detach()
    scale = min(n_dead / (sae_in.shape[-1] // 2), 1.0)
    loss = (sae.reshape_fn_out(dead_out, sae.d_head) - residual).pow(2).sum(dim=-1).mean()
    return sae.cfg.aux_loss_coefficient * scale * loss
