"""How much of the model's behaviour one SAE keeps, measured on token sequences in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from sae_lens.saes.sae import SAE
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.evaluation.sums import SequenceSums
from e2e_sae_plugin.kernels.kl import chunk_tokens
from e2e_sae_plugin.splice import SplicedModel, SplicedPass
from e2e_sae_plugin.splice.activations import select_tokens
from e2e_sae_plugin.spliced_losses import MicroBatch, clean_micro_batch, downstream_errors, sequence_of, splice
from e2e_sae_plugin.torch_state import own_torch_state

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`sae_in [tokens, d_in]`, as the model has it, -> (`feature_acts [tokens, d_sae]`, `sae_out [tokens, d_in]`)."""


@dataclass(frozen=True)
class SpliceMetrics:
    """Means over the tokens that the SAE is applied to."""

    ce_loss_without_sae: float
    """Cross-entropy of the clean model in nats per token."""
    ce_loss_with_sae: float
    """Cross-entropy with the SAE spliced in."""
    kl: float
    """`D_KL(y || y_hat)` in nats per token."""
    l0: float
    """Active features per token."""
    mse: float
    """`||a - SAE(a)||^2`, summed over dimensions, in the model's own space."""
    explained_variance: float
    """1 - mean squared error / mean squared distance from the mean activation (SAELens's `explained_variance`)."""
    n_alive: int
    """Features that fire at least once on these tokens."""
    downstream_mse: dict[str, float]
    """`||a_hat^(k) - a^(k)||^2` by downstream hook."""
    n_tokens: int
    sums: SequenceSums = field(repr=False, compare=False)
    """What the means come from, by sequence: for bootstrap intervals."""

    @property
    def ce_loss_increase(self) -> float:
        """The paper's measure: cross-entropy with the SAE minus without."""
        return self.ce_loss_with_sae - self.ce_loss_without_sae

    def to_log(self) -> dict[str, float]:
        """The metrics under the names that go to the log."""
        return {
            "metrics/ce_loss_increase": self.ce_loss_increase,
            "metrics/ce_loss_without_sae": self.ce_loss_without_sae,
            "metrics/ce_loss_with_sae": self.ce_loss_with_sae,
            "metrics/held_out_kl": self.kl,
            "metrics/held_out_l0": self.l0,
            "metrics/held_out_mse": self.mse,
            "metrics/held_out_explained_variance": self.explained_variance,
            **{f"metrics/held_out_downstream_mse/{hook}": value for hook, value in self.downstream_mse.items()},
        }


def encode_with(sae: SAE[Any], activation_shape: Sequence[int] | None = None) -> Callable[[Tensor], Tensor]:
    """`sae_in [tokens, d_in]`, as the model has it, -> `feature_acts [tokens, d_sae]`; arguments: see `reconstruct_with`."""

    def encode(sae_in: Tensor) -> Tensor:
        x = sae_in.to(sae.W_dec.device, sae.W_dec.dtype)
        if sae.hook_z_reshaping_mode and activation_shape is not None:
            x = x.unflatten(-1, tuple(activation_shape))
        return sae.encode(x)

    return encode


def reconstruct_with(sae: SAE[Any], activation_shape: Sequence[int] | None = None) -> Reconstruct:
    """`Reconstruct` of an SAE in inference or training form.

    Args:
        activation_shape: trailing shape of the model's activation, `[n_heads, d_head]` for a `hook_z` SAE that reshapes
            by itself.
    """

    encode = encode_with(sae, activation_shape)

    def reconstruct(sae_in: Tensor) -> tuple[Tensor, Tensor]:
        feature_acts = encode(sae_in)
        return feature_acts, sae.decode(feature_acts).flatten(1)

    return reconstruct


@own_torch_state()
@torch.no_grad()
@shape_checked
def measure(
    reconstruct: Reconstruct,
    model: SplicedModel,
    tokens: Int[Tensor, "prompts pos"],
    *,
    batch_size_prompts: int = 8,
    seqpos_slice: Sequence[int | None] = (None,),
    excluded: Tensor | None = None,
    head_index: int | None = None,
) -> SpliceMetrics:
    """Measure an SAE on `tokens [n_prompts, pos]`, `batch_size_prompts` sequences at a time.

    Args:
        reconstruct: the SAE, see `reconstruct_with`.
        model: the model with the SAE's place in it; its downstream hooks are measured.
        seqpos_slice: positions that the SAE is applied to.
        excluded: token ids that it is not applied to.
        head_index: the head that it is applied to.
    """
    sums = SequenceSums()
    for chunk in tokens.split(batch_size_prompts):
        micro = clean_micro_batch(model, chunk, hidden=True, seqpos_slice=seqpos_slice, excluded=excluded)
        if not micro.n_tokens:
            continue
        sae_in = micro.sae_in(head_index)
        feature_acts, sae_out = reconstruct(sae_in)
        spliced = splice(model, micro, sae_out, head_index=head_index, hidden=True)
        sequence = sequence_of(micro)
        sums.add_sae(sae_in.to(sae_out.device), feature_acts, sae_out, sequence, len(chunk))
        add_outputs(sums, model, micro, spliced, sequence)
        for hook in model.downstream_hooks:
            sums.add(f"downstream/{hook}", downstream_errors(micro, spliced, hook), sequence, len(chunk))
    if not float(sums.total("n_predicted").sum()):
        raise ValueError("There is no token to measure: every one is excluded or outside seqpos_slice.")
    assert sums.fired is not None
    means = {name: float(value) for name, value in sums.means(None, model.downstream_hooks).items()}
    names = ("ce_loss_without_sae", "ce_loss_with_sae", "kl", "l0", "mse", "explained_variance")
    return SpliceMetrics(
        **{name: means[name] for name in names},
        n_alive=int(sums.fired.sum()),
        downstream_mse={hook: means[f"downstream_mse/{hook}"] for hook in model.downstream_hooks},
        n_tokens=int(sums.total("n_tokens").sum()),
        sums=sums,
    )


def add_outputs(
    sums: SequenceSums, model: SplicedModel, micro: MicroBatch, spliced: SplicedPass, sequence: Tensor
) -> None:
    """KL and both cross-entropies over the trained tokens, a chunk of logits at a time."""
    assert micro.clean.hidden is not None
    assert spliced.hidden is not None
    next_tokens = torch.full_like(micro.tokens, -100)  # cross_entropy's "ignore": the last position predicts nothing
    next_tokens[:, :-1] = micro.tokens[:, 1:]
    device = micro.clean.hidden.device
    mask = None if micro.mask is None else micro.mask.to(device)
    targets = select_tokens(next_tokens[..., None].to(device), mask)[:, 0]
    clean, changed = select_tokens(micro.clean.hidden, mask), select_tokens(spliced.hidden, mask)
    terms: dict[str, list[Tensor]] = {"ce_clean": [], "ce_spliced": [], "kl": []}
    size = chunk_tokens(model.vocabulary)
    for i in range(0, len(targets), size):
        log_y = model.unembed(clean[i : i + size]).float().log_softmax(-1)
        log_y_hat = model.unembed(changed[i : i + size]).float().log_softmax(-1)
        terms["ce_clean"].append(F.nll_loss(log_y, targets[i : i + size], reduction="none"))
        terms["ce_spliced"].append(F.nll_loss(log_y_hat, targets[i : i + size], reduction="none"))
        terms["kl"].append(F.kl_div(log_y_hat, log_y, log_target=True, reduction="none").sum(-1))
    values = {name: torch.cat(chunks) for name, chunks in terms.items()}
    for name, value in {**values, "n_predicted": targets != -100}.items():
        sums.add(name, value, sequence, len(micro.tokens))
