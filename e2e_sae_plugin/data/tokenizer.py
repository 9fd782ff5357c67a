"""Whether a tokenizer fits its model and the text, and what it adds to a text on its own."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SMALLEST_SHARE = 0.5
"""Vocabularies are padded, but not to the double; a tokenizer with a smaller share of the model's ids is not the model's."""
MOSTLY = 0.5
PROBE = "a b"


def vocabulary_of(model: Any) -> int | None:
    """Number of token ids that a language model knows; None if its config does not say."""
    wrapped = getattr(model, "model", model)
    for config in (getattr(model, "cfg", None), getattr(wrapped, "config", None)):
        text = getattr(config, "get_text_config", lambda same=config: same)()
        for name in ("d_vocab", "vocab_size"):
            size = getattr(text, name, None)
            if isinstance(size, int) and size > 0:
                return size
    return None


def check_tokenizer(tokenizer: Any, vocabulary: int | None, *, prepend_bos: bool) -> None:
    """Reject a tokenizer that cannot be the model's; warn if there is no BOS token to prepend.

    Args:
        tokenizer: Of the model, which is about to read text.
        vocabulary: Number of ids that the model knows; None if that is not known.
        prepend_bos: Whether each sequence is to begin with BOS.

    Raises:
        ValueError: If it has far fewer tokens than the model.
    """
    size = len(tokenizer)
    if vocabulary is not None and size < SMALLEST_SHARE * vocabulary:
        raise ValueError(
            f"The model's tokenizer has {size:,} tokens, but the model knows {vocabulary:,} ids, so it is not this model's. "
            "Load the model from a folder with its tokenizer files (tokenizer.json), or use data of token ids."
        )
    if prepend_bos and tokenizer.bos_token_id is None:
        logger.warning(
            "prepend_bos=True has no effect: the model's tokenizer has no BOS token. Sequences begin with text."
        )


def warn_of_unknown_tokens(tokens: Tensor, tokenizer: Any) -> None:
    """Say if most tokens are unknown to the tokenizer, which then was made for other text."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    others = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    if unknown is None or unknown in others:  # GPT-2's unknown token is its end of text
        return
    share = float((tokens == unknown).float().mean())
    if share > MOSTLY:
        logger.warning(
            "%.0f%% of the tokens are unknown (%r): the tokenizer does not fit this text.",
            100 * share,
            tokenizer.unk_token,
        )


@torch.no_grad()
def added_tokens(model: Any) -> tuple[int, int]:
    """How many tokens the model's tokenizer puts before and after a text where none was asked for.

    SAELens removes a BOS only of tokenizers that say so themselves (`add_bos_token`).
    """
    plain = model.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    tokens = model.to_tokens(PROBE, truncate=False, move_to_device=False, prepend_bos=False).squeeze(0).tolist()
    for before in range(len(tokens) - len(plain) + 1):
        if tokens[before : before + len(plain)] == plain:
            return before, len(tokens) - len(plain) - before
    return 0, 0
