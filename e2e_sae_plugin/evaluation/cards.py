"""What each of a few features fires on and what it writes: the content of their `FeatureCard`s, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.evaluation.estimate import share_interval
from e2e_sae_plugin.evaluation.feature_card import ActivatingContext, FeatureCard
from e2e_sae_plugin.evaluation.importance import FeatureImportance
from e2e_sae_plugin.evaluation.metrics import encode_with
from e2e_sae_plugin.evaluation.place import spliced_at_its_place
from e2e_sae_plugin.kernels.kl import chunk_tokens
from e2e_sae_plugin.splice import SplicedModel
from e2e_sae_plugin.spliced_losses import clean_micro_batch
from e2e_sae_plugin.torch_state import own_torch_state

Logits = tuple[tuple[str, float], ...]


@own_torch_state()
@torch.no_grad()
@shape_checked
def feature_cards(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "prompts pos"],
    features: Sequence[int],
    importance: FeatureImportance,
    *,
    tokenizer: Any,
    n_contexts: int = 5,
    window: tuple[int, int] = (16, 8),
    n_logits: int = 8,
    batch_size_prompts: int = 8,
    seqpos_slice: Sequence[int | None] = (None,),
    excluded: Tensor | None = None,
    head_index: int | None = None,
) -> list[FeatureCard]:
    """One card per feature, in the order of `features`.

    Contexts: the sequences of `tokens [n_prompts, pos]` with the feature's highest activation, by absolute value for SAEs
    with negative ones; one context per sequence, earlier sequences first where activations are equal. Logits: what the
    unembedding makes of the decoder direction at unit length, without the unembedding's bias and the final norm, less
    the mean over the vocabulary (the logit lens). There are none where the SAE's output is not as wide as the residual
    stream, or has heads. They say little about an SAE inside a block that is as wide by accident.

    Args:
        sae: in inference or training form.
        model: the language model, in which the SAE's metadata name its place, positions and head (the arguments below
            are for other ones); or a `SplicedModel`, with the SAE's place in it, checked.
        features: indices of features.
        importance: of the same SAE, on these or other tokens; densities come from it too.
        tokenizer: anything with the `decode` of a Hugging Face tokenizer.
        n_contexts: contexts per feature; fewer where it fires in fewer sequences.
        window: tokens before and after the highest activation; fewer at the ends of a sequence.
        n_logits: tokens at either end of the logits.
        batch_size_prompts: sequences that go through the model at once.
        seqpos_slice: positions that the SAE is applied to.
        excluded: token ids that it is not applied to.
        head_index: the head that it is applied to.

    Raises:
        ValueError: a feature that the SAE does not have, a negative window, or the importance of another SAE.
    """
    d_sae = len(sae.W_dec)
    for feature in features:
        if not 0 <= feature < d_sae:
            raise ValueError(f"features: the SAE has no feature {feature}. Name features from 0 to {d_sae - 1}.")
    if len(importance.kl) != d_sae:
        raise ValueError(
            f"importance is of an SAE with {len(importance.kl)} features, this one has {d_sae}. "
            "Pass the result of feature_importance for the same SAE."
        )
    if min(window) < 0:
        raise ValueError(f"window must be (tokens before, tokens after), 0 or more each, got {window}.")
    if not features:
        return []
    model, seqpos_slice, excluded, head_index = spliced_at_its_place(sae, model, seqpos_slice, excluded, head_index)
    tops = _TopContexts(len(features), n_contexts, window)
    for first in range(0, len(tokens), batch_size_prompts):
        micro = clean_micro_batch(
            model,
            tokens[first : first + batch_size_prompts],
            hidden=False,
            downstream=False,
            seqpos_slice=seqpos_slice,
            excluded=excluded,
        )
        if not micro.n_tokens:
            continue
        acts = encode_with(sae, micro.clean.activation.shape[2:])(micro.sae_in(head_index))
        acts = (acts.to_dense() if acts.is_sparse else acts)[:, list(features)].float().cpu()
        placed = torch.zeros(*micro.tokens.shape, len(features))
        placed[torch.ones(placed.shape[:2], dtype=torch.bool) if micro.mask is None else micro.mask.cpu()] = acts
        tops.add(placed, first)
    logits = _logits(model, tokens[:1], sae.W_dec[list(features)], tokenizer, n_logits, head_index)
    cards: list[FeatureCard] = []
    for k, feature in enumerate(features):
        contexts = tops.contexts(k, tokens, tokenizer)
        cards.append(
            FeatureCard(
                feature=feature,
                density=float(importance.density[feature]),
                importance=importance.exact.get(feature, float(importance.kl[feature])),
                importance_is_exact=feature in importance.exact,
                max_activation=float(tops.values[0, k]),
                contexts=contexts,
                top_logits=logits[k][0],
                bottom_logits=logits[k][1],
                density_interval=_interval(float(importance.density[feature]), importance.n_tokens),
            )
        )
    return cards


def _interval(density: float, n_tokens: int) -> tuple[float, float] | None:
    return share_interval(round(density * n_tokens), n_tokens) if n_tokens else None


class _TopContexts:
    """For each feature the sequences with its highest activations, and its activations around them, on the CPU."""

    def __init__(self, n_features: int, n_contexts: int, window: tuple[int, int]):
        self.n_contexts, self.window = n_contexts, window
        # At least one, so that the highest activation is known where no context is wanted.
        kept = max(n_contexts, 1)
        self.values = torch.zeros(kept, n_features)
        """Signed, highest first; 0 for none."""
        self.places = torch.zeros(kept, n_features, 2, dtype=torch.int64)
        """Sequence and position."""
        self.activations = torch.zeros(kept, n_features, sum(window) + 1)

    def add(self, acts: Float[Tensor, "prompts pos features"], first: int) -> None:
        """Activations of the sequences from `first` on, 0 where the SAE is not applied."""
        n_prompts, _, n_features = acts.shape
        peaks = acts.abs().argmax(1)
        values = acts.gather(1, peaks[:, None])[:, 0]
        sequences = torch.arange(first, first + n_prompts)[:, None].expand_as(peaks)
        # Zeros beyond both ends, so that every window is whole; `contexts` cuts them off.
        windows = F.pad(acts, (0, 0, *self.window)).unfold(1, sum(self.window) + 1, 1)
        around = windows[torch.arange(n_prompts)[:, None], peaks, torch.arange(n_features)]
        values = torch.cat([self.values, values])
        places = torch.cat([self.places, torch.stack([sequences, peaks], -1)])
        order = values.abs().argsort(dim=0, descending=True, stable=True)[: len(self.values)]
        column = torch.arange(n_features)
        self.values, self.places = values[order, column], places[order, column]
        self.activations = torch.cat([self.activations, around])[order, column]

    def contexts(self, k: int, tokens: Tensor, tokenizer: Any) -> tuple[ActivatingContext, ...]:
        """Those of the feature at index `k`."""
        result: list[ActivatingContext] = []
        before, after = self.window
        for i in range(self.n_contexts):
            if not self.values[i, k]:
                break
            sequence, peak = self.places[i, k].tolist()
            start = max(peak - before, 0)
            ids = tokens[sequence, start : peak + after + 1].tolist()
            offset = start - (peak - before)
            result.append(
                ActivatingContext(
                    tokens=tuple(token_text(tokenizer, token) for token in ids),
                    activations=tuple(self.activations[i, k, offset : offset + len(ids)].tolist()),
                    peak=peak - start,
                    prompt=sequence,
                    position=peak,
                )
            )
        return tuple(result)


def _logits(
    model: SplicedModel, tokens: Tensor, directions: Tensor, tokenizer: Any, n_logits: int, head_index: int | None
) -> list[tuple[Logits, Logits]]:
    """The tokens that each of the decoder directions `[features, d_in]` raises and lowers most."""
    clean = model.clean_pass(tokens.to(model.token_device), downstream=False)
    assert clean.hidden is not None
    d_model = clean.hidden.shape[-1]
    if head_index is not None or clean.activation.ndim != 3 or directions.shape[1] != d_model:
        return [((), ())] * len(directions)
    directions = F.normalize(directions, dim=1).to(clean.hidden)
    at_zero = model.unembed(torch.zeros_like(clean.hidden[0, :1])).float()
    result: list[tuple[Logits, Logits]] = []
    for chunk in directions.split(chunk_tokens(model.vocabulary)):
        logits = model.unembed(chunk).float() - at_zero
        logits -= logits.mean(1, keepdim=True)
        n = min(n_logits, logits.shape[1])
        ends = [logits.topk(n, dim=1, largest=largest) for largest in (True, False)]
        for k in range(len(chunk)):
            top, bottom = (
                tuple((token_text(tokenizer, i), value) for i, value in zip(*pair, strict=True))
                for pair in ((end.indices[k].tolist(), end.values[k].tolist()) for end in ends)
            )
            result.append((top, bottom))
    return result


def token_text(tokenizer: Any, token: int) -> str:
    """What one token contributes to a text.

    SentencePiece tokenizers drop the space before a word when they decode it alone, which this puts back. Ids without a
    text (a vocabulary padded beyond the tokenizer's) become `[id]`.
    """
    text = str(tokenizer.decode([token]))
    piece = getattr(tokenizer, "convert_ids_to_tokens", lambda _: None)(token)
    if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
        text = " " + text
    return text or f"[{token}]"
