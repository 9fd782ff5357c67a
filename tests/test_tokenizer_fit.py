"""A tokenizer that does not fit the model or the text, or that adds tokens on its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from datasets import Dataset
from helpers import VOCABULARY, proxy, runner_config, sae_config, tiny_gpt2_model, tiny_hooked_transformer
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import TrainingSAE
from tokenizers import pre_tokenizers, processors

from e2e_sae_plugin import E2ESAETrainingRunner
from e2e_sae_plugin.comparison.inputs import TextSettings, evaluation_tokens
from e2e_sae_plugin.data.tokenizer import added_tokens, check_tokenizer, vocabulary_of, warn_of_unknown_tokens

pytestmark = pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")

TEXTS = [" ".join(f"t{10 + (i * 5 + j) % 50}" for j in range(5)) for i in range(40)]


def tokenizer(adds: str = "", size: int = VOCABULARY, bos: bool = True, **settings: Any) -> Any:
    """A word per token; ids 1, 2 and 3 are special. `adds` is what it puts around a text, such as "<b> $A"."""
    words = {"t0": 0, "<b>": 1, "<e>": 2, "<p>": 3, **{f"t{i}": i for i in range(4, size)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    if adds:
        special = [("<b>", 1), ("<e>", 2)]
        made.post_processor = processors.TemplateProcessing(single=adds, special_tokens=special)  # pyright: ignore
    names = {"bos_token": "<b>"} if bos else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<e>",
        pad_token="<p>",
        unk_token="t0",
        name_or_path="tiny",
        **names,
        **settings,
    )


def model_with(own: Any) -> Any:
    return HookedProxyLM(tiny_gpt2_model(), own, hook_names=[])


def first_batch(own: Any, texts: list[str] = TEXTS, **settings: Any) -> list[list[int]]:
    config = runner_config(hook_name="transformer.h.0", **settings)
    runner = E2ESAETrainingRunner(
        config, override_model=model_with(own), override_dataset=Dataset.from_dict({"text": texts})
    )
    return next(runner.tokens)[:2].tolist()


@pytest.mark.parametrize("separator", ["bos", "eos", None])
@pytest.mark.parametrize("adds", ["<b> $A", "<b> $A <e>", "$A <e>"])
def test_a_tokenizer_that_adds_special_tokens_itself_doubles_none(adds: str, separator: Any):
    settings = {"sequence_separator_token": separator}
    assert first_batch(tokenizer(adds), **settings) == first_batch(tokenizer(), **settings)
    says_so = tokenizer(adds, add_bos_token=adds.startswith("<b>"))
    assert first_batch(says_so, **settings) == first_batch(tokenizer(), **settings)


def test_what_a_tokenizer_adds():
    expected = {"": (0, 0), "<b> $A": (1, 0), "<b> $A <e>": (1, 1), "$A <e>": (0, 1)}
    assert {adds: added_tokens(model_with(tokenizer(adds))) for adds in expected} == expected


def test_resuming_counts_without_them():
    config = runner_config(hook_name="transformer.h.0")
    data, model = Dataset.from_dict({"text": TEXTS}), model_with(tokenizer("<b> $A <e>"))

    def stream() -> Any:
        return E2ESAETrainingRunner(config, override_model=model, override_dataset=data).tokens

    whole = stream()
    expected = [next(whole) for _ in range(6)]
    for n in (1, 3, 5):
        stopped, resumed = stream(), stream()
        for _ in range(n):
            next(stopped)
        resumed.resume(*stopped.state())
        assert torch.equal(next(resumed), expected[n])


def test_a_tokenizer_far_smaller_than_the_model_is_refused(tmp_path: Path):
    path = str(tmp_path / "a.jsonl")
    Dataset.from_dict({"text": TEXTS}).to_json(path)
    with pytest.raises(ValueError, match=r"tokenizer has 5 tokens, but the model knows 64 ids.*tokenizer files"):
        first_batch(tokenizer(size=5))
    made: Any = TrainingSAE.from_dict(sae_config().to_dict())
    with pytest.raises(ValueError, match="tokenizer has 5 tokens"):
        evaluation_tokens({"a": made}, model_with(tokenizer(size=5)), 80, TextSettings(path, context_size=8))
    check_tokenizer(tokenizer(size=33), VOCABULARY, prepend_bos=True)  # of a padded vocabulary
    check_tokenizer(tokenizer(size=5), None, prepend_bos=True)


def test_token_ids_need_no_tokenizer_that_fits():
    config = runner_config(hook_name="transformer.h.0")
    data = Dataset.from_dict({"tokens": [[5] * 8] * 40})
    E2ESAETrainingRunner(config, override_model=model_with(tokenizer(size=5)), override_dataset=data)


def test_no_bos_token_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert first_batch(tokenizer(bos=False))[0][0] == 10
    assert caplog.text.count("prepend_bos=True has no effect: the model's tokenizer has no BOS token") == 1
    caplog.clear()
    first_batch(tokenizer(bos=False), prepend_bos=False)
    first_batch(tokenizer())
    assert "BOS" not in caplog.text


def test_mostly_unknown_tokens_are_said(caplog: pytest.LogCaptureFixture):
    first_batch(tokenizer(), ["other words than these"] * 40)
    assert "% of the tokens are unknown ('t0'): the tokenizer does not fit this text." in caplog.text
    caplog.clear()
    first_batch(tokenizer(), ["t9 t8 t7 t6 other"] * 40)
    unknown_is_end = tokenizer()
    unknown_is_end.unk_token = "<e>"  # as GPT-2's
    warn_of_unknown_tokens(torch.full((2, 8), 2), unknown_is_end)
    assert "unknown" not in caplog.text


def test_the_models_vocabulary():
    assert vocabulary_of(tiny_hooked_transformer()) == VOCABULARY
    assert vocabulary_of(proxy(tiny_gpt2_model())) == VOCABULARY
    assert vocabulary_of(object()) is None
