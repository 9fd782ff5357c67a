"""Batches of whole token sequences from SAELens's activation store, checked before the model sees them."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from e2e_sae_plugin.data.tokenizer import warn_of_unknown_tokens
from e2e_sae_plugin.seekable_store import RowPosition, SeekableActivationsStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """Between two sequences."""

    epoch: int
    n_sequences: int
    """Drawn in this epoch, the held-out ones included."""
    rows: RowPosition


class _Since:
    """A place, and the digest of the batches since. At least one row of the dataset was read since, so that the digest
    tells whether the dataset, and not only what is left over of a text, is the same."""

    def __init__(self, place: _Place):
        self.place, self.n_batches, self.sha256 = place, 0, hashlib.sha256()

    def add(self, batch: Tensor) -> None:
        self.n_batches += 1
        self.sha256.update(batch.cpu().contiguous().numpy().tobytes())

    @staticmethod
    def digest(tokens: Tensor) -> str:
        return hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()


class TokenStream:
    """Iterator over batches `[n_prompts, context_size]` of token ids, epoch after epoch, less a held-out head.

    Args:
        store: the activation store; only its tokens are used.
        n_prompts: sequences in a batch.
        n_held_out: sequences at the head of the dataset that are kept for evaluation and skipped in every epoch.
        vocabulary: number of token ids that the model knows.

    Raises:
        ValueError: at a batch that the dataset cannot fill, or that holds ids the model does not know.
    """

    def __init__(self, store: SeekableActivationsStore, n_prompts: int, n_held_out: int, vocabulary: int):
        self.store, self.n_prompts, self.vocabulary = store, n_prompts, vocabulary
        self.epoch, self._drawn_this_epoch = 0, 0
        self._n_held_out = n_held_out
        self._before_last: _Place | None = None
        self._since: _Since | None = None
        self._again: Tensor | None = None
        self._has_looked = False
        self.held_out: Tensor | None = None
        self.n_held_out_rows = self._first_row = self._last_row = 0
        if n_held_out:
            with self.store.holding_out():
                self.held_out = self._stack([self._draw(what="the held-out sequences") for _ in range(n_held_out)])
            self.n_held_out_rows = self.store.n_rows_read
            self._first_row = self.n_held_out_rows - bool(len(self.store.position().rest))

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Tensor:
        if self._again is not None:
            batch, self._again = self._again, None
            return batch
        before = self._place()
        sequences: list[Tensor] = []
        while len(sequences) < self.n_prompts:
            try:
                sequences.append(self._draw(what="one batch"))
            except _EpochEnded:
                self._start_epoch()
        batch = self._stack(sequences)
        self._last_row = max(self._last_row, self.store.n_rows_read - 1)
        self._before_last = before
        if self._since is None or self.store.position().n_rows > before.rows.n_rows or self.epoch > before.epoch:
            self._since = _Since(before)
        self._since.add(batch)
        return batch

    def _place(self) -> _Place:
        return _Place(self.epoch, self._drawn_this_epoch, self.store.position())

    def rows(self) -> dict[str, int]:
        """First and last row that was trained on, how many epochs have begun, and how many sequences are held out."""
        return {
            "first_row": self._first_row,
            "last_row": self._last_row,
            "epochs": self.epoch + 1,
            "held_out_sequences": self._n_held_out,
        }

    def describe_last_batch(self) -> str:
        """Where in the data the batch that was drawn last lies, for messages."""
        if self._before_last is None:
            return "before the first batch"
        first, rows = self._before_last.n_sequences, self._before_last.rows
        return (
            f"sequences {first} to {first + self.n_prompts - 1} of epoch {self._before_last.epoch + 1} (from dataset row "
            f"{max(rows.n_rows - bool(len(rows.rest)), 0)} on)"
        )

    # Resuming.

    def state(self, *, last_is_trained: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `resume` needs, as JSON and as tensors: a place a few batches back, and the digest of the batches since.

        Args:
            last_is_trained: False when the last batch was drawn but not trained on, so that it comes again.
        """
        since = self._since or _Since(self._place())
        state: dict[str, Any] = {
            "epoch": since.place.epoch,
            "n_sequences": since.place.n_sequences,
            "n_rows": since.place.rows.n_rows,
            "rows_state": since.place.rows.rows_state,
            "n_prompts": self.n_prompts,
            "held_out_sha256": None if self.held_out is None else _Since.digest(self.held_out),
            "last_row": self._last_row,
            "n_batches": since.n_batches,
            "batches_sha256": since.sha256.hexdigest(),
            "last_is_trained": last_is_trained,
        }
        return state, {"rest": since.place.rows.rest.cpu().clone()}

    def resume(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on where `state` was taken. The last batch before is drawn again, and must be the same.

        Raises:
            ValueError: the data, or what is held out of it, is not what the state was taken with.
        """
        held_out = None if self.held_out is None else _Since.digest(self.held_out)
        if held_out != state["held_out_sha256"]:
            raise ValueError(
                "The held-out sequences at the head of the dataset are not those that the checkpoint was made with, so the "
                "run cannot go on with the same data. Use the same dataset, tokenizer, n_eval_batches, "
                "eval_batch_size_prompts (or store_batch_size_prompts where that is None) and evaluation tokens; give a "
                "shuffle() its seed."
            )
        self._last_row = state.get("last_row", 0)
        rows = RowPosition(state["n_rows"], tensors["rest"], state["rows_state"])
        place = _Place(state["epoch"], state["n_sequences"], rows)
        # Should `datasets` not find back to its own state, reading everything again does.
        attempts = [place] if rows.rows_state is None else [place, replace(place, rows=replace(rows, rows_state=None))]
        if not any(self._goes_on_from(attempt, state) for attempt in attempts):
            raise ValueError(
                f"The dataset is not the one that the checkpoint was made with: from sequence {place.n_sequences} of epoch "
                f"{place.epoch + 1} (dataset row {rows.n_rows}) on it holds other tokens than those that were trained on. "
                "Use the same dataset, in the same order (give a shuffle() its seed), and the same tokenizer."
            )

    def _goes_on_from(self, place: _Place, state: dict[str, Any]) -> bool:
        """Seek, and draw again what was drawn there; whether it is the same."""
        self.store.seek(place.rows)
        self.epoch, self._drawn_this_epoch = place.epoch, place.n_sequences
        self._since, self._again = None, None
        batch = None
        try:
            for _ in range(state["n_batches"]):
                batch = next(self)
        except (ValueError, StopIteration):
            return False
        since = self._since or _Since(place)
        self._again = None if state["last_is_trained"] else batch
        return since.n_batches == state["n_batches"] and since.sha256.hexdigest() == state["batches_sha256"]

    # Drawing.

    def _draw(self, what: str) -> Tensor:
        try:
            sequence = self.store.get_batch_tokens(1, raise_at_epoch_end=True)[0]
        except (StopIteration, RuntimeError) as stop:
            if isinstance(stop, RuntimeError) and "StopIteration" not in str(stop):
                raise
            trainable = self._drawn_this_epoch - self._n_held_out
            if trainable < self.n_prompts:
                raise ValueError(
                    f"The dataset ran out before {what}: it holds {self._drawn_this_epoch} sequences of "
                    f"context_size={self.store.context_size}, and {self._n_held_out} held out for evaluation plus "
                    f"{self.n_prompts} for one step are needed. Use more data, a smaller train_batch_size_tokens or "
                    "n_eval_batches, or a shorter context_size."
                ) from None
            raise _EpochEnded from None
        if sequence.shape != (self.store.context_size,):
            raise ValueError(
                f"Sequence {self._drawn_this_epoch} of the dataset (epoch {self.epoch + 1}) has {sequence.shape[0]} tokens, "
                f"expected context_size={self.store.context_size}. Drop shorter rows from the pre-tokenised dataset, or "
                "lower context_size."
            )
        self._drawn_this_epoch += 1
        return sequence

    def _start_epoch(self) -> None:
        self._last_row = max(self._last_row, self.store.n_rows_read - 1)
        self.epoch += 1
        self._drawn_this_epoch = 0
        logger.warning("The dataset is exhausted; epoch %d begins.", self.epoch + 1)
        for _ in range(self._n_held_out):
            self._draw(what="the held-out sequences")

    def _stack(self, sequences: list[Tensor]) -> Tensor:
        tokens = torch.stack(sequences)
        if not self._has_looked and (tokenizer := getattr(self.store.model, "tokenizer", None)) is not None:
            warn_of_unknown_tokens(tokens, tokenizer)
        self._has_looked = True
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocabulary:
            raise ValueError(
                f"The dataset holds token id {high if high >= self.vocabulary else low} (up to sequence "
                f"{self._drawn_this_epoch} of epoch {self.epoch + 1}), but the model knows ids 0 to {self.vocabulary - 1}. "
                "It was tokenised for another model; use a dataset made with this model's tokenizer."
            )
        return tokens


class _EpochEnded(Exception):
    pass


def check_evaluation_tokens(tokens: object, context_size: int, vocabulary: int) -> None:
    """Refuse, before the first step, tokens that an evaluation could not run on.

    Raises:
        ValueError: not integers `[n_prompts, context_size]`, no prompt, or ids that the model does not know.
    """
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(
            "override_evaluation_tokens must be a tensor of integer token ids, got "
            + (f"one of {tokens.dtype}." if isinstance(tokens, Tensor) else f"{type(tokens).__name__}.")
        )
    if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] != context_size:
        raise ValueError(
            f"override_evaluation_tokens must be [n_prompts, context_size] with context_size={context_size} and at least "
            f"one prompt, got shape {tuple(tokens.shape)}."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"override_evaluation_tokens holds token ids {int(tokens.min())} to {int(tokens.max())}, but the model knows "
            f"ids 0 to {vocabulary - 1}. Was it made with another tokenizer?"
        )
