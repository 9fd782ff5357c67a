"""Which features still mean what they meant: the same directions, the same activations, the same top contexts.

Fine-tuning keeps every feature's index, so an explanation written for feature i (on Neuronpedia, say) can go on being used
where feature i is still the same one.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from e2e_sae_plugin.finetune.movement import Movement
from e2e_sae_plugin.precision import accumulation_dtype
from e2e_sae_plugin.splice.activations import select_sae_in, trained_tokens
from e2e_sae_plugin.splice.base import SplicedModel

CONTEXT_TOKENS = 64
"""A context is a window of so many positions of a sequence."""
TOP_CONTEXTS = 10
MIN_CONTEXTS = 20
"""Features that fire in fewer contexts than this, before and after, cannot be judged by them: half of ten contexts would be
a handful of tokens."""
SAME_DIRECTION = 0.9
SAME_ACTIVATIONS = 0.9
SAME_CONTEXTS = 0.5
CHUNK_ELEMENTS = 2**25

Encode = Callable[[Tensor], Tensor]
Verdict = Literal["same", "changed", "rare", "silent"]


@dataclass(frozen=True)
class LabelTransfer:
    """One value per feature, `[d_sae]` each."""

    decoder_cosine: Tensor
    encoder_cosine: Tensor | None
    correlation: Tensor
    """Of the feature's activations before and after, over the tokens; nan where one of them is constant."""
    shared_contexts: Tensor
    """Share of the contexts that activated it most before which do so after: of `TOP_CONTEXTS`, or of all where fewer do."""
    contexts_before: Tensor
    """Contexts in which it fires."""
    contexts_after: Tensor
    n_contexts: int

    @property
    def verdicts(self) -> list[Verdict]:
        """ "same": decoder (and encoder) cosine of 0.9 or more, correlation of 0.9 or more, half of the top contexts shared.
        "rare": the directions are the same, but it fires in fewer than `MIN_CONTEXTS` contexts; "silent": in none.
        "changed": all others."""
        direction = self.decoder_cosine >= SAME_DIRECTION
        if self.encoder_cosine is not None:
            direction &= self.encoder_cosine >= SAME_DIRECTION
        meaning = (self.correlation >= SAME_ACTIVATIONS) & (self.shared_contexts >= SAME_CONTEXTS)
        most = torch.maximum(self.contexts_before, self.contexts_after)
        values = zip(direction.tolist(), most.tolist(), meaning.tolist(), strict=True)
        return [_verdict(*each) for each in values]

    def counts(self) -> dict[str, int]:
        """Features by verdict."""
        verdicts = self.verdicts
        return {verdict: verdicts.count(verdict) for verdict in get_args(Verdict)}

    def write_csv(self, path: Path) -> None:
        """One line per feature."""
        columns: dict[str, Any] = {
            "verdict": self.verdicts,
            "decoder_cosine": self.decoder_cosine.tolist(),
            "encoder_cosine": [""] * len(self.correlation)
            if self.encoder_cosine is None
            else self.encoder_cosine.tolist(),
            "activation_correlation": self.correlation.tolist(),
            "shared_top_contexts": self.shared_contexts.tolist(),
            "contexts_before": self.contexts_before.tolist(),
            "contexts_after": self.contexts_after.tolist(),
        }
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["feature", *columns])
            for index, row in enumerate(zip(*columns.values(), strict=True)):
                writer.writerow([index, *(f"{value:.4f}" if isinstance(value, float) else value for value in row)])


def _verdict(has_same_direction: bool, n_contexts: int, has_same_meaning: bool) -> Verdict:
    if not has_same_direction:
        return "changed"
    if n_contexts == 0:
        return "silent"
    if n_contexts < MIN_CONTEXTS:
        return "rare"
    return "same" if has_same_meaning else "changed"


@torch.no_grad()
def label_transfer(
    before: Encode,
    after: Encode,
    moved: Movement,
    model: SplicedModel,
    tokens: Tensor,
    *,
    batch_size_prompts: int = 8,
    seqpos_slice: Sequence[int | None] = (None,),
    excluded: Tensor | None = None,
    head_index: int | None = None,
) -> LabelTransfer:
    """Compare what the features of two SAEs fire on, over `tokens [n_prompts, pos]`.

    Memory: `[d_sae, TOP_CONTEXTS]` twice and a chunk of activations, whatever the number of tokens.

    Args:
        before: the original SAE, see `evaluation.encode_with`.
        after: the fine-tuned one.
        moved: of the same two SAEs.
        model: the model with the SAEs' place in it.
        batch_size_prompts: sequences that go through the model at once.
        seqpos_slice: positions that the SAE is applied to.
        excluded: token ids that it is not applied to.
        head_index: the head that it is applied to.
    """
    d_sae, n_contexts = len(moved.decoder), 0
    sums, tops = _Moments(d_sae), (_TopContexts(d_sae), _TopContexts(d_sae))
    for chunk in tokens.split(batch_size_prompts):
        chunk = chunk.to(model.token_device)
        mask = trained_tokens(chunk, seqpos_slice, excluded)
        sae_in = select_sae_in(model.clean_pass(chunk, hidden=False, downstream=False).activation, mask, head_index)
        windows = -(-chunk.shape[1] // CONTEXT_TOKENS)
        context = torch.arange(chunk.shape[1], device=chunk.device) // CONTEXT_TOKENS
        context = context + windows * torch.arange(len(chunk), device=chunk.device)[:, None]
        context = context.flatten() if mask is None else context[mask]
        highest = [torch.zeros(len(chunk) * windows, d_sae, device=sae_in.device) for _ in tops]
        size = max(1, CHUNK_ELEMENTS // d_sae)
        for x, index in zip(sae_in.split(size), context.split(size), strict=True):
            acts = [_dense(encode(x)).to(sae_in.device, torch.float32) for encode in (before, after)]
            sums.add(*acts)
            for each, values in zip(highest, acts, strict=True):
                each.scatter_reduce_(0, index[:, None].expand_as(values), values.abs(), "amax")
        for top, each in zip(tops, highest, strict=True):
            top.add(each, n_contexts)
        n_contexts += len(chunk) * windows
    return LabelTransfer(
        decoder_cosine=moved.decoder,
        encoder_cosine=moved.encoder,
        correlation=sums.correlation().cpu(),
        shared_contexts=tops[0].shared_with(tops[1]).cpu(),
        contexts_before=tops[0].n_firing.cpu(),
        contexts_after=tops[1].n_firing.cpu(),
        n_contexts=n_contexts,
    )


def _dense(feature_acts: Tensor) -> Tensor:
    return feature_acts.to_dense() if feature_acts.is_sparse else feature_acts


class _Moments:
    """Sums for the correlation of two activations per feature, in fp64."""

    def __init__(self, d_sae: int):
        self.n = 0
        self.sums = torch.zeros(5, d_sae, dtype=torch.float64)

    def add(self, first: Tensor, second: Tensor) -> None:
        self.n += len(first)
        products = (first, second, first * first, second * second, first * second)
        self.sums += torch.stack([value.sum(0, dtype=accumulation_dtype(value.device)).cpu() for value in products])

    def correlation(self) -> Tensor:
        a, b, aa, bb, ab = self.sums / max(self.n, 1)
        variances = (aa - a * a).clamp(min=0) * (bb - b * b).clamp(min=0)
        return torch.where(variances > 0, (ab - a * b) / variances.sqrt(), torch.full_like(a, float("nan")))


class _TopContexts:
    """The contexts in which each feature's highest activation is greatest."""

    def __init__(self, d_sae: int):
        self.values = torch.zeros(TOP_CONTEXTS, d_sae)
        self.contexts = torch.full((TOP_CONTEXTS, d_sae), -1)
        self.n_firing = torch.zeros(d_sae, dtype=torch.int64)

    def add(self, highest: Tensor, first_context: int) -> None:
        """`highest [contexts, d_sae]` of the contexts from `first_context` on."""
        self.n_firing = self.n_firing.to(highest.device) + (highest > 0).sum(0)
        values = torch.cat([self.values.to(highest.device), highest])
        numbers = torch.arange(first_context, first_context + len(highest), device=highest.device)
        contexts = torch.cat([self.contexts.to(highest.device), numbers[:, None].expand_as(highest)])
        self.values, kept = values.topk(TOP_CONTEXTS, dim=0)
        self.contexts = contexts.gather(0, kept).where(self.values > 0, -1)

    def shared_with(self, other: _TopContexts) -> Tensor:
        own = self.contexts >= 0
        found = ((self.contexts[:, None] == other.contexts[None]).any(1) & own).sum(0)
        return found / own.sum(0).clamp(min=1)
