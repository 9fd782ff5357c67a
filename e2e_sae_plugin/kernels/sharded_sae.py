"""Training and evaluation passes of an SAE whose features are divided between ranks."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, Step
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import act_times_W_dec
from torch import Tensor

from e2e_sae_plugin.kernels import relu_sae, topk_sae
from e2e_sae_plugin.kernels.sharded import ShardedTokens
from e2e_sae_plugin.kernels.sparse import decode
from e2e_sae_plugin.kernels.sparse_sae import Encoder


def training_forward_pass(sae: Any, step_input: TrainStepInput, shards: ShardedTokens) -> TrainStepOutput:
    """The whole SAE's `training_forward_pass` on this rank's tokens, by a `sae` that is this rank's shard of it.

    Args:
        step_input: `sae_in [own tokens, d_in]`; `dead_neuron_mask [d_sae / ranks]` of the shard's features.

    Returns:
        As the host's, but `feature_acts [all tokens, d_sae / ranks]`, without gradient, are those of the shard's features
        on all ranks' tokens, and `hidden_pre` is empty.

    Raises:
        ValueError: hooks are on the shard, or its class is not one of SAELens's own.
    """
    if relu_sae.can_train(sae):
        return relu_sae.training_forward_pass(sae, step_input, shards)
    if topk_sae.can_train(sae, is_shard=True):
        return topk_sae.training_forward_pass(sae, step_input, shards)
    if type(sae) is JumpReLUTrainingSAE and not any(p.fwd_hooks or p.bwd_hooks for p in sae.hook_dict.values()):
        return _jumprelu_forward_pass(sae, step_input, shards)
    raise ValueError(
        f"shard_dictionary=True cannot train this {type(sae).__name__}: it has hooks, or is not as SAELens makes it. Take "
        "the hooks off, or leave shard_dictionary at False."
    )


def _jumprelu_forward_pass(
    sae: JumpReLUTrainingSAE, step_input: TrainStepInput, shards: ShardedTokens
) -> TrainStepOutput:
    """The host's `JumpReLUTrainingSAE.training_forward_pass` with its sums over features taken over all ranks."""
    with torch.no_grad():
        sae.threshold.data.clamp_(min=0.0)  # as the host does
    feature_acts, hidden_pre = sae.encode_with_hidden_pre(shards.everyones(step_input.sae_in))
    part = feature_acts @ sae.W_dec
    part = part + sae.b_dec if shards.adds_b_dec else part
    parts = [part, _sparsity(sae, feature_acts, hidden_pre)]
    silence_coefficient = sae.cfg.pre_act_loss_coefficient
    if silence_coefficient is not None:
        parts.append(_silence(sae, hidden_pre, step_input.dead_neuron_mask))
    sae_out, sparsity, *silence = shards.own_sums(*parts)
    if sae.cfg.jumprelu_sparsity_loss_mode == "quadratic":
        target = sae.cfg.target_l0
        assert target is not None  # the host's constructor has asked for it
        sparsity = 2 / target * (sparsity - target) ** 2
    mse_loss = sae.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
    losses = {"mse_loss": mse_loss, "l0_loss": (step_input.coefficients["l0"] * sparsity).mean()}
    if silence_coefficient is not None:
        losses["pre_act_loss"] = silence_coefficient * silence[0].mean()
    return TrainStepOutput(
        sae_in=step_input.sae_in,
        sae_out=sae_out,
        feature_acts=feature_acts.detach(),
        hidden_pre=sae_out.new_empty(0, feature_acts.shape[1]),
        loss=torch.stack(list(losses.values())).sum(),
        losses=losses,
    )


def _sparsity(sae: JumpReLUTrainingSAE, feature_acts: Tensor, hidden_pre: Tensor) -> Tensor:
    """`[tokens]`: what each token's features add to the sparsity loss."""
    if sae.cfg.jumprelu_sparsity_loss_mode == "tanh":
        return torch.tanh(sae.cfg.jumprelu_tanh_scale * feature_acts * sae.W_dec.norm(dim=1)).sum(dim=-1)
    threshold = sae.threshold.to(hidden_pre.dtype)
    steps: Any = Step.apply(hidden_pre, threshold, sae.bandwidth, sae.cfg.jumprelu_ste_to_input)
    return steps.sum(dim=-1)


def _silence(sae: JumpReLUTrainingSAE, hidden_pre: Tensor, dead_mask: Tensor | None) -> Tensor:
    """`[tokens]`: the host's `calculate_pre_act_loss` before its mean."""
    if dead_mask is None or not bool(dead_mask.any()):
        return hidden_pre.new_zeros(len(hidden_pre))
    threshold = sae.threshold.to(hidden_pre.dtype)
    return ((threshold - hidden_pre).relu() * dead_mask * sae.W_dec.norm(dim=1)).sum(dim=-1)


@torch.no_grad()
def reconstruct(sae: Any, sae_in: Tensor, shards: ShardedTokens) -> tuple[Tensor, Tensor]:
    """What the whole SAE's `encode` and `decode` make of tokens that all ranks have: `feature_acts [tokens, d_sae / ranks]`
    of the shard's features, and `sae_out [tokens, d_in]` of all features."""
    if type(getattr(sae, "activation_fn", None)) in topk_sae.ACTIVATIONS.get(type(sae), ()):
        norms = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
        active, acts = topk_sae.active_features(
            sae, sae.process_sae_in(sae_in), Encoder(sae.W_enc, sae.b_enc, norms), shards
        )
        feature_acts, part = active.to_sparse(acts), decode(active, sae.W_dec)
    else:
        feature_acts = sae.encode(sae_in)
        part = act_times_W_dec(feature_acts, sae.W_dec, getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))
    (sae_out,) = shards.own_sums(part)
    return feature_acts, sae_out + sae.b_dec
