"""What a joint replacement costs the model: as SAEs are added one after the other, and each of them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.evaluation.estimate import Estimate
from e2e_sae_plugin.evaluation.metrics import add_outputs
from e2e_sae_plugin.evaluation.sums import SequenceSums, bootstrap_weights, interval
from e2e_sae_plugin.joint.splice import JointMicroBatch, JointSplice
from e2e_sae_plugin.joint.spliced_sae import FrozenSAE
from e2e_sae_plugin.report.table import Table
from e2e_sae_plugin.spliced_losses import sequence_of
from e2e_sae_plugin.torch_state import own_torch_state


@dataclass(frozen=True)
class JointRow:
    """One SAE of a joint replacement, in the model's order."""

    name: str
    hook_name: str
    l0: Estimate
    """Active features per token, with all SAEs in the pass."""
    l0_so_far: float
    """The sum of `l0` of the SAEs up to this one: the last row has the total."""
    ce_loss_increase: Estimate
    """In nats per token, with the SAEs up to this one in the pass."""
    kl: Estimate
    """`D_KL(y || y_hat)` in nats per token, with the SAEs up to this one."""
    ce_loss_increase_alone: Estimate
    """With this SAE alone in the pass."""


@dataclass(frozen=True)
class JointEvaluation:
    """What `evaluate_joint` found; intervals are of 95 %, by a bootstrap over sequences."""

    rows: tuple[JointRow, ...]
    ce_loss_without_sae: float
    """Cross-entropy of the clean model, in nats per token."""
    n_tokens: int

    @property
    def ce_loss_increase(self) -> Estimate:
        """Of all SAEs together."""
        return self.rows[-1].ce_loss_increase

    @property
    def l0(self) -> float:
        """Active features per token, of all SAEs together."""
        return self.rows[-1].l0_so_far

    def table(self) -> Table:
        """One row per SAE."""
        columns = ("SAE", "hook", "L0", "L0 so far", "CE loss increase so far", "KL so far", "CE loss increase alone")
        rows = tuple(
            (
                each.name,
                each.hook_name,
                each.l0,
                each.l0_so_far,
                each.ce_loss_increase,
                each.kl,
                each.ce_loss_increase_alone,
            )
            for each in self.rows
        )
        caption = (
            f"On {self.n_tokens:,} tokens, where the clean model's cross-entropy is {self.ce_loss_without_sae:.4f} nats. "
            '"So far": with the SAEs up to this row in the pass, each reading what the ones before it wrote.'
        )
        counts, losses = dict.fromkeys(columns[2:4], "{:.1f}"), dict.fromkeys(columns[4:], "{:+.4f}")
        return Table("joint", "SAEs spliced together", caption, columns, rows, {**counts, **losses})

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.table().to_markdown()

    def to_log(self) -> dict[str, float]:
        """Under the names that go to the log; `<name>/` for what is one SAE's."""
        last = self.rows[-1]
        own = {f"{row.name}/metrics/held_out_l0": row.l0.value for row in self.rows}
        own |= {f"{row.name}/metrics/ce_loss_increase": row.ce_loss_increase_alone.value for row in self.rows}
        return {
            "metrics/ce_loss_increase": last.ce_loss_increase.value,
            "metrics/ce_loss_without_sae": self.ce_loss_without_sae,
            "metrics/ce_loss_with_sae": self.ce_loss_without_sae + last.ce_loss_increase.value,
            "metrics/held_out_kl": last.kl.value,
            "metrics/held_out_l0": last.l0_so_far,
            **own,
        }


@own_torch_state()
@torch.no_grad()
@shape_checked
def measure_joint(
    splice: JointSplice,
    saes: Mapping[str, FrozenSAE],
    tokens: Int[Tensor, "prompts pos"],
    *,
    batch_size_prompts: int = 8,
    seqpos_slice: Sequence[int | None] = (None,),
    excluded: Tensor | None = None,
) -> JointEvaluation:
    """Measure on `tokens [n_prompts, pos]`: one clean pass, and `2 n - 1` spliced ones for `n` SAEs.

    Args:
        splice: the places.
        saes: the SAE at each.
        batch_size_prompts: sequences that go through the model at once.
        seqpos_slice: positions that the SAEs are applied to.
        excluded: token ids that they are not applied to.

    Raises:
        ValueError: there is no token to measure.
    """
    names = list(splice.places)
    sums = {
        key: SequenceSums() for key in [*(f"to {name}" for name in names), *(f"alone {name}" for name in names[1:])]
    }
    for chunk in tokens.split(batch_size_prompts):
        micro = splice.clean(chunk, downstream=False, seqpos_slice=seqpos_slice, excluded=excluded)
        if not micro.n_tokens:
            continue
        for number, name in enumerate(names):
            _add(sums[f"to {name}"], splice, micro, {key: saes[key] for key in names[: number + 1]})
            if number:
                _add(sums[f"alone {name}"], splice, micro, {name: saes[name]})
    whole = sums[f"to {names[-1]}"]
    if not whole.names or not float(whole.total("n_predicted").sum()):
        raise ValueError("There is no token to measure: every one is excluded or outside seqpos_slice.")
    rows, so_far = [], 0.0
    weights = bootstrap_weights(len(whole.total("n_predicted")))
    for number, name in enumerate(names):
        added, alone = sums[f"to {name}"], sums[f"alone {name}" if number else f"to {name}"]
        l0 = _ratio(whole, f"active {name}", "n_tokens", weights)
        so_far += l0.value
        rows.append(
            JointRow(
                name=name,
                hook_name=splice.places[name].model.position.hook_name,
                l0=l0,
                l0_so_far=so_far,
                ce_loss_increase=_ratio(added, "ce_increase", "n_predicted", weights),
                kl=_ratio(added, "kl", "n_tokens", weights),
                ce_loss_increase_alone=_ratio(alone, "ce_increase", "n_predicted", weights),
            )
        )
    clean = float(whole.total("ce_clean").sum() / whole.total("n_predicted").sum())
    return JointEvaluation(tuple(rows), clean, int(whole.total("n_tokens").sum()))


def _add(sums: SequenceSums, splice: JointSplice, micro: JointMicroBatch, saes: Mapping[str, FrozenSAE]) -> None:
    """One spliced pass over a chunk."""
    output = splice.run(micro, saes)
    first = micro.places[next(name for name in splice.places if name in saes)]
    sequence, n = sequence_of(first), len(first.tokens)
    add_outputs(sums, splice.first, first, output.spliced, sequence)
    sums.add("n_tokens", torch.ones(len(sequence)), sequence.cpu(), n)
    for name, sae in saes.items():
        assert sae.n_active is not None
        sums.add(f"active {name}", sae.n_active, sequence, n)


def _ratio(sums: SequenceSums, name: str, over: str, weights: Tensor) -> Estimate:
    """A mean with its interval over resampled sequences."""
    values = sums.total("ce_spliced") - sums.total("ce_clean") if name == "ce_increase" else sums.total(name)
    count = sums.total(over)
    low, high = interval((weights @ values) / (weights @ count).clamp_min(1))
    return Estimate(float(values.sum() / count.sum()), low, high)
