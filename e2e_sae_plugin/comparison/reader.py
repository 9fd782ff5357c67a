"""`Reader`: token sequences of some rows of a dataset, as an SAE's run would make them."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor

from e2e_sae_plugin.build import quiet_override_warning
from e2e_sae_plugin.data import DataSettings, load_data
from e2e_sae_plugin.data.load import check_tokenized_for
from e2e_sae_plugin.data.rows import TrainedRows, same_dataset
from e2e_sae_plugin.data.tokenizer import check_tokenizer, vocabulary_of, warn_of_unknown_tokens
from e2e_sae_plugin.seekable_store import SeekableActivationsStore

SAMPLED_ROWS = 200
READ_AHEAD_SEQUENCES = 640
"""What SAELens's buffer holds by default, of which not all may be trained on."""
MARGIN = 10
"""A tenth more rows than estimated."""


def _joining(sae: SAE[Any]) -> tuple[Any, Any]:
    """How its run joined texts."""
    return sae.cfg.metadata.sequence_separator_token, sae.cfg.metadata.disable_concat_sequences


class Reader:
    """Reads one dataset for one model.

    Args:
        sae: whose metadata say how texts become sequences.
        model: the language model.
        settings: the dataset; its first row is said at each reading.
        context_size: tokens in a sequence.
        prepend_bos: begin each sequence with BOS.

    Raises:
        ValueError: If the dataset cannot be read.
    """

    def __init__(self, sae: SAE[Any], model: Any, settings: DataSettings, context_size: int, prepend_bos: bool):
        self.sae, self.model, self.settings = sae, model, settings
        self.context_size, self.prepend_bos = context_size, prepend_bos
        self.dataset: Any = load_data(replace(settings, skip_examples=0, max_examples=None), context_size)
        self.is_tokenized = bool({"tokens", "input_ids"} & next(iter(self.dataset)).keys())
        tokenizer = getattr(model, "tokenizer", None)
        if self.is_tokenized:
            check_tokenized_for(settings.dataset_path, tokenizer)
        elif tokenizer is not None:
            check_tokenizer(tokenizer, vocabulary_of(model), prepend_bos=prepend_bos)

    def read(self, first_row: int, n_sequences: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """At most so many sequences from a row on, and the first and last row that they took; ([], []) for none."""
        store = self._store(first_row)
        sequences: list[Tensor] = []
        try:
            while store is not None and len(sequences) < n_sequences:
                sequences.append(store.get_batch_tokens(1, raise_at_epoch_end=True)[0].cpu())
        except (StopIteration, RuntimeError) as stop:
            if isinstance(stop, RuntimeError) and "StopIteration" not in str(stop):
                raise
        if store is None or not sequences:
            return [], []
        if not self.is_tokenized:
            warn_of_unknown_tokens(torch.stack(sequences), self.model.tokenizer)
        return sequences, [(first_row, first_row + store.n_rows_read - 1)]

    def _store(self, first_row: int) -> SeekableActivationsStore | None:
        """SAELens's store over the rows; None if there are none."""
        metadata = self.sae.cfg.metadata
        dataset = self.dataset.skip(first_row) if first_row else self.dataset
        n = self.settings.max_examples
        if n is not None:
            dataset = dataset.take(min(n, len(dataset)) if hasattr(dataset, "__len__") else n)
        if hasattr(dataset, "__len__") and not len(dataset):
            return None
        with quiet_override_warning(True), warnings.catch_warnings():
            for advice in ("The training dataset contains fewer samples", "Dataset is not tokenized"):  # for training
                warnings.filterwarnings("ignore", message=advice)
            try:
                store = SeekableActivationsStore(
                    model=self.model,
                    dataset=dataset,
                    streaming=self.settings.streaming,
                    hook_name=metadata.hook_name or "",
                    hook_head_index=metadata.hook_head_index,
                    context_size=self.context_size,
                    d_in=self.sae.cfg.d_in,
                    n_batches_in_buffer=2,
                    total_training_tokens=self.context_size,
                    store_batch_size_prompts=1,
                    train_batch_size_tokens=self.context_size,
                    prepend_bos=self.prepend_bos,
                    normalize_activations="none",
                    device=torch.device("cpu"),
                    dtype="float32",
                    disable_concat_sequences=bool(metadata.disable_concat_sequences),
                    sequence_separator_token=metadata.sequence_separator_token or "bos",
                    use_chat_formatting=self.settings.use_chat_formatting,
                )
            except StopIteration:  # a streamed dataset that ends before this row
                return None
        store.source = repr(self.settings.dataset_path)
        return store

    def reads_like(self, saes: Sequence[SAE[Any]]) -> bool:
        """Return whether texts become the same sequences as in the runs of these SAEs."""
        ours = (self.prepend_bos, *_joining(self.sae))
        return all((each.cfg.metadata.prepend_bos, *_joining(each)) == ours for each in saes)

    def estimated_rows(self, sae: SAE[Any]) -> list[TrainedRows]:
        """About which rows an SAE of SAELens was trained on, whose record has its dataset and the number of tokens.

        SAELens trains from the head of the dataset on. Rather too many rows than too few.
        """
        metadata = sae.cfg.metadata
        n_tokens, dataset = metadata.training_tokens, metadata.dataset_path
        is_known = (
            isinstance(n_tokens, int) and bool(dataset) and same_dataset(str(dataset), self.settings.dataset_path)
        )
        if not is_known or self.settings.shuffle_seed is not None:
            return []
        context_size = metadata.context_size or self.context_size
        n_tokens += READ_AHEAD_SEQUENCES * context_size
        n = math.ceil(n_tokens / (context_size if self.is_tokenized else self._tokens_per_row()))
        n += n // MARGIN
        n_rows = len(self.dataset) if hasattr(self.dataset, "__len__") else None
        return [
            TrainedRows(
                dataset_path=self.settings.dataset_path,
                first_row=0,
                last_row=n - 1,
                epochs=1 if n_rows is None or n < n_rows else 2,
                training_tokens=metadata.training_tokens,
                n_rows=n_rows,
                context_size=self.context_size,
                split=self.settings.split,
            )
        ]

    def _tokens_per_row(self) -> float:
        rows = [next(iter(row.values())) for row in itertools.islice(self.dataset, SAMPLED_ROWS)]
        lengths = [len(self.model.tokenizer(row)["input_ids"]) for row in rows if isinstance(row, str)]
        return max(1.0, sum(lengths) / max(1, len(lengths)))
