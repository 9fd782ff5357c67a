"""Before and after a fine-tune, on the same held-out tokens, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from e2e_sae_plugin.evaluation import SpliceMetrics
from e2e_sae_plugin.evaluation.estimate import rarest_seen
from e2e_sae_plugin.evaluation.sums import bootstrap_weights, interval
from e2e_sae_plugin.evaluation.tokens import MeasuredTokens
from e2e_sae_plugin.finetune.labels import MIN_CONTEXTS, LabelTransfer
from e2e_sae_plugin.finetune.movement import Movement

# name in `SequenceSums.means` -> (what the table calls it, format)
ROWS = {
    "ce_loss_increase": ("CE loss increase", "{:+.4f}"),
    "kl": ("KL", "{:.4f}"),
    "l0": ("L0", "{:.2f}"),
    "explained_variance": ("explained variance", "{:.4f}"),
}
MAX_L0_CHANGE = 0.05
MIN_SEQUENCES = 10


@dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tune has changed. `str()` of it is the table."""

    before: SpliceMetrics
    after: SpliceMetrics
    movement: Movement
    labels: LabelTransfer
    training_tokens: int
    d_sae: int
    measured_on: MeasuredTokens | None = None
    """The held-out tokens; compare it with an `Evaluation`'s before comparing numbers."""

    def estimates(self) -> dict[str, dict[str, dict[str, float]]]:
        """Row -> "before", "after" and "change" -> value, and the 95 % interval of a bootstrap over sequences, paired
        for the change. The row `gap_closed` is the share of the CE loss increase that is gone (a "change"); it is left out
        where that interval of the increase includes 0."""
        weights = bootstrap_weights(self.before.sums.n_sequences)
        means = [metrics.sums.means() for metrics in (self.before, self.after)]
        resampled = [metrics.sums.means(weights) for metrics in (self.before, self.after)]
        result: dict[str, dict[str, dict[str, float]]] = {}
        for name in ROWS:
            values = {
                "before": (means[0][name], resampled[0][name]),
                "after": (means[1][name], resampled[1][name]),
                "change": (means[1][name] - means[0][name], resampled[1][name] - resampled[0][name]),
            }
            result[name] = {when: _estimate(float(value), samples) for when, (value, samples) in values.items()}
        if result["ce_loss_increase"]["before"]["low"] > 0:  # else there is no gap to speak of
            increase = [each["ce_loss_increase"] for each in (*means, *resampled)]
            closed = _estimate(float(1 - increase[1] / increase[0]), 1 - increase[3] / increase[2])
            result["gap_closed"] = {"change": closed}
        return result

    def warnings(self) -> list[str]:
        """What a user should not overlook."""
        found: list[str] = []
        estimates = self.estimates()
        for name in ("ce_loss_increase", "kl"):
            if estimates[name]["change"]["low"] > 0:
                found.append(f"The {ROWS[name][0]} has grown: lower lr, or train on more tokens, or on other text.")
        if self.before.sums.n_sequences < MIN_SEQUENCES:
            found.append(
                f"The intervals come from {self.before.sums.n_sequences} sequences alone and mean little: hold out more "
                "tokens (evaluation_tokens, --evaluation-tokens)."
            )
        change = self.after.l0 / self.before.l0 - 1 if self.before.l0 else 0.0
        if abs(change) > MAX_L0_CHANGE:
            found.append(
                f"L0 has changed by {change:+.1%}, so before and after are not equally sparse: give the sparsity "
                "coefficient that the SAE was trained with, or a smaller lr."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single features, JSON-ready."""
        return {
            "training_tokens": self.training_tokens,
            "evaluation_tokens": self.before.n_tokens,
            "evaluation_sequences": self.before.sums.n_sequences,
            "measured_on": None if self.measured_on is None else self.measured_on.to_dict(),
            "ce_loss_without_sae": self.before.ce_loss_without_sae,
            "estimates": self.estimates(),
            "dead_features": {"before": self.d_sae - self.before.n_alive, "after": self.d_sae - self.after.n_alive},
            "cosines": self.movement.summary(),
            "labels": {**self.labels.counts(), "n_contexts": self.labels.n_contexts},
            "warnings": self.warnings(),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """(what, before, after, change) as text; intervals in brackets."""
        estimates = self.estimates()
        rows: list[tuple[str, ...]] = []
        for name, (label, form) in ROWS.items():
            estimate = estimates[name]
            change = "{:+.4f}" if name != "l0" else "{:+.2f}"
            cells = [_cell(estimate[when], f) for when, f in (("before", form), ("after", form), ("change", change))]
            rows.append((label, *cells))
            if name == "ce_loss_increase":
                closed = "none to close"
                if "gap_closed" in estimates:
                    closed = _cell(estimates["gap_closed"]["change"], "{:.1%}")
                rows.append(("share of the gap closed", "", "", closed))
        dead = [self.d_sae - metrics.n_alive for metrics in (self.before, self.after)]
        rows.append(("features not firing", *(f"{n:,}" for n in dead), f"{dead[1] - dead[0]:+,}"))
        return rows

    def __str__(self) -> str:
        head = ("", "before", "after", "change")
        rows = self.rows()
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(4)]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
        ]
        return "\n".join([line.rstrip() for line in [*lines[:1], "-" * len(lines[0]), *lines[1:]]] + self._below())

    def to_markdown(self) -> str:
        """The table and what is below it, for a README or a model card."""
        lines = ["| " + " | ".join(row) + " |" for row in [("measure", "before", "after", "change"), *self.rows()]]
        return "\n".join([lines[0], "| --- | --- | --- | --- |", *lines[1:], "", *self._below()]) + "\n"

    _repr_markdown_ = to_markdown  # what a notebook shows

    def _below(self) -> list[str]:
        of = f" ({self.measured_on})" if self.measured_on is not None and str(self.measured_on) else ""
        lines = [
            f"On {self.before.n_tokens:,} held-out tokens in {self.before.sums.n_sequences:,} sequences{of}, clean CE "
            f"{self.before.ce_loss_without_sae:.4f}, after {self.training_tokens:,} training tokens; in brackets, 95 % "
            "intervals of a bootstrap over sequences. A feature that does not fire on them fires on fewer than 1 in "
            f"{1 / rarest_seen(self.before.n_tokens):,.0f} tokens (95 %)."
        ]
        for name, cosines in self.movement.summary().items():
            values = ", ".join(f"{label} {value:.4f}" for label, value in cosines.items())
            lines.append(f"Cosine of {name} directions before and after: {values}.")
        counts = self.labels.counts()
        lines.append(
            f"Features: {counts['same']:,} mean the same (their explanations can be reused), {counts['changed']:,} have "
            f"changed, {counts['rare']:,} fire in fewer than {MIN_CONTEXTS} contexts of these tokens, too few to tell, and "
            f"{counts['silent']:,} not at all, but both point the same way."
        )
        return [*lines, *(f"Warning: {text}" for text in self.warnings())]


def _estimate(value: float, resampled: Any) -> dict[str, float]:
    low, high = interval(resampled)
    return {"value": value, "low": low, "high": high}


def _cell(estimate: dict[str, float], form: str) -> str:
    return f"{form.format(estimate['value'])} [{form.format(estimate['low'])}, {form.format(estimate['high'])}]"
