"""Feature cards against a naive search, and a hand-made SAE that writes single tokens."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
import torch
from helpers import (
    D_HEAD,
    D_MODEL,
    VOCABULARY,
    runner_config,
    shared_model,
    tiny_hooked_transformer,
    tiny_tokenizer,
    token_batch,
    training_sae,
)
from sae_lens import StandardSAE, StandardSAEConfig
from torch import Tensor

from e2e_sae_plugin import splice_into
from e2e_sae_plugin.demo import load_demo_tokenizer
from e2e_sae_plugin.evaluation.cards import feature_cards, token_text
from e2e_sae_plugin.evaluation.feature_card import ActivatingContext, FeatureCard
from e2e_sae_plugin.evaluation.importance import FeatureImportance
from e2e_sae_plugin.kernels import kl

HOOK = "blocks.1.hook_resid_pre"
EXCLUDED = torch.tensor([5, 9, 22, 40, 41, 42, 50])


def checked_splice(model: Any, hook_name: str = HOOK) -> Any:
    spliced = splice_into(model, hook_name, needs_downstream=False)
    spliced.check()
    return spliced


def some_importance(d_sae: int = 32) -> FeatureImportance:
    kl_values = torch.linspace(0, 1, d_sae, dtype=torch.float64)
    return FeatureImportance(kl_values, torch.zeros_like(kl_values), kl_values / 2, {3: 0.75}, 10)


def cards_of(sae: Any, model: Any, tokens: Tensor, features: list[int], **settings: Any) -> list[FeatureCard]:
    importance = some_importance(len(sae.W_dec))
    return feature_cards(sae, model, tokens, features, importance, tokenizer=tiny_tokenizer(), **settings)


def naive_contexts(acts: Tensor, tokens: Tensor, n: int, before: int, after: int) -> tuple[ActivatingContext, ...]:
    """From one feature's activations `[prompts, pos]`."""
    found = sorted(
        (-abs(float(row[peak])), i, peak) for i, row in enumerate(acts) for peak in [int(row.abs().argmax())]
    )
    result: list[ActivatingContext] = []
    for magnitude, i, peak in found[:n]:
        if magnitude < 0:
            positions = [j for j in range(peak - before, peak + after + 1) if 0 <= j < tokens.shape[1]]
            result.append(
                ActivatingContext(
                    tuple(f"t{int(tokens[i, j])}" for j in positions),
                    tuple(float(acts[i, j]) for j in positions),
                    positions.index(peak),
                    prompt=i,
                    position=peak,
                )
            )
    return tuple(result)


def assert_equal_contexts(found: tuple[ActivatingContext, ...], expected: tuple[ActivatingContext, ...]) -> None:
    assert [(c.tokens, c.peak, c.prompt, c.position) for c in found] == [
        (c.tokens, c.peak, c.prompt, c.position) for c in expected
    ]
    for context, other in zip(found, expected, strict=True):
        assert context.activations == pytest.approx(other.activations, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("architecture", ["standard", "topk", "abstopk"])
@pytest.mark.parametrize("window", [(3, 2), (16, 8), (0, 0)])
def test_contexts_are_those_of_a_naive_search(architecture: str, window: tuple[int, int]):
    model, sae = checked_splice(tiny_hooked_transformer()), training_sae(runner_config(architecture))
    tokens = token_batch(20)
    with torch.no_grad():
        acts = sae.encode(model.clean_pass(tokens).activation)
    features = [3, 0, 17, 31]
    for batch_size in (3, 100):
        cards = cards_of(sae, model, tokens, features, n_contexts=4, window=window, batch_size_prompts=batch_size)
        for card, feature in zip(cards, features, strict=True):
            expected = naive_contexts(acts[..., feature], tokens, 4, *window)
            assert_equal_contexts(card.contexts, expected)
            assert card.feature == feature
            if expected:
                assert card.max_activation == card.contexts[0].activations[card.contexts[0].peak]
    assert any(len(card.contexts) == 4 for card in cards)
    negative = any(value < 0 for card in cards for context in card.contexts for value in context.activations)
    assert negative == (architecture == "abstopk")


def test_tokens_that_the_sae_is_not_applied_to_are_shown_with_activation_0_and_never_chosen():
    model, sae, tokens = checked_splice(tiny_hooked_transformer()), training_sae(runner_config()), token_batch(20)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 1:-2] = True
    mask &= ~torch.isin(tokens, EXCLUDED)
    with torch.no_grad():
        acts = sae.encode(model.clean_pass(tokens).activation)
    features = list(range(8))
    cards = cards_of(
        sae, model, tokens, features, window=(7, 7), seqpos_slice=(1, -2), excluded=EXCLUDED, batch_size_prompts=6
    )
    for card in cards:
        expected = naive_contexts(acts[..., card.feature] * mask, tokens, 5, 7, 7)
        assert_equal_contexts(card.contexts, expected)
    shown = [pair for card in cards for c in card.contexts for pair in zip(c.tokens, c.activations, strict=True)]
    assert all(value == 0 for text, value in shown if int(text[1:]) in EXCLUDED)
    assert any(int(text[1:]) in EXCLUDED for text, _ in shown)


def writing_sae(model: Any, ids: list[int]) -> StandardSAE:
    """Feature i writes the direction of token `ids[i]`; features fire on what they write, the last one never."""
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=len(ids)))
    with torch.no_grad():
        sae.W_dec.copy_(3 * model.unembed.W_U[:, ids].T)
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.zero_()
        sae.W_enc[:, -1], sae.b_enc[-1] = 0, -1
    return sae


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_a_feature_that_writes_a_tokens_unembedding_has_that_token_on_top(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kl, "CHUNK_LOGIT_ELEMENTS", chunk)
    model, ids = tiny_hooked_transformer(), [7, 60, 0, 33]
    with torch.no_grad():  # orthogonal enough that a column's largest product is that with itself
        model.unembed.W_U.copy_(torch.nn.functional.normalize(model.unembed.W_U, dim=0))
    sae = writing_sae(model, ids)
    cards = cards_of(sae, checked_splice(model), token_batch(), [0, 1, 2, 3], n_logits=5)
    assert [card.top_logits[0][0] for card in cards] == [f"t{i}" for i in ids]
    assert bool(model.unembed.b_U.any())  # which has no part in it
    for card, token in zip(cards, ids, strict=True):
        logits = model.unembed.W_U.T @ model.unembed.W_U[:, token]
        logits -= logits.mean()
        order = logits.argsort(descending=True).tolist()
        assert [text for text, _ in card.top_logits] == [f"t{i}" for i in order[:5]]
        assert [text for text, _ in card.bottom_logits] == [f"t{i}" for i in reversed(order[-5:])]
        assert [value for _, value in card.top_logits] == pytest.approx(logits[order[:5]].tolist(), abs=1e-5)
        assert card.bottom_logits[0][1] == pytest.approx(float(logits.min()), abs=1e-5)


@pytest.mark.parametrize("family", ["bridge", "gpt2", "llama", "gemma2"])
def test_every_family_has_logits(family: str):
    """gemma2 caps its logits, so that its head is not linear."""
    layers = {"bridge": HOOK, "gpt2": "transformer.h.0"}.get(family, "model.layers.0")
    model = checked_splice(shared_model(family), layers)
    (card,) = cards_of(training_sae(runner_config()), model, token_batch(), [0], n_logits=1000)
    assert len(card.top_logits) == len(card.bottom_logits) == VOCABULARY
    assert card.top_logits == tuple(reversed(card.bottom_logits))
    assert sum(value for _, value in card.top_logits) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("d_in", "head"), [(D_MODEL, None), (D_HEAD, 1)])
def test_an_sae_of_heads_has_no_logits(d_in: int, head: int | None):
    """All heads together are as wide as the residual stream here, and in most models."""
    hook_name = "blocks.1.attn.hook_z"
    sae = training_sae(runner_config(sae={"d_in": d_in}, hook_name=hook_name))
    cards = cards_of(sae, checked_splice(tiny_hooked_transformer(), hook_name), token_batch(), [0, 1], head_index=head)
    assert all(card.top_logits == card.bottom_logits == () for card in cards)
    assert any(card.contexts for card in cards)


def test_a_feature_that_never_fires_has_a_card_without_contexts():
    model = tiny_hooked_transformer()
    alive, dead = cards_of(writing_sae(model, [7, 60, 0, 33]), checked_splice(model), token_batch(), [0, 3])
    assert dead.contexts == ()
    assert dead.max_activation == 0
    assert len(dead.top_logits) == 8
    assert alive.contexts


def test_a_card_has_its_features_importance():
    model, tokens = checked_splice(tiny_hooked_transformer()), token_batch()
    first, second = cards_of(training_sae(runner_config()), model, tokens, [3, 31], n_contexts=0)
    assert (first.importance, first.importance_is_exact) == (0.75, True)
    assert (second.importance, second.importance_is_exact) == (1, False)
    assert second.density == 0.5
    assert first.contexts == ()
    assert first.max_activation > 0
    assert cards_of(training_sae(runner_config()), model, tokens, []) == []


def test_pieces_of_a_byte_level_vocabulary_are_readable():
    tokenizer: Any = load_demo_tokenizer()
    ids = tokenizer.encode("def f(x):\n    return 'x'", add_special_tokens=False)
    assert "".join(token_text(tokenizer, i) for i in ids) == "def f(x):\n    return 'x'"
    assert token_text(tokenizer, tokenizer.bos_token_id) == "<|endoftext|>"


def test_sentencepiece_words_keep_the_space_before_them():
    backend: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁the": 0, "cat": 1}, unk_token="cat"))
    backend.decoder = tokenizers.decoders.Metaspace()

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return backend.decode(ids)

        def convert_ids_to_tokens(self, token: int) -> str | None:
            return backend.id_to_token(token)

    assert Tokenizer().decode([0]) == "the"
    assert [token_text(Tokenizer(), i) for i in (0, 1, 2)] == [" the", "cat", "[2]"]


@pytest.mark.parametrize(
    ("features", "settings", "message"),
    [
        ([0, 32], {}, "the SAE has no feature 32. Name features from 0 to 31"),
        ([0], {"window": (4, -1)}, "window must be .* got \\(4, -1\\)"),
        ([0], {"importance": some_importance(16)}, "an SAE with 16 features, this one has 32"),
    ],
)
def test_what_makes_no_cards_is_refused(features: list[int], settings: dict[str, Any], message: str):
    sae, model = training_sae(runner_config()), checked_splice(tiny_hooked_transformer())
    settings = {"importance": some_importance(), **settings}
    with pytest.raises(ValueError, match=message):
        feature_cards(sae, model, token_batch(), features, tokenizer=tiny_tokenizer(), **settings)


def test_a_model_is_spliced_where_the_metadata_say_and_special_tokens_stay_out():
    sae, model, tokens = training_sae(runner_config()), tiny_hooked_transformer(), token_batch(20)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.exclude_special_tokens = HOOK, EXCLUDED.tolist()
    by_model = cards_of(sae, model, tokens, [0, 3])
    by_hand = cards_of(sae, checked_splice(model), tokens, [0, 3], excluded=EXCLUDED)
    assert by_model == by_hand
    assert by_model != cards_of(sae, checked_splice(model), tokens, [0, 3])
