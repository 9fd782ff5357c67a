"""What an evaluation finds: every number of it, with intervals, as an object that JSON can hold."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE, TrainingSAE
from torch import Tensor

from e2e_sae_plugin.evaluation.estimate import Estimate, rarest_seen
from e2e_sae_plugin.evaluation.tokens import MeasuredTokens

LABELS = {
    "ce_loss_increase": ("CE loss increase", "{:+.4f}"),
    "ce_loss_with_sae": ("CE loss with the SAE", "{:.4f}"),
    "ce_loss_recovered_zero": ("CE loss recovered (zero ablation)", "{:.4f}"),
    "ce_loss_recovered_mean": ("CE loss recovered (mean ablation)", "{:.4f}"),
    "kl": ("KL to the clean model", "{:.4f}"),
    "top1_agreement": ("top-1 agreement", "{:.4f}"),
    "statistical_distance": ("statistical distance", "{:.4f}"),
    "l0": ("L0", "{:.2f}"),
    "explained_variance": ("explained variance (ratio of means)", "{:.4f}"),
    "explained_variance_per_token": ("explained variance (mean of ratios)", "{:.4f}"),
    "mse": ("MSE at the SAE", "{:.4g}"),
    "l2_ratio_position_0": ("L2 ratio at position 0", "{:.3f}"),
    "l2_ratio_later": ("L2 ratio at later positions", "{:.3f}"),
}
"""What tables call a metric, and its format."""


@dataclass(frozen=True)
class LayerMetrics:
    """How near the spliced model is to the clean one at one hook."""

    mse: Estimate
    """`||a_hat - a||^2`, summed over dimensions, mean over tokens."""
    explained_variance: Estimate
    """1 - mean squared error / mean squared distance from the mean activation (SAELens's `explained_variance`)."""
    explained_variance_per_token: Estimate
    """Mean over tokens of 1 - squared error / squared distance from the mean (SAELens's `explained_variance_legacy`; the
    paper's figure 12)."""
    layernorm_explained_variance: Estimate
    """`explained_variance` of the activations after LayerNorm without gain and bias."""
    layernorm_explained_variance_per_token: Estimate


@dataclass(frozen=True)
class Evaluation:
    """One SAE on a set of tokens. Means are over the tokens that it is applied to; intervals are bootstrap intervals over
    sequences (percentiles, 95 % unless `evaluate_many` was told otherwise), around one and the same mean activation.

    `str()` of it is a table.
    """

    name: str
    hook_name: str
    architecture: str
    d_in: int
    d_sae: int
    n_tokens: int
    n_sequences: int
    metrics: dict[str, Estimate | None]
    """By name (`LABELS`); also `ce_loss_without_sae`, `ce_loss_zero_ablation` and `ce_loss_mean_ablation`. None where there
    is no such number: no token at position 0, ablations that were not run or that change nothing."""
    layers: dict[str, LayerMetrics]
    """By hook: the SAE's own, then each later one."""
    l0_counts: Tensor
    """How many tokens have 0, 1, 2, ... active features."""
    density: Tensor
    """Share of the tokens that each feature fires on, `[d_sae]`, fp64."""
    alive_curve: tuple[tuple[int, int], ...]
    """(tokens seen, features that have fired by then), to the end."""
    resamples: dict[str, Tensor]
    """`ce_loss_increase`, `l0`, and `mse/<hook>` for each later hook, over the bootstrap's resamples of the sequences: the
    same resamples for all SAEs that are measured on the same number of sequences with the same seed, so that differences
    and ratios between SAEs get paired intervals."""
    warnings: tuple[str, ...] = ()
    weights_sha256: str | None = None
    """`weights_sha256` of the SAE that was measured; None in files of before it was noted."""
    text: str | None = None
    """What the tokens are of, as its reader will know it: the name of a dataset. None: nobody said."""
    model: str | None = None
    """The language model; None for one without a name, and in files of before it was noted."""
    measured_on: MeasuredTokens | None = None
    """The tokens; None in files of before it was noted."""

    @property
    def rarest_seen(self) -> float:
        """Density that a feature which does not fire on these tokens is below, with 95% confidence."""
        return rarest_seen(self.n_tokens)

    @property
    def n_alive(self) -> int:
        """Features that fire at least once on these tokens."""
        return int((self.density > 0).sum())

    @property
    def alive(self) -> Tensor:
        """`[d_sae]`, whether each feature fires at least once."""
        return self.density > 0

    def value(self, name: str) -> float:
        """The point estimate of a metric; nan where there is none."""
        estimate = self.metrics.get(name)
        return float("nan") if estimate is None else estimate.value

    def l0_quantiles(self, probabilities: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> dict[float, int]:
        """Smallest L0 that at least this share of the tokens does not exceed."""
        cumulative = self.l0_counts.cumsum(0).double() / self.l0_counts.sum()
        return {p: int((cumulative < p - 1e-12).sum()) for p in probabilities}

    def differences(self, other: Evaluation) -> list[str]:
        """Settings in which two evaluations differ, each with both values and how to make them equal; [] if their numbers
        can be compared. Of tokens that were not recorded, the clean model's CE loss tells whether they are the same.
        """
        found = [
            f"{name}: {getattr(self, name)} and {getattr(other, name)} ({flag})"
            for name, flag in (("model", "--model"), ("hook_name", "--hook"))
            if getattr(self, name) != getattr(other, name)
        ]
        if self.measured_on is not None and other.measured_on is not None:
            return found + self.measured_on.differences(other.measured_on)
        if not math.isclose(*(each.value("ce_loss_without_sae") for each in (self, other)), rel_tol=1e-6):
            found.append("the text, as the clean model's CE loss tells (--dataset, --tokens)")
        return found

    def downstream_mse(self) -> dict[str, Estimate]:
        """The error at each later hook."""
        return {hook: layer.mse for hook, layer in self.layers.items() if hook != self.hook_name}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ARG002
        """What a notebook shows."""
        printer.text(str(self))

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.architecture}, {self.d_in} x {self.d_sae} on {self.hook_name}"
            + (f" of {self.model}" if self.model else "")
            + f"; {self.n_tokens:,} tokens in {self.n_sequences:,} sequences"
            + (f" of {self.text}" if self.text else "")
        ]
        if self.measured_on is not None and str(self.measured_on) not in ("", self.text):
            lines.append(f"  {'tokens':<36} {self.measured_on}")
        for name, (label, form) in LABELS.items():
            estimate = self.metrics.get(name)
            if estimate is not None:
                value, low, high = (form.format(x) for x in (estimate.value, estimate.low, estimate.high))
                lines.append(f"  {label:<36} {value:>10}  [{low}, {high}]")
        low, middle, high = self.l0_quantiles((0.05, 0.5, 0.95)).values()
        lines.append(f"  {'L0: 5 %, median, 95 % of tokens':<36} {low}, {middle}, {high}")
        lines.append(f"  {'alive features':<36} {self.n_alive:>10,}  of {self.d_sae:,}{self._others()}")
        for hook, layer in self.layers.items():
            lines.append(
                f"  {hook:<36} MSE {layer.mse.value:.4g}, explained variance {layer.explained_variance.value:.4f} "
                f"({layer.layernorm_explained_variance.value:.4f} after LayerNorm)"
            )
        return "\n".join(lines + [f"  Warning: {text}" for text in self.warnings])

    def _others(self) -> str:
        """What is known of features that do not fire here."""
        if self.n_alive == self.d_sae:
            return ""
        return f" (the others fire on fewer than 1 in {1 / self.rarest_seen:,.0f} tokens, 95%)"

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready; `from_dict` reads it back."""
        return {
            **{
                name: getattr(self, name)
                for name in ("name", "hook_name", "architecture", "d_in", "d_sae", "n_tokens", "n_sequences")
            },
            "n_alive": self.n_alive,
            "metrics": {name: None if value is None else value.to_dict() for name, value in self.metrics.items()},
            "layers": {
                hook: {name: estimate.to_dict() for name, estimate in vars(layer).items()}
                for hook, layer in self.layers.items()
            },
            "l0_counts": self.l0_counts.tolist(),
            "density": self.density.tolist(),
            "alive_curve": [list(point) for point in self.alive_curve],
            "resamples": {
                name: [float(f"{x:.9g}") for x in values.tolist()] for name, values in self.resamples.items()
            },
            "warnings": list(self.warnings),
            "weights_sha256": self.weights_sha256,
            "text": self.text,
            "model": self.model,
            "measured_on": None if self.measured_on is None else self.measured_on.to_dict(),
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` gave; what it says of weights, text, model and tokens may be missing."""
        entries = {name: value for name, value in entries.items() if name != "n_alive"}
        measured_on = entries.get("measured_on")
        return cls(
            **{
                **entries,
                "metrics": {n: None if v is None else Estimate.from_dict(v) for n, v in entries["metrics"].items()},
                "layers": {
                    hook: LayerMetrics(**{name: Estimate.from_dict(value) for name, value in layer.items()})
                    for hook, layer in entries["layers"].items()
                },
                "l0_counts": torch.tensor(entries["l0_counts"]),
                "density": torch.tensor(entries["density"], dtype=torch.float64),
                "alive_curve": tuple((n, alive) for n, alive in entries["alive_curve"]),
                "resamples": {n: torch.tensor(v, dtype=torch.float64) for n, v in entries["resamples"].items()},
                "warnings": tuple(entries["warnings"]),
                "measured_on": None if measured_on is None else MeasuredTokens.from_dict(measured_on),
            }
        )

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))


@torch.no_grad()
def weights_sha256(sae: SAE[Any]) -> str:
    """SHA-256 over the names, shapes and values, in fp32, of all weights of an SAE in inference form.

    A training SAE has the digest of the inference SAE that SAELens exports of it, and an SAE in bfloat16 or float16 that of
    itself in float32. Unlike `checkpoint.identity.fingerprint`, which takes a sample, it sees that one feature was changed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_inference_weights(sae).items()):
        value = tensor.float() if tensor.is_floating_point() else tensor
        flat = value.detach().reshape(-1).contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _inference_weights(sae: SAE[Any]) -> dict[str, Tensor]:
    weights = sae.state_dict()
    if isinstance(sae, TrainingSAE):
        weights = {name: value.detach().clone() for name, value in weights.items()}  # may be changed in place
        sae.process_state_dict_for_saving_inference(weights)
    return weights
