"""What is added up while SAEs are evaluated, and the estimates that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens.saes.sae import SAE
from torch import Tensor

from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.result import Evaluation, LayerMetrics
from e2e_sae_plugin.evaluation.sums import SequenceSums, bootstrap_weights, interval
from e2e_sae_plugin.precision import accumulation_dtype

CURVE_POINTS = 40
RESAMPLES_AT_ONCE = 100
MIN_SEQUENCES = 10
SMALLEST_NORM = 1e-4  # SAELens's: a ratio to a smaller norm says nothing
SMALLEST_VARIANCE = 1e-10  # of activations that do not vary at all, as in SAELens
KINDS = ("", "layernorm_")
ESTIMATED_NORMALISATIONS = ("expected_average_only_in", "covariance_whitening")


def layer_norm(activations: Tensor) -> Tensor:
    """LayerNorm without gain and bias, `[tokens, d]`."""
    return F.layer_norm(activations, activations.shape[-1:])


def explained_share(error: Tensor, variance: Tensor) -> Tensor:
    """`1 - error / variance`; as in SAELens, of what does not vary 1 where it is met and 0 elsewhere."""
    met = (error < SMALLEST_VARIANCE).to(error.dtype)
    return torch.where(variance < SMALLEST_VARIANCE, met, 1 - error / variance.clamp_min(SMALLEST_VARIANCE))


class RunningMeans:
    """Mean activation by hook, as it is and after LayerNorm."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._sums: dict[str, Tensor] = {}
        self._normalised: dict[str, Tensor] = {}

    def add(self, activations: dict[str, Tensor]) -> None:
        """`[tokens, d]` by hook."""
        for hook, value in activations.items():
            for sums, x in ((self._sums, value), (self._normalised, layer_norm(value))):
                total = x.sum(0, dtype=accumulation_dtype(x.device))
                sums[hook] = total if hook not in sums else sums[hook] + total
        self.n_tokens += len(next(iter(activations.values())))

    def __getitem__(self, hook: str) -> Tensor:
        return (self._sums[hook] / self.n_tokens).float()

    @property
    def normalised(self) -> dict[str, Tensor]:
        """By hook, after LayerNorm."""
        return {hook: (total / self.n_tokens).float() for hook, total in self._normalised.items()}


class SAESums:
    """Everything about one SAE, by sequence where it becomes a mean."""

    def __init__(self, d_sae: int):
        self.sums = SequenceSums()
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        self.l0_counts = torch.zeros(d_sae + 1, dtype=torch.int64)
        self.curve: list[tuple[int, int]] = []
        self.n_tokens = 0

    def add_features(self, feature_acts: Tensor, sequence: Tensor, n: int) -> None:
        """`feature_acts [tokens, d_sae]`."""
        active = feature_acts.bool()
        active = active.to_dense() if active.is_sparse else active
        l0 = active.sum(1)
        self.fired += active.sum(0).cpu()
        self.l0_counts += torch.bincount(l0, minlength=len(self.l0_counts)).cpu()
        self.sums.add("l0", l0, sequence, n)
        self.n_tokens += len(active)
        self.curve.append((self.n_tokens, int((self.fired > 0).sum())))

    def add_norms(self, sae_in: Tensor, sae_out: Tensor, position: Tensor, sequence: Tensor, n: int) -> None:
        """Both `[tokens, d_in]`."""
        norm_in, norm_out = sae_in.float().norm(dim=1), sae_out.to(sae_in.device).float().norm(dim=1)
        ratio = norm_out / torch.where(norm_in < SMALLEST_NORM, torch.ones_like(norm_in), norm_in)
        first = position.to(ratio.device) == 0
        for name, chosen in (("position_0", first), ("later", ~first)):
            self.sums.add(f"l2_ratio_{name}", ratio * chosen, sequence, n)
            self.sums.add(f"n_{name}", chosen, sequence, n)

    def add_layer(
        self, hook: str, clean: Tensor, changed: Tensor, means: RunningMeans, sequence: Tensor, n: int
    ) -> None:
        """`[tokens, d]` in fp32 at one hook, clean and spliced."""
        pairs = ((clean, changed, means[hook]), (layer_norm(clean), layer_norm(changed), means.normalised[hook]))
        for kind, (x, x_hat, mean) in zip(KINDS, pairs, strict=True):
            error, variance = (x_hat - x).pow(2).sum(1), (x - mean).pow(2).sum(1)
            self.sums.add(f"{kind}error/{hook}", error, sequence, n)
            self.sums.add(f"{kind}ratio/{hook}", explained_share(error, variance), sequence, n)

    # The result.

    def result(
        self,
        name: str,
        sae: SAE[Any],
        *,
        hook_name: str,
        shared: SequenceSums,
        means: RunningMeans,
        ablations: bool,
        n_resamples: int,
        confidence: float,
        seed: int,
    ) -> Evaluation:
        """The evaluation of `sae`, whose sums these are."""
        estimates = _Estimates(self.sums, shared, n_resamples, confidence, seed)
        density = self.fired.double() / self.n_tokens
        warnings: list[str] = []
        if not bool((density > 0).any()):
            warnings.append(f"No feature of {name} fires on these {self.n_tokens:,} tokens.")
        if estimates.n_sequences < MIN_SEQUENCES:
            warnings.append(
                f"The intervals come from so few sequences ({estimates.n_sequences}) that they mean little."
            )
        if sae.cfg.normalize_activations in ESTIMATED_NORMALISATIONS:
            warnings.append(
                f"{name} was trained on scaled activations (normalize_activations={sae.cfg.normalize_activations!r}) and "
                "says that the scale is not folded into its weights. It is measured as SAELens runs it, without the scale."
            )
        hooks = [hook_name, *(hook for hook in means.normalised if hook != hook_name)]
        return Evaluation(
            name=name,
            hook_name=hook_name,
            architecture=sae.cfg.architecture(),
            d_in=sae.cfg.d_in,
            d_sae=sae.cfg.d_sae,
            n_tokens=self.n_tokens,
            n_sequences=estimates.n_sequences,
            metrics=estimates.metrics(ablations, hook_name),
            layers={hook: estimates.layer(hook) for hook in hooks},
            l0_counts=self.l0_counts[: int(self.l0_counts.nonzero().max()) + 1],
            density=density,
            alive_curve=_thinned(self.curve),
            resamples=estimates.resamples(hooks[1:]),
            warnings=tuple(warnings),
        )


class _Estimates:
    """Ratios of sums with bootstrap intervals over sequences."""

    def __init__(self, own: SequenceSums, shared: SequenceSums, n_resamples: int, confidence: float, seed: int):
        self.own, self.shared, self.confidence = own, shared, confidence
        measured = shared.total("n_tokens") > 0  # the same sequences whatever the batches
        self.n_sequences = n = int(measured.sum())
        sizes = [min(RESAMPLES_AT_ONCE, n_resamples - i) for i in range(0, n_resamples, RESAMPLES_AT_ONCE)]
        # Drawn a few at a time: together they are [n_resamples, n_sequences].
        draws = [(seed * 1_000_003 + i, size) for i, size in enumerate(sizes)]
        names = [("own", name) for name in own.names] + [("shared", name) for name in shared.names]
        columns = torch.stack([getattr(self, which).total(name) for which, name in names], 1)[measured]
        rows = [columns.sum(0, keepdim=True)]
        rows += [bootstrap_weights(n, size, draw) @ columns for draw, size in draws]
        sums = torch.cat(rows)
        # Of a few sequences, a resample may have no token that predicts another: nothing is known of it.
        sums = sums[sums[:, names.index(("shared", "n_predicted"))] > 0]
        self._sums = dict(zip(names, sums.unbind(1), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        """`[1 + n_resamples]`: over all sequences, and over each resample."""
        return self._sums["own", name] if ("own", name) in self._sums else self._sums["shared", name]

    def estimate(self, values: Tensor) -> Estimate | None:
        """None where the value is not a number; resamples in which it is not are left out."""
        if not bool(torch.isfinite(values[0])):
            return None
        resampled = values[1:][torch.isfinite(values[1:])]
        low, high = interval(resampled, self.confidence) if len(resampled) else (float(values[0]),) * 2
        return Estimate(float(values[0]), low, high)

    def metrics(self, ablations: bool, hook: str) -> dict[str, Estimate | None]:
        n, predicted = self["n_tokens"], self["n_predicted"]
        clean, spliced = self["ce_clean"] / predicted, self["ce"] / predicted
        values = {
            "ce_loss_without_sae": clean,
            "ce_loss_with_sae": spliced,
            "ce_loss_increase": spliced - clean,
            **{name: self[name] / n for name in ("kl", "top1_agreement", "statistical_distance", "l0")},
            "mse": self[f"error/{hook}"] / n,
            "explained_variance": self.explained_variance("", hook),
            "explained_variance_per_token": self[f"ratio/{hook}"] / n,
            **{
                f"l2_ratio_{where}": self[f"l2_ratio_{where}"] / self[f"n_{where}"] for where in ("position_0", "later")
            },
        }
        for name in ("zero", "mean") if ablations else ():
            ablated = self[f"ce_{name}_ablation"] / predicted
            values[f"ce_loss_{name}_ablation"] = ablated
            values[f"ce_loss_recovered_{name}"] = (ablated - spliced) / (ablated - clean)
        return {name: self.estimate(value) for name, value in values.items()}

    def resamples(self, later_hooks: Sequence[str]) -> dict[str, Tensor]:
        increase = (self["ce"] - self["ce_clean"]) / self["n_predicted"]
        errors = {f"mse/{hook}": self[f"error/{hook}"] / self["n_tokens"] for hook in later_hooks}
        return {
            n: v[1:] for n, v in {"ce_loss_increase": increase, "l0": self["l0"] / self["n_tokens"], **errors}.items()
        }

    def explained_variance(self, kind: str, hook: str) -> Tensor:
        n = self["n_tokens"]
        return explained_share(self[f"{kind}error/{hook}"] / n, self[f"{kind}variance/{hook}"] / n)

    def layer(self, hook: str) -> LayerMetrics:
        n = self["n_tokens"]
        values = {"mse": self[f"error/{hook}"] / n}
        for kind in KINDS:
            values[f"{kind}explained_variance"] = self.explained_variance(kind, hook)
            values[f"{kind}explained_variance_per_token"] = self[f"{kind}ratio/{hook}"] / n
        found = {name: self.estimate(value) for name, value in values.items()}
        not_finite = [name for name, value in found.items() if value is None]
        if not_finite:
            raise ValueError(
                f"{', '.join(not_finite)} at {hook!r} is not finite: the SAE's or the model's output is not."
            )
        return LayerMetrics(**{name: value for name, value in found.items() if value is not None})


def _thinned(curve: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """At most `CURVE_POINTS`, spread evenly over the logarithm of the tokens; the first and the last are kept."""
    if len(curve) <= CURVE_POINTS:
        return tuple(curve)
    chosen = torch.logspace(0, torch.tensor(len(curve)).log10().item(), CURVE_POINTS).round().long() - 1
    return tuple(curve[i] for i in sorted({0, len(curve) - 1, *chosen.clamp(0, len(curve) - 1).tolist()}))
