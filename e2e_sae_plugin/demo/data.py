"""Token sequences of the standard library for the bundled model."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from e2e_sae_plugin.demo.corpus import Split, stdlib_texts
from e2e_sae_plugin.demo.model import BOS_TOKEN, load_demo_tokenizer


def demo_tokens(
    split: Split,
    context_size: int = 128,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    root: Path | None = None,
    seed: int = 0,
) -> Tensor:
    """Token ids `[sequences, context_size]` of one split, in shuffled order.

    Each sequence is `<|endoftext|>` followed by `context_size - 1` consecutive tokens of the split's files, which are
    joined by `<|endoftext|>`; a last short piece is dropped.

    Args:
        split: `"train"` or `"evaluation"`; no file is in both.
        context_size: length of a sequence, 2 to the model's 256.
        tokenizer: the bundled one by default.
        root: folder of Python source instead of the running interpreter's standard library.
        seed: of the shuffle.

    Raises:
        ValueError: an unknown split, or a context size below 2.
        FileNotFoundError: there is no Python source to read.
    """
    if context_size < 2:
        raise ValueError(f"context_size must be at least 2 (one token after <|endoftext|>), got {context_size}.")
    tokenizer = tokenizer or load_demo_tokenizer()
    texts = stdlib_texts(split, root)
    encoded = tokenizer(texts)["input_ids"]  # each starts with <|endoftext|>
    stream = torch.tensor([token for ids in encoded for token in ids])
    stream = stream[: len(stream) - len(stream) % (context_size - 1)].view(-1, context_size - 1)
    bos = tokenizer.convert_tokens_to_ids(BOS_TOKEN)
    assert isinstance(bos, int)
    sequences = torch.nn.functional.pad(stream, (1, 0), value=bos)
    return sequences[torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))]


def demo_dataset(split: Split, context_size: int = 128, **settings: object) -> Dataset:
    """`demo_tokens` as a `datasets.Dataset` with a `tokens` column, ready for `override_dataset`."""
    tokens = demo_tokens(split, context_size, **settings)  # pyright: ignore[reportArgumentType]
    return Dataset.from_dict({"tokens": tokens.numpy()})
