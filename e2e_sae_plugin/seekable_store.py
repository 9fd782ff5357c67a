"""SAELens's activation store, whose token sequences can be gone back to without reading what came before."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from e2e_sae_plugin.data.tokenizer import added_tokens

logger = logging.getLogger(__name__)

ENDLESS = 1000
SHORT_TEXT, SHORT_TOKENS = 200, 8
"""Rows of fewer characters, or token ids, such as lines of a file, are equal by chance."""


def _no_tokens() -> Tensor:
    return torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class RowPosition:
    """Where a store stands in its dataset after a sequence."""

    n_rows: int = 0
    """Rows that were read since the dataset's beginning."""
    rest: Tensor = field(default_factory=_no_tokens)
    """`[n]`, the tokens of the last of those rows that no sequence has taken yet."""
    rows_state: dict[str, Any] | None = None
    """What `datasets` needs to go on after that row, for a streamed dataset without a shuffle buffer."""


class SeekableActivationsStore(ActivationsStore):
    """Adds `position` and `seek` to SAELens's store; the sequences and their order are the store's own.

    The host can only start a dataset from its beginning, and what it saves does not tell how much of a text is left
    over. Here map-style datasets are sliced, streamed ones continue from `datasets`' own `state_dict`, and the left-over
    tokens of a text are part of the position.
    """

    _start: RowPosition = RowPosition()
    _n_rows = 0
    _pieces: tuple[Tensor, ...] = ()
    _rest: Tensor | None = None
    _has_empty_rows = False
    _is_holding_out = False
    _held_out: set[int] | None = None
    """Digests of rows that are held out."""
    _n_held_out_rows = 0
    _has_repeats = False
    _n_repeats = 0
    """In a row."""
    source: str = "the dataset"
    """What messages call the data."""

    def position(self) -> RowPosition:
        """After the last sequence that was drawn; cheap, and later draws do not change it."""
        rest = _no_tokens() if self._rest is None else self._rest
        if self._start.n_rows:  # sought, and so far only left-over tokens were needed
            return replace(self._start, rest=rest)
        dataset = self.dataset
        if not isinstance(dataset, IterableDataset) or self._n_rows == 0 or has_shuffle_buffer(dataset):
            return RowPosition(self._n_rows, rest)
        return RowPosition(self._n_rows, rest, dataset.state_dict())

    def seek(self, position: RowPosition) -> None:
        """The next sequence is the one that came after `position`.

        Without a `rows_state` a streamed dataset is read again up to there, row by row but without tokenising.
        """
        self._start = position
        self._n_rows, self._rest = position.n_rows, position.rest
        self.n_dataset_processed = position.n_rows
        self.iterable_sequences = self._iterate_tokenized_sequences()

    def _rows_after(self, start: RowPosition) -> Iterable[Any]:
        dataset: Any = self.dataset
        if start.n_rows == 0:
            return dataset
        if isinstance(dataset, Dataset):
            return dataset.skip(start.n_rows)
        if isinstance(dataset, IterableDataset) and start.rows_state is not None:
            return _continued(dataset, start.rows_state)
        logger.warning(
            "The dataset cannot jump to its place (what is in a shuffle buffer, for one, is not part of its state): "
            "reading %d rows again up to there.",
            start.n_rows,
        )
        return itertools.islice(dataset, start.n_rows, None)

    def _iterate_raw_dataset(self) -> Generator[Any, None, None]:
        start, self._start = self._start, RowPosition()
        self._n_rows = start.n_rows
        rows = iter(self._rows_after(start))
        while (row := self._next_row(rows)) is not None:
            self._n_rows += 1
            value = row[self.tokens_column]
            if value is None:
                self._warn_of_empty_row()
            else:
                if self._n_rows == start.n_rows + 1 or not self.is_dataset_tokenized:
                    self._check_type(value)
                if not self._is_held_out(value):
                    # The host makes a tensor of it, and torch warns where it is one.
                    yield value.numpy() if isinstance(value, Tensor) else value
            self.n_dataset_processed += 1

    def _next_row(self, rows: Iterator[Any]) -> Any:
        """The next row; None at the end."""
        try:
            return next(rows, None)
        except (UnicodeDecodeError, pa.ArrowInvalid, DatasetsError) as error:  # of a streamed file
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.source} cannot be read after row {self._n_rows - 1}: {reason}. Expected text in UTF-8, or token ids."
            ) from error

    @property
    def n_rows_read(self) -> int:
        """Rows that were read since the dataset's beginning."""
        return self._n_rows

    @contextmanager
    def holding_out(self) -> Iterator[None]:
        """Hold out what is read meanwhile: later, rows that are equal to one of these are left out, as a dataset may repeat
        itself or hold a text twice. Short rows, which are equal by chance, stay.
        """
        self._held_out, self._is_holding_out = set(), True
        yield
        self._is_holding_out, self._n_held_out_rows = False, self._n_rows

    def _is_held_out(self, value: Any) -> bool:
        """Return whether this row was held out at another place of the dataset."""
        if self._held_out is None or (len(value) < self._short(value)):
            return False
        digest = _digest(value)
        if self._is_holding_out:
            self._held_out.add(digest)
            return False
        if digest not in self._held_out or self._n_rows <= self._n_held_out_rows:
            self._n_repeats = 0
            return False
        self._n_repeats += 1
        if self._n_repeats > 2 * self._n_held_out_rows + ENDLESS:
            raise ValueError(
                f"{self.source} repeats rows that are held out for evaluation, and has no others. Use more data, or a "
                "smaller n_eval_batches."
            )
        if not self._has_repeats:
            logger.warning(
                "Row %d of %s is one that is held out for evaluation. Such rows are left out of training: the dataset "
                "repeats itself, or holds a text twice.",
                self._n_rows - 1, self.source,
            )  # fmt: skip
        self._has_repeats = True
        return True

    def _short(self, value: Any) -> int:
        """Rows of a smaller size are equal by chance: none in a stream that repeats itself."""
        if isinstance(self.dataset, IterableDataset) and _has_layer(self.dataset, "Repeat"):
            return 1
        return SHORT_TEXT if isinstance(value, str) else SHORT_TOKENS

    def _warn_of_empty_row(self) -> None:
        if not self._has_empty_rows:
            logger.warning(
                "Row %d of %s has no value in column %r: such rows are left out.",
                self._n_rows - 1, self.source, self.tokens_column,
            )  # fmt: skip
        self._has_empty_rows = True

    def _check_type(self, value: Any) -> None:
        """The host turns numbers of any kind into token ids, and asks a tokenizer that is not there."""
        if self.is_dataset_tokenized:
            tokens = torch.as_tensor(value)
            if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
                raise ValueError(
                    f"Column {self.tokens_column!r} of the dataset holds {tokens.dtype} numbers, expected integer token ids."
                )
        elif getattr(self.model, "tokenizer", None) is None:
            raise ValueError(
                f"The dataset holds text (column {self.tokens_column!r}), but the model has no tokenizer. Pre-tokenise the "
                "dataset (columns 'tokens' or 'input_ids'), or give the model its tokenizer."
            )
        elif not isinstance(value, str) and not self.use_chat_formatting:
            raise ValueError(
                f"Row {self._n_rows - 1} of {self.source} holds a {type(value).__name__} in column {self.tokens_column!r}. "
                "Expected text in every row; leave that row out."
            )

    def _iterate_raw_dataset_tokens(self) -> Generator[Tensor, None, None]:
        rest = self._start.rest.to(self.device)
        if len(rest):
            self._pieces = (*self._pieces, rest)
            yield rest
        before, after = (0, 0) if self.use_chat_formatting else self._added_tokens()
        for tokens in super()._iterate_raw_dataset_tokens():
            tokens = tokens[before : len(tokens) - after]
            if len(tokens):
                self._pieces = (*self._pieces, tokens)
            yield tokens

    def _added_tokens(self) -> tuple[int, int]:
        has_tokenizer = getattr(self.model, "tokenizer", None) is not None
        return added_tokens(self.model) if has_tokenizer else (0, 0)

    def _iterate_tokenized_sequences(self) -> Generator[Tensor, None, None]:
        self._pieces, self._rest = (), None
        tokenizer = getattr(self.model, "tokenizer", None)
        bos = tokenizer.bos_token_id if tokenizer is not None and self.prepend_bos else None
        separator = None if tokenizer is None else get_special_token_from_cfg(self.sequence_separator_token, tokenizer)
        joined = not self.is_dataset_tokenized and not self.disable_concat_sequences
        for sequence in super()._iterate_tokenized_sequences():
            if joined:
                self._rest = untaken_tokens(self._pieces, self.context_size, bos, separator)
                self._pieces = (self._rest,) if len(self._rest) else ()
            else:
                self._pieces = ()
            yield sequence


def _digest(value: Any) -> int:
    if isinstance(value, Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return hash(value.tobytes())
    return hash(value if isinstance(value, str) else repr(value))


def has_shuffle_buffer(dataset: IterableDataset) -> bool:
    """Whether `datasets`' own state of a stream leaves out rows that were read but not yet given out."""
    return _has_layer(dataset, "BufferShuffled")


def _has_layer(dataset: IterableDataset, name: str) -> bool:
    """Return whether one of the layers of which `datasets` makes a stream has a class of this name."""
    layers = [getattr(dataset, "_ex_iterable", None)]
    while layers:
        layer = layers.pop()
        if name in type(layer).__name__:
            return True
        layers += [inner for inner in (getattr(layer, "ex_iterable", None),) if inner is not None]
        layers += getattr(layer, "ex_iterables", [])
    return False


def _continued(dataset: IterableDataset, rows_state: dict[str, Any]) -> Iterator[Any]:
    """The rows from a state on; the next epoch starts from the beginning again."""
    dataset.load_state_dict(rows_state)
    rows = iter(dataset)
    try:
        first = next(rows)  # reads the state
    except StopIteration:
        return
    finally:
        dataset.load_state_dict({})
    yield first
    yield from rows


def untaken_tokens(
    pieces: tuple[Tensor, ...], context_size: int, begin_token_id: int | None, separator_token_id: int | None
) -> Tensor:
    """The end of the last piece that a sequence has left over.

    Args:
        pieces: token ids `[n]` of the texts that went into the sequence, none of them empty.
        context_size: length of the sequence.
        begin_token_id: put before a sequence that does not begin with it; None for no token.
        separator_token_id: put before each further text that does not begin with it; None for no token.

    SAELens's `concat_and_batch_sequences` takes tokens in order and inserts only these, so what is left follows from the
    lengths.
    """
    inserted = int(begin_token_id is not None and int(pieces[0][0]) != begin_token_id)
    if separator_token_id is not None:
        inserted += sum(int(piece[0]) != separator_token_id for piece in pieces[1:])
    n_left = inserted + sum(map(len, pieces)) - context_size
    return pieces[-1][len(pieces[-1]) - n_left :]
