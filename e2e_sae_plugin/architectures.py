"""What each SAELens training architecture adds to the loss, and what it can be combined with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from torch import Tensor

from e2e_sae_plugin.objective import Objective

LossKind = Literal["mse", "inner_level", "auxiliary", "sparsity"]

# Share of the objective's own value that reconstruction-like extras are rescaled to where no local error is trained.
# TopK's family: the 1/32 of Gao et al. 2024 (arXiv 2406.04093, appendix A.2); the term reaches dead features only.
# Gated: the term is what trains the gates, so it weighs more, yet less than the KL on live features.
DEFAULT_AUXILIARY_SHARE = {"gated": 0.1}
_TOPK_SHARE = 1 / 32

# SAELens's own architectures name every term of their loss; only a user's may not.
NAMES_EVERY_LOSS = frozenset(
    {"standard", "gated", "topk", "abstopk", "jumprelu", "batchtopk", "matryoshka_batchtopk", "matching_pursuit"}
)

# They have no sparsity coefficient: the number of active features is set.
FIXED_L0 = frozenset({"topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "matching_pursuit"})

# The setting that keeps an architecture sparse while its weights move. Those that fix L0 by themselves have none.
SPARSITY_COEFFICIENT = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}

# They have a reconstruction-like extra.
WITH_AUXILIARY = frozenset({"gated", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk"})

# Theirs is for dead features alone, and is left out with them.
AUXILIARY_FOR_DEAD_FEATURES = frozenset({"topk", "abstopk", "batchtopk"})

# Their losses are means over tokens of terms that no other token enters, so the SAE may run on some of a step's tokens at a
# time. The default weight of an auxiliary reconstruction depends on the whole step's KL (and BatchTopK and Matryoshka
# choose features across tokens); of a user's architecture nothing is known.
TOKEN_SEPARABLE = NAMES_EVERY_LOSS - WITH_AUXILIARY

# Their features can be divided between ranks (`kernels.sharded_sae`).
SHARDED_ARCHITECTURES = frozenset({"standard", "topk", "batchtopk", "jumprelu"})

RUN_TIME_NORMALISATIONS = frozenset({"layer_norm", "constant_norm_rescale"})
# The host raises for these once a feature is dead (TopK's auxiliary loss, in topk_sae.py) or, with Matryoshka, at the
# first inner level; matching pursuit's tied encoder cannot absorb a whitening.
UNTRAINABLE_NORMALISATIONS = {
    "topk": RUN_TIME_NORMALISATIONS,
    "abstopk": RUN_TIME_NORMALISATIONS,
    "batchtopk": RUN_TIME_NORMALISATIONS,
    "matryoshka_batchtopk": RUN_TIME_NORMALISATIONS,
    "matching_pursuit": frozenset({"covariance_whitening"}),
}


def check_normalisation(architecture: str, normalize_activations: str, auxiliary: float | None = None) -> None:
    """Refuse combinations of architecture and activation normalisation that SAELens cannot train to the end.

    Args:
        auxiliary: `Objective.auxiliary`; with 0, TopK's auxiliary loss, which is what fails, is not computed.

    Raises:
        ValueError: for instance topk with layer_norm.
    """
    refused = UNTRAINABLE_NORMALISATIONS.get(architecture, frozenset())
    if auxiliary == 0 and architecture in AUXILIARY_FOR_DEAD_FEATURES:
        refused = refused - RUN_TIME_NORMALISATIONS
    if normalize_activations in refused:
        usable = sorted(
            {"none", "expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening"}
            - refused
        )
        raise ValueError(
            f"sae.normalize_activations={normalize_activations!r} cannot be trained with architecture {architecture!r}: "
            f"SAELens's implementation fails for it during training. Expected one of {usable}."
        )


def check_dtype(architecture: str, sae_dtype: str, autocast: bool) -> None:
    """Refuse a low-precision Gated SAE without autocast: SAELens's auxiliary loss multiplies its fp32 input by the weights.

    Raises:
        ValueError: for instance gated with bfloat16.
    """
    if architecture == "gated" and not autocast and sae_dtype not in ("float32", "torch.float32"):
        raise ValueError(
            f"sae.dtype={sae_dtype!r} cannot be trained with architecture 'gated': SAELens's auxiliary loss needs the "
            "dtype of its input. Expected 'float32'; set autocast=True for mixed precision."
        )


def loss_kind(name: str) -> LossKind:
    """What a named loss of `TrainStepOutput.losses` is; unknown names are sparsity terms, kept as they are."""
    if name == "mse_loss":
        return "mse"
    if name.startswith("inner_mse_loss"):
        return "inner_level"
    return "auxiliary" if name == "auxiliary_reconstruction_loss" else "sparsity"


def auxiliary_share(architecture: str) -> float:
    """`DEFAULT_AUXILIARY_SHARE` of an architecture; a user's own gets that of the TopK family."""
    return DEFAULT_AUXILIARY_SHARE.get(architecture, _TOPK_SHARE)


def inner_reconstructions(sae: TrainingSAE[Any], feature_acts: Tensor) -> list[tuple[str, Tensor]]:
    """Reconstructions of Matryoshka's inner levels `[tokens, d_in]`, named by width; none for other architectures."""
    if not isinstance(sae, MatryoshkaBatchTopKTrainingSAE):
        return []
    # Private in the host, which computes the same sums for its own inner losses; a test notices if it goes away.
    return [(str(width), reconstruction) for width, reconstruction in sae._iterable_decode(feature_acts)]


def sae_losses(output: TrainStepOutput, architecture: str) -> Iterable[tuple[str, LossKind, Tensor]]:
    """The named losses of a training forward pass and, for a user's architecture (which may return one bare tensor),
    what of `output.loss` has no name, as `unnamed_loss`."""
    for name, value in output.losses.items():
        yield name, loss_kind(name), value
    if architecture not in NAMES_EVERY_LOSS:
        yield "unnamed_loss", "sparsity", output.loss - sum(output.losses.values())


def combine_sae_losses(
    output: TrainStepOutput,
    architecture: str,
    objective: Objective,
    spliced_value: Tensor,
    of_step: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of the objective that is computed on the SAE alone.

    Args:
        output: SAELens's training forward pass.
        spliced_value: weighted value of the KL and downstream terms at this step, detached, which the default
            auxiliary weight is a share of.
        of_step: from means over these tokens, `[n]`, to those over all tokens of the step; None where these are all.

    Returns:
        The weighted total, and every term detached and unweighted.
    """
    total: Tensor | None = None
    terms: dict[str, Tensor] = {}
    for name, kind, value in sae_losses(output, architecture):
        terms[name] = value.detach()
        weight: float | Tensor = 1.0
        if kind in ("mse", "inner_level"):
            weight = objective.mse
        elif kind == "auxiliary":
            weight = _auxiliary_weight(objective, architecture, spliced_value, value.detach(), of_step)
        if isinstance(weight, float | int) and weight == 0:
            continue  # keeps a term that is left out from costing a backward
        weighted = weight * value
        # No start from 0: the order of the sum is the host's, so that the local objective is the host's to the bit.
        total = weighted if total is None else total + weighted
    return output.loss.new_zeros(()) if total is None else total, terms


def _auxiliary_weight(
    objective: Objective,
    architecture: str,
    spliced_value: Tensor,
    value: Tensor,
    of_step: Callable[[Tensor], Tensor] | None,
) -> float | Tensor:
    if objective.auxiliary is not None:
        return objective.auxiliary
    if objective.balance_kl:
        return 1.0
    if objective.mse > 0:
        return objective.mse
    if of_step is not None:
        spliced_value, value = of_step(torch.stack([spliced_value.to(value), value])).unbind()
    balanced = auxiliary_share(architecture) * spliced_value / value
    return torch.where(value > 0, balanced, torch.zeros_like(balanced))  # 0 where no feature is dead
