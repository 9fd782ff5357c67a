"""The column of a dataset that is read: texts, token ids or conversations."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from datasets import Dataset, IterableDataset
from torch import Tensor

ColumnKind = Literal["text", "tokens", "conversation", "other", "empty"]

TOKEN_NAMES = ("tokens", "input_ids", "token_ids", "tokenized", "ids")
TEXT_NAMES = ("text", "problem", "content")
CONVERSATION_NAMES = ("conversation", "conversations", "messages", "text")
"""Names that are looked for, in order; SAELens's come first."""
NOT_TOKENS = ("attention_mask", "token_type_ids", "special_tokens_mask", "labels", "length")
READ_BY_SAELENS: dict[str, tuple[str, ...]] = {
    "text": ("text", "problem"),
    "tokens": ("tokens", "input_ids"),
    "conversation": CONVERSATION_NAMES,
}
PEEKED_ROWS = 100


def with_read_column(
    dataset: Dataset | IterableDataset, where: str, text_column: str | None, use_chat_formatting: bool
) -> Dataset | IterableDataset:
    """The dataset with only the column that is read, under a name that SAELens looks for.

    Args:
        dataset: Any columns.
        where: What messages call it.
        text_column: The column; None to find it.
        use_chat_formatting: Look for conversations.

    Raises:
        ValueError: If there is no such column, several that could be meant, or no row.
    """
    kinds = column_kinds(itertools.islice(dataset, PEEKED_ROWS))
    if not kinds:
        raise ValueError(f"In {where} there are no rows. Use one with data.")
    column = _chosen(kinds, where, text_column, use_chat_formatting)
    if kinds[column] == "tokens" and next(iter(dataset))[column] is None:  # where SAELens looks for the length
        raise ValueError(f"Row 0 of {where} has no token ids in {column!r}. Leave that row out.")
    if len(kinds) > 1:
        dataset = dataset.select_columns([column])
    names = READ_BY_SAELENS["conversation" if use_chat_formatting else kinds[column]]
    return dataset if column in names else dataset.rename_column(column, names[0])


def column_kinds(rows: Iterable[Mapping[str, Any]]) -> dict[str, ColumnKind]:
    """Column -> kind of its first value that is not null."""
    kinds: dict[str, ColumnKind] = {}
    for row in rows:
        for name, value in row.items():
            if kinds.get(name, "empty") == "empty":
                kinds[name] = kind_of_value(value)
        if "empty" not in kinds.values():
            break
    return kinds


def kind_of_value(value: Any) -> ColumnKind:
    """What one cell of a dataset holds."""
    if value is None:
        return "empty"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return "tokens" if value.ndim == 1 and np.issubdtype(value.dtype, np.integer) else "other"
    if not isinstance(value, list):
        return "other"
    if not value:
        return "empty"
    if all(isinstance(each, dict) for each in value):
        return "conversation"
    return "tokens" if all(isinstance(each, int) and not isinstance(each, bool) for each in value) else "other"


def _chosen(kinds: Mapping[str, ColumnKind], where: str, text_column: str | None, use_chat_formatting: bool) -> str:
    there = ", ".join(f"{name!r} ({kind})" for name, kind in kinds.items())
    wanted = "conversations" if use_chat_formatting else "texts or lists of whole numbers"
    allowed = ("conversation", "text") if use_chat_formatting else ("text", "tokens")
    if text_column is not None:
        if text_column not in kinds:
            raise ValueError(f"There is no text_column={text_column!r} in {where}. Its columns are {there}.")
        if kinds[text_column] not in allowed:
            raise ValueError(
                f"Column {text_column!r} of {where} (text_column) does not hold {wanted}. Its columns are {there}."
            )
        return text_column
    found = _by_name(kinds, use_chat_formatting)
    if not found:
        found = [name for name, kind in kinds.items() if kind in allowed and name not in NOT_TOKENS]
    if len(found) == 1:
        return found[0]
    problem = "are several columns that could be read" if found else f"is no column of {wanted}"
    raise ValueError(f"In {where} there {problem}: {there}. Name one with text_column (--text-column).")


def _by_name(kinds: Mapping[str, ColumnKind], use_chat_formatting: bool) -> list[str]:
    """The first column with a usual name and what belongs into it."""
    if use_chat_formatting:
        usual = [(name, ("conversation", "text")) for name in CONVERSATION_NAMES]
    else:
        usual = [*((name, ("tokens",)) for name in TOKEN_NAMES), *((name, ("text",)) for name in TEXT_NAMES)]
    return [name for name, expected in usual if kinds.get(name) in expected][:1]
