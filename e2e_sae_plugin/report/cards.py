"""Feature cards as a person looks at them: the text around the highest activations, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from e2e_sae_plugin.evaluation.feature_card import ActivatingContext, FeatureCard
from e2e_sae_plugin.report.table import Cell, Table
from e2e_sae_plugin.report.text import is_finite, number_text, token_text

OPEN_CONTEXTS = 3
"""Further contexts of a card are folded away."""
WORDS_AROUND = 6
"""Tokens on both sides of the peak in Markdown."""


@dataclass(frozen=True)
class CardGroup:
    """Cards that belong together, such as those of one SAE."""

    title: str
    cards: tuple[FeatureCard, ...]


def card_view(card: FeatureCard) -> dict[str, Any]:
    """What the template shows of a card."""
    contexts = [_context_view(context, card.max_activation) for context in card.contexts]
    return {
        "feature": card.feature,
        "facts": [
            ("density", density_text(card)),
            ("importance (nats)", importance_text(card)),
            ("max activation", number_text(card.max_activation)),
        ],
        "contexts": contexts[:OPEN_CONTEXTS],
        "more_contexts": contexts[OPEN_CONTEXTS:],
        "logits": [
            (name, [{"text": token_text(token, spaces=True), "value": number_text(value)} for token, value in tokens])
            for name, tokens in (("raises", card.top_logits), ("lowers", card.bottom_logits))
            if tokens
        ],
    }


def cards_table(group: CardGroup) -> Table:
    """The cards in short, for Markdown."""
    rows: list[tuple[Cell, ...]] = []
    for card in group.cards:
        context = ""
        if card.contexts:
            first = card.contexts[0]
            start = max(0, first.peak - WORDS_AROUND)
            before, after = first.tokens[start : first.peak], first.tokens[first.peak + 1 :][:WORDS_AROUND]
            peak = token_text(first.tokens[first.peak]) if first.peak < len(first.tokens) else ""
            context = "".join(map(token_text, before)) + f"⟦{peak}⟧" + "".join(map(token_text, after))
        raised = " ".join(token_text(token, spaces=True) for token, _ in card.top_logits[:5])
        rows.append((str(card.feature), density_text(card), importance_text(card), context, raised))
    columns = ("feature", "density", "importance (nats)", "highest activation", "raises")
    return Table("cards", group.title, "", columns, tuple(rows))


def share_text(share: float) -> str:
    """A share of the tokens in per cent."""
    return f"{100 * share:.3g}%" if is_finite(share) else number_text(None)


def density_text(card: FeatureCard) -> str:
    """The share of the tokens that it fires on, with its interval."""
    if card.density_interval is None:
        return share_text(card.density)
    low, high = map(share_text, card.density_interval)
    return f"{share_text(card.density)} [{low}, {high}]"


def importance_text(card: FeatureCard) -> str:
    """The number and whether it was measured."""
    number = f"{card.importance:.3g}" if is_finite(card.importance) else number_text(None)
    return f"{number} (exact)" if card.importance_is_exact else f"≈ {number} (estimated)"


def _context_view(context: ActivatingContext, highest: float) -> dict[str, Any]:
    finite = [value for value in context.activations if is_finite(value)]
    scale = highest if is_finite(highest) and highest > 0 else max([*finite, 0.0])
    tokens: list[dict[str, Any]] = []
    for index, (token, value) in enumerate(zip(context.tokens, context.activations, strict=False)):
        strength = min(1.0, max(0.0, value / scale)) if is_finite(value) and scale > 0 else 0.0
        tokens.append(
            {
                # The space before a word stays outside its highlight, which would hang at the end of a line.
                "space": " " if index and token[:1] == " " and token.strip() else "",
                "text": token_text(token[1:] if token[:1] == " " and token.strip() else token),
                "title": token_text(token, spaces=True),
                "strength": f"{math.sqrt(strength):.2f}" if strength > 0 else "",  # sqrt: weak ones are seen too
                "value": number_text(value),
                "is_peak": index == context.peak,
            }
        )
    peak = tokens[context.peak] if 0 <= context.peak < len(tokens) else None
    return {"tokens": tokens, "peak": peak}
