"""What is added up while an SAE is measured: one number per sequence, so that means come with bootstrap intervals."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.precision import accumulation_dtype


def bootstrap_weights(n_sequences: int, n_resamples: int = 1000, seed: int = 0) -> Tensor:
    """How often each sequence is in each resample: `[n_resamples, n_sequences]`, fp64; rows add up to `n_sequences`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_sequences, (n_resamples, n_sequences), generator=generator)
    return torch.zeros(n_resamples, n_sequences, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones((), dtype=torch.float64).expand(n_resamples, n_sequences)
    )


def check_confidence(confidence: float) -> None:
    """Refuse a level that is no probability.

    Raises:
        ValueError: `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}.")


def interval(resampled: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval of values `[n_resamples]` of one statistic.

    Raises:
        ValueError: `confidence` is not between 0 and 1.
    """
    check_confidence(confidence)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(resampled.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


class SequenceSums:
    """Sums over the measured tokens of each sequence, added up where they are measured and kept in fp64 on the CPU.

    The variance of the activations comes from sums of squares about the first batch's mean, for precision; the
    vectors that this needs are one `[d_in]` in fp32 per sequence.
    """

    def __init__(self) -> None:
        # No tensors: small ones, made between large ones that are freed, keep the C library's heap from shrinking.
        self._values: dict[str, array[float]] = {}
        self._shifted: list[Tensor] = []
        self._origin: Tensor | None = None
        self.fired: Tensor | None = None
        """`[d_sae]`: which features fire at least once."""

    def add(self, name: str, values: Tensor, sequence: Tensor, n_sequences: int) -> None:
        """Add up one value per token.

        Args:
            values: `[tokens]`.
            sequence: which of the chunk's sequences each token belongs to, `[tokens]`, from 0.
            n_sequences: sequences in the chunk.
        """
        wide = accumulation_dtype(values.device)
        sums = torch.zeros(n_sequences, dtype=wide, device=values.device)
        sums.index_add_(0, sequence.to(values.device), values.to(wide))
        self._values.setdefault(name, array("d")).extend(sums.cpu().tolist())

    def add_sae(
        self, sae_in: Tensor, feature_acts: Tensor, sae_out: Tensor, sequence: Tensor, n_sequences: int
    ) -> None:
        """Add what depends on the SAE's place alone: `[tokens, d_in]`, `[tokens, d_sae]`, `[tokens, d_in]`."""
        wide = accumulation_dtype(sae_in.device)
        sae_in, sae_out = sae_in.to(wide), sae_out.to(wide)
        if self._origin is None:
            self._origin = sae_in.mean(0)
        centred = sae_in - self._origin
        shifted = centred.new_zeros(n_sequences, centred.shape[1]).index_add_(0, sequence.to(centred.device), centred)
        self._shifted.append(shifted.float().cpu())
        active = feature_acts.bool()
        active = active.to_dense() if active.is_sparse else active
        self.fired = active.any(0) if self.fired is None else self.fired | active.any(0)
        for name, values in {
            "n_tokens": centred.new_ones(len(centred)),
            "squares": centred.pow(2).sum(1),
            "error": (sae_out - sae_in).pow(2).sum(1),
            "active": active.sum(1),
        }.items():
            self.add(name, values, sequence, n_sequences)

    @property
    def names(self) -> tuple[str, ...]:
        """Of what has been added."""
        return tuple(self._values)

    def total(self, name: str) -> Tensor:
        """`[n_sequences]` of everything measured."""
        return torch.tensor(self._values.get(name, []), dtype=torch.float64)

    @property
    def n_sequences(self) -> int:
        return len(self.total("n_tokens"))

    @shape_checked
    def means(self, weights: Tensor | None = None, downstream_hooks: Sequence[str] = ()) -> dict[str, Tensor]:
        """Every mean by name, over all sequences or over resamples of them.

        Args:
            weights: `[n_resamples, n_sequences]`, see `bootstrap_weights`; None for each sequence once.
            downstream_hooks: hooks of the means named `downstream_mse/<hook>`.

        Returns:
            Scalars, or `[n_resamples]`, in fp64.
        """
        if weights is None:
            weights = torch.ones(1, self.n_sequences, dtype=torch.float64)
            return {name: value[0] for name, value in self.means(weights, downstream_hooks).items()}
        total = {name: weights @ self.total(name) for name in self._values}
        n, n_predicted = total["n_tokens"], total["n_predicted"]
        mean = (weights @ torch.cat(self._shifted).double()).pow(2).sum(1) / n
        variance = total["squares"] - mean
        result = {
            "ce_loss_without_sae": total["ce_clean"] / n_predicted,
            "ce_loss_with_sae": total["ce_spliced"] / n_predicted,
            "ce_loss_increase": (total["ce_spliced"] - total["ce_clean"]) / n_predicted,
            "kl": total["kl"] / n,
            "l0": total["active"] / n,
            "mse": total["error"] / n,
            "explained_variance": torch.where(
                variance > 0, 1 - total["error"] / variance, torch.full_like(n, float("nan"))
            ),
        }
        return result | {f"downstream_mse/{hook}": total[f"downstream/{hook}"] / n for hook in downstream_hooks}
