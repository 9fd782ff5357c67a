"""Which rows of which dataset an SAE was trained on, and which others there are to measure it on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sae_lens import SAE

from e2e_sae_plugin.data.load import LoadedData
from e2e_sae_plugin.data.settings import DataSettings
from e2e_sae_plugin.model_settings import BUNDLED

ROW_ORDER = ("split", "text_column", "shuffle_seed", "streaming")
"""Settings that decide which row has which number."""
RECORD = "training_data"
"""The entry of an SAE's metadata: a list of `TrainedRows`, one for each run."""


@dataclass(frozen=True)
class TrainedRows:
    """The rows that one run trained on. Numbers count rows of the dataset as shuffled, from 0."""

    dataset_path: str | None
    """None for a dataset object."""
    first_row: int
    last_row: int
    """The last one that was read, in any epoch; its end may have been left over."""
    epochs: int
    """Epochs that were begun."""
    training_tokens: int
    held_out_sequences: int = 0
    """Sequences from `read_from` on that were kept for evaluation in every epoch."""
    read_from: int = 0
    """The first row that was read at all."""
    n_rows: int | None = None
    """Rows of the dataset, where its length is known."""
    context_size: int = 0
    split: str | None = None
    text_column: str | None = None
    shuffle_seed: int | None = None
    streaming: bool = False

    @classmethod
    def of_run(cls, data: LoadedData, rows: Mapping[str, int], training_tokens: int, context_size: int) -> TrainedRows:
        """The rows of a run.

        Args:
            data: What it read.
            rows: What its `TokenStream` says, counted from the first row that it could read.
            training_tokens: Tokens that it trained on.
            context_size: Tokens in a sequence.
        """
        settings = data.settings
        n_rows = len(data.dataset) if hasattr(data.dataset, "__len__") else None
        read_from = 0 if settings is None else settings.skip_examples
        names = () if settings is None else ("dataset_path", *ROW_ORDER)
        named = {"dataset_path": None, **{name: getattr(settings, name) for name in names}}
        return cls(
            first_row=read_from + rows["first_row"],
            last_row=read_from + rows["last_row"],
            epochs=rows["epochs"],
            training_tokens=training_tokens,
            held_out_sequences=rows["held_out_sequences"],
            read_from=read_from,
            n_rows=None if n_rows is None else read_from + n_rows,
            context_size=context_size,
            **named,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> TrainedRows:
        """What `to_dict` gave; entries of other versions are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in entries.items() if name in known})

    def is_of(self, settings: DataSettings) -> bool:
        """Return whether it is the same dataset and split, in whatever order."""
        return (
            self.dataset_path is not None
            and same_dataset(self.dataset_path, settings.dataset_path)
            and (self.split or "train") == (settings.split or "train")
        )

    def counts_as(self, settings: DataSettings, context_size: int) -> bool:
        """Return whether its numbers mean the same rows as numbers of `settings`."""
        is_in_order = self.shuffle_seed == settings.shuffle_seed and (
            self.shuffle_seed is None or self.streaming == settings.streaming
        )
        return is_in_order and (not rows_depend_on_context(settings) or self.context_size == context_size)

    def overlap(self, first: int, last: int) -> int:
        """How many of the rows from `first` to `last` were trained on."""
        return max(0, min(last, self.last_row) - max(first, self.first_row) + 1)


def trained_rows(sae: SAE[Any]) -> list[TrainedRows]:
    """What an SAE's record says of the rows that it was trained on; [] if it says nothing."""
    record = sae.cfg.metadata[RECORD]
    if not isinstance(record, Sequence) or isinstance(record, str):
        return []
    return [TrainedRows.from_dict(entry) for entry in record if isinstance(entry, Mapping)]


def same_dataset(first: str, second: str) -> bool:
    """Return whether two names mean one dataset. A path of another machine is compared by its last component."""
    paths = [Path(name).expanduser() for name in (first, second)]
    if all(path.exists() for path in paths):
        return os.path.samefile(*paths)
    return first == second or (any(path.is_absolute() for path in paths) and paths[0].name == paths[1].name)


def rows_depend_on_context(settings: DataSettings) -> bool:
    """Return whether a row is a sequence that the loader cuts."""
    path = Path(settings.dataset_path).expanduser()
    has_token_files = path.suffix == ".bin" or (path.is_dir() and any(path.glob("*.bin")))
    return settings.dataset_path == BUNDLED or has_token_files


@dataclass(frozen=True)
class UnseenRows:
    """Where rows are that none of some SAEs was trained on."""

    after: int | None
    """From this row on; None if the rows to the end were trained on, or that is not known."""
    held_out_from: int = 0
    held_out_sequences: int = 0
    """So many sequences from that row on were held out by all their runs."""
    unknown: tuple[str, ...] = ()
    """Names of SAEs that were trained on the dataset, on rows that are not known."""


def unseen_rows(
    saes: Mapping[str, SAE[Any]], records: Mapping[str, list[TrainedRows]], settings: DataSettings, context_size: int
) -> UnseenRows:
    """Rows of a dataset that none of the SAEs was trained on.

    Args:
        saes: By name.
        records: By the same names, from `trained_rows` or estimated.
        settings: The dataset that is to be read.
        context_size: Tokens in a sequence.
    """
    ours = [(name, each) for name, record in records.items() for each in record if each.is_of(settings)]
    known = [each for _, each in ours if each.counts_as(settings, context_size)]
    unknown = [name for name, each in ours if not each.counts_as(settings, context_size)]
    for name, sae in saes.items():
        dataset, has_named_rows = sae.cfg.metadata.dataset_path, any(each.dataset_path for each in records[name])
        if dataset and not has_named_rows and same_dataset(str(dataset), settings.dataset_path):
            unknown.append(name)
    if not known:
        return UnseenRows(0, unknown=tuple(dict.fromkeys(unknown)))
    is_once = all(each.epochs == 1 for each in known)
    starts = {each.read_from for each in known}
    is_one_head = len(starts) == 1 and all(each.context_size == context_size for each in known)
    return UnseenRows(
        after=max(each.last_row for each in known) + 1 if is_once else None,
        held_out_from=min(starts),
        held_out_sequences=min(each.held_out_sequences for each in known) if is_one_head else 0,
        unknown=tuple(dict.fromkeys(unknown)),
    )


def overlap_share(records: Iterable[TrainedRows], rows: Sequence[tuple[int, int]]) -> float:
    """The share of the rows, given as (first, last) ranges, that some run trained on."""
    trained: set[int] = set()
    n = 0
    for first, last in rows:
        n += last - first + 1
        for each in records:
            trained |= set(range(max(first, each.first_row), min(last, each.last_row) + 1))
    return len(trained) / n if n else 0.0
