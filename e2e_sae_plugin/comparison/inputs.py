"""The model and the text that SAEs are measured with, from their metadata or from flags."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor

from e2e_sae_plugin.build import load_language_model
from e2e_sae_plugin.comparison.reader import Reader
from e2e_sae_plugin.data import DataSettings
from e2e_sae_plugin.data.rows import ROW_ORDER, TrainedRows, UnseenRows, overlap_share, trained_rows, unseen_rows
from e2e_sae_plugin.data.settings import text_name
from e2e_sae_plugin.demo.bundled import BUNDLED
from e2e_sae_plugin.demo.data import demo_tokens
from e2e_sae_plugin.evaluation.tokens import MeasuredTokens
from e2e_sae_plugin.finetune.recipe import DTYPES
from e2e_sae_plugin.splice.given_model import check_context

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = 128
OTHERS = "Measure on other text (--dataset), or on rows that it has not seen (--skip-examples)."


def load_model_of(
    sae: SAE[Any],
    *,
    model_name: str | None = None,
    model_class_name: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> Any:
    """The language model that an SAE's metadata name, or the one that is given.

    Raises:
        ValueError: no model is known, or a setting that it has no use for.
    """
    metadata = sae.cfg.metadata
    name = model_name or metadata.model_name
    if not name:
        raise ValueError("The SAE's metadata name no model. Give model_name (--model).")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"The model's dtype (--model-dtype) must be one of {list(DTYPES)}, got {dtype!r}.")
    model_class = model_class_name or metadata.model_class_name or "HookedTransformer"
    kwargs = metadata.model_from_pretrained_kwargs
    if kwargs is None:  # SAELens's own default
        kwargs = {"center_writing_weights": False} if model_class == "HookedTransformer" else {}
    return load_language_model(model_class, name, device, {**kwargs, **({} if dtype is None else {"dtype": dtype})})


def dataset_of(sae: SAE[Any], dataset: str | None = None) -> str | None:
    """The dataset that is given, else the one that an SAE's metadata name; the bundled model has its own."""
    metadata = sae.cfg.metadata
    return dataset or (BUNDLED if metadata.model_name == BUNDLED else metadata.dataset_path)


@dataclass(frozen=True)
class TextSettings:
    """What text is measured on. None: as the first SAE's metadata say.

    Args:
        dataset_path: The dataset, as in `DataSettings`; so are the other settings of rows.
        split: See `DataSettings`.
        text_column: See `DataSettings`.
        shuffle_seed: See `DataSettings`.
        skip_examples: The first row. Default: rows that the SAEs were not trained on.
        max_examples: The most rows.
        streaming: See `DataSettings`.
        context_size: Tokens in a sequence; default 128 where the metadata say nothing.
        prepend_bos: Begin each sequence with BOS; default True where the metadata say nothing.
    """

    dataset_path: str | None = None
    split: str | None = None
    text_column: str | None = None
    shuffle_seed: int | None = None
    skip_examples: int | None = None
    max_examples: int | None = None
    streaming: bool | None = None
    context_size: int | None = None
    prepend_bos: bool | None = None

    def data(self, sae: SAE[Any]) -> DataSettings:
        """The dataset with its rows; where the SAE's record is of the same dataset, in the order of the record.

        Raises:
            ValueError: If no dataset is known, or a setting is out of range.
        """
        dataset = dataset_of(sae, self.dataset_path)
        if not dataset:
            raise ValueError("The SAE's metadata name no dataset. Give dataset (--dataset).")
        names = [field.name for field in fields(DataSettings) if hasattr(self, field.name)]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        settings = DataSettings(**{**given, "dataset_path": dataset})
        recorded = next((each for each in reversed(trained_rows(sae)) if each.is_of(settings)), None)
        if recorded is None:
            return settings
        order = {name: getattr(recorded, name) for name in ROW_ORDER if name not in given}
        return replace(settings, **order)


def evaluation_tokens(
    saes: Mapping[str, SAE[Any]], model: Any, n_tokens: int, text: TextSettings | None = None
) -> tuple[Tensor, MeasuredTokens]:
    """Sequences `[n_prompts, context_size]` of about `n_tokens`, and where they come from.

    They are of rows that none of the SAEs was trained on, as far as their records tell: those after the rows that they were
    trained on, then those that their runs held out. Where there are none, a warning says how many they share with training.
    Of the bundled model's text they are files that neither it nor an SAE was trained on.

    Args:
        saes: By name; the first one's metadata give what is not given.
        model: Their language model.
        n_tokens: About how many tokens.
        text: Which text; None for what the metadata say.

    Raises:
        ValueError: If no dataset is known, it has no sequence, or sequences of that size cannot be.
    """
    first, text = next(iter(saes.values())), text or TextSettings()
    context = _context_size(first, model, text.context_size)
    n_prompts = max(1, n_tokens // context)
    settings = text.data(first)
    where = settings.dataset_path
    if is_bundled_text(settings):
        bundled = demo_tokens("evaluation", context)[:n_prompts]
        return bundled, MeasuredTokens(len(bundled), context, dataset=BUNDLED, split="evaluation")
    recorded = first.cfg.metadata.prepend_bos
    prepend_bos = next((each for each in (text.prepend_bos, recorded) if each is not None), True)
    reader = Reader(first, model, settings, context, prepend_bos)
    records = {name: trained_rows(sae) or reader.estimated_rows(sae) for name, sae in saes.items()}
    tokens: list[Tensor] = []
    rows: list[tuple[int, int]] = []
    if text.skip_examples is None:
        unseen = unseen_rows(saes, records, settings, context)
        tokens, rows = _unseen(unseen, reader, n_prompts, list(saes.values()))
        for name in unseen.unknown:
            logger.warning("%s was trained on %s too, on rows that its record does not tell. %s", name, where, OTHERS)
    if not tokens:
        tokens, rows = reader.read(settings.skip_examples, n_prompts)
        _warn_of_overlap(records, settings, context, rows)
    if len(tokens) < n_prompts:
        logger.warning("%s has only %d of the %d sequences of %d tokens.", where, len(tokens), n_prompts, context)
    if not tokens:
        raise ValueError(f"{where!r} has no sequence of {context} tokens. Use more text, or a smaller context_size.")
    source = MeasuredTokens(
        n_sequences=len(tokens),
        context_size=context,
        dataset=text_name(settings.dataset_path),
        split=settings.split,
        text_column=settings.text_column,
        shuffle_seed=settings.shuffle_seed,
        rows=tuple(rows),
        prepend_bos=None if reader.is_tokenized else prepend_bos,
    )
    logger.info("Measured on %s.", source)
    return torch.stack(tokens), source


def is_bundled_text(settings: DataSettings) -> bool:
    """Return whether it is the bundled model's text, of which evaluation has files of its own."""
    rows = (settings.shuffle_seed, settings.max_examples, settings.split, settings.text_column)
    return settings.dataset_path == BUNDLED and rows == (None,) * 4 and not settings.skip_examples


def _context_size(sae: SAE[Any], model: Any, given: int | None) -> int:
    context = (sae.cfg.metadata.context_size or DEFAULT_CONTEXT) if given is None else given
    if context < 2:
        raise ValueError(f"context_size (--context-size) must be at least 2, got {context}.")
    check_context(model, context)
    return context


def _unseen(
    unseen: UnseenRows, reader: Reader, n_prompts: int, saes: Sequence[SAE[Any]]
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Sequences of rows that the SAEs were not trained on: after those that they were, then those held out."""
    tokens: list[Tensor] = []
    rows: list[tuple[int, int]] = []
    if unseen.after is not None:
        tokens, rows = reader.read(unseen.after, n_prompts)
    n_more = min(n_prompts - len(tokens), unseen.held_out_sequences)
    if n_more > 0 and reader.reads_like(saes):
        more, more_rows = reader.read(unseen.held_out_from, n_more)
        tokens, rows = tokens + more, rows + more_rows
    return tokens, rows


def _warn_of_overlap(
    records: Mapping[str, list[TrainedRows]], settings: DataSettings, context_size: int, rows: Sequence[tuple[int, int]]
) -> None:
    """Say by how much the rows are those that an SAE was trained on."""
    for name, record in records.items():
        known = [each for each in record if each.is_of(settings) and each.counts_as(settings, context_size)]
        if share := overlap_share(known, rows):
            logger.warning("%s was trained on %.0f%% of the rows that it is measured on. %s", name, 100 * share, OTHERS)
