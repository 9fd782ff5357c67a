"""Batches of whole token sequences from SAELens's activation store, checked before the model sees them."""

from __future__ import annotations

import logging

import torch
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

logger = logging.getLogger(__name__)


class TokenStream:
    """Iterator over batches `[n_prompts, context_size]` of token ids, epoch after epoch, less a held-out head.

    Args:
        store: SAELens's activation store; only its tokens are used.
        n_prompts: sequences in a batch.
        n_held_out: sequences at the head of the dataset that are kept for evaluation and skipped in every epoch.
        vocabulary: number of token ids that the model knows.

    Raises:
        ValueError: at a batch that the dataset cannot fill, or that holds ids the model does not know.
    """

    def __init__(self, store: ActivationsStore, n_prompts: int, n_held_out: int, vocabulary: int):
        self.store, self.n_prompts, self.vocabulary = store, n_prompts, vocabulary
        self.epoch, self._drawn_this_epoch = 0, 0
        self._n_held_out = n_held_out
        self.held_out: Tensor | None = None
        if n_held_out:
            self.held_out = self._stack([self._draw(what="the held-out sequences") for _ in range(n_held_out)])

    def resumed(self) -> None:
        """The store was moved on in its epoch: how much of it was drawn is not known, but it held a batch before."""
        self._drawn_this_epoch = max(self._drawn_this_epoch, self._n_held_out + self.n_prompts)

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Tensor:
        sequences: list[Tensor] = []
        while len(sequences) < self.n_prompts:
            try:
                sequences.append(self._draw(what="one batch"))
            except _EpochEnded:
                self._start_epoch()
        return self._stack(sequences)

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
        self.epoch += 1
        self._drawn_this_epoch = 0
        logger.warning("The dataset is exhausted; epoch %d begins.", self.epoch + 1)
        for _ in range(self._n_held_out):
            self._draw(what="the held-out sequences")

    def _stack(self, sequences: list[Tensor]) -> Tensor:
        tokens = torch.stack(sequences)
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
