"""Which features mean the same after a fine-tune: hand-made encoders whose answers are known."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runner_config, spliced_model, token_batch
from torch import Tensor

from e2e_sae_plugin.finetune import labels
from e2e_sae_plugin.finetune.labels import label_transfer
from e2e_sae_plugin.finetune.movement import Movement, movement

WEIGHTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
UNMOVED = Movement(torch.ones(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64))


def before(sae_in: Tensor) -> Tensor:
    """Six features; the last never fires."""
    acts = (sae_in @ WEIGHTS).relu()
    acts[:, 5] = 0
    return acts


def compare(after: Any, moved: Movement = UNMOVED, **settings: Any) -> labels.LabelTransfer:
    tokens = token_batch(40, context_size=8)
    return label_transfer(before, after, moved, spliced_model(runner_config()), tokens, **settings)


@pytest.fixture(autouse=True)
def _windows_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "CONTEXT_TOKENS", 4)
    monkeypatch.setattr(labels, "MIN_CONTEXTS", 10)


def test_a_verdict_takes_twenty_contexts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert labels.MIN_CONTEXTS == 20
    few = torch.tensor([0, 19, 20, 19, 20])
    same, other = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]), torch.ones(5)
    found = labels.LabelTransfer(other, None, same, other, few, few, 100)
    assert found.verdicts == ["silent", "rare", "same", "rare", "changed"]


def test_nothing_changed():
    found = compare(before)
    assert found.verdicts == ["same"] * 5 + ["silent"]
    assert found.counts() == {"same": 5, "changed": 0, "rare": 0, "silent": 1}
    assert found.n_contexts == 40 * 2
    torch.testing.assert_close(found.correlation[:5], torch.ones(5, dtype=torch.float64))
    assert found.correlation[5].isnan()
    assert torch.equal(found.contexts_before, found.contexts_after)


def test_two_features_that_swapped_have_changed_and_a_factor_has_no_effect():
    found = compare(lambda x: 3 * before(x)[:, [1, 0, 2, 3, 4, 5]])
    assert found.verdicts == ["changed", "changed", "same", "same", "same", "silent"]
    acts = before(spliced_model(runner_config()).clean_pass(token_batch(40)).activation.flatten(0, 1))
    expected = torch.corrcoef(acts[:, :2].T)[0, 1]
    torch.testing.assert_close(found.correlation[0], expected.double(), rtol=1e-4, atol=1e-5)


def test_a_moved_direction_has_changed_whatever_it_fires_on():
    cosines = torch.tensor([0.95, 0.85, 1.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    found = compare(before, Movement(cosines, torch.ones(6, dtype=torch.float64)))
    assert found.verdicts == ["same", "changed", "same", "same", "same", "changed"]
    assert compare(before, Movement(torch.ones(6), cosines)).verdicts == found.verdicts
    assert compare(before, Movement(cosines, None)).verdicts == found.verdicts


def test_shared_contexts_are_those_of_naive_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(labels, "TOP_CONTEXTS", 7)

    def after(x: Tensor) -> Tensor:
        return (x @ (WEIGHTS + 0.5 * WEIGHTS.flip(0))).relu()

    # 3 sequences at a time, and 2 tokens of them at a time.
    monkeypatch.setattr(labels, "CHUNK_ELEMENTS", 12)
    excluded = torch.tensor([5, 9, 22])
    found = compare(after, batch_size_prompts=3, excluded=excluded)
    tokens = token_batch(40, context_size=8)
    acts = spliced_model(runner_config()).clean_pass(tokens).activation
    tops: list[list[set[int]]] = []
    firing: list[list[int]] = []
    for encode in (before, after):
        values = encode(acts.flatten(0, 1)).view(40, 8, 6) * ~torch.isin(tokens, excluded)[..., None]
        highest = values.view(80, 4, 6).amax(1)
        tops.append(
            [{int(i) for i in highest[:, f].argsort(descending=True)[:7] if highest[i, f] > 0} for f in range(6)]
        )
        firing.append((highest > 0).sum(0).tolist())
    assert (found.contexts_before.tolist(), found.contexts_after.tolist()) == (firing[0], firing[1])
    for feature in range(5):
        shared = len(tops[0][feature] & tops[1][feature]) / len(tops[0][feature])
        assert float(found.shared_contexts[feature]) == pytest.approx(shared)
    assert 0 < float(found.shared_contexts[:5].mean()) < 1


def test_a_feature_of_few_contexts_is_rare(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(labels, "MIN_CONTEXTS", 81)
    assert compare(before).counts() == {"same": 0, "changed": 0, "rare": 5, "silent": 1}


def test_one_line_per_feature(tmp_path: Path):
    found = compare(before)
    found.write_csv(tmp_path / "features.csv")
    with (tmp_path / "features.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["verdict"] for line in lines] == found.verdicts
    assert lines[0]["decoder_cosine"] == "1.0000"
    assert lines[0]["activation_correlation"] == "1.0000"


def test_movement_is_the_cosine_of_each_direction():
    class Pair:
        def __init__(self, encoder: list[list[float]], decoder: list[list[float]]):
            self.W_enc, self.W_dec = torch.tensor(encoder).T, torch.tensor(decoder)

        def named_parameters(self) -> list[tuple[str, Tensor]]:
            return [("W_enc", self.W_enc)]

    first: Any = Pair([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], [[1.0, 1.0], [3.0, 0.0], [0.0, 1.0]])
    second: Any = Pair([[0.0, 1.0], [0.0, 5.0], [0.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    moved = movement(first, second)
    assert moved.decoder.tolist() == pytest.approx([0.5**0.5, -1, 1])
    assert moved.encoder is not None
    assert moved.encoder.tolist() == pytest.approx([0, 1, 1])  # zero before and after has not moved
    assert moved.summary()["decoder"]["minimum"] == pytest.approx(-1)
    with pytest.raises(ValueError, match=r"decoders of \(3, 2\) and \(2, 2\)"):
        movement(first, Pair([[1.0, 0.0]] * 2, [[1.0, 0.0]] * 2))  # pyright: ignore[reportArgumentType]
