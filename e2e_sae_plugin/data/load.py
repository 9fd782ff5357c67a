"""`load_data`: one loader for every command, run and evaluation."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    config,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoTokenizer

from e2e_sae_plugin.data.columns import with_read_column
from e2e_sae_plugin.data.files import (
    ALLOWED,
    check_one_kind,
    explained_errors,
    is_saved_to_disk,
    kind_of,
    read_token_files,
)
from e2e_sae_plugin.data.settings import DataSettings
from e2e_sae_plugin.demo.bundled import bundled_dataset

SHUFFLE_BUFFER = 10_000
TOKENIZATION_FILENAME = "sae_lens.json"


def load_data(settings: DataSettings, context_size: int) -> Dataset | IterableDataset:
    """The rows that `settings` name, with one column that SAELens's store reads.

    Args:
        settings: What to read.
        context_size: Tokens in a row of a `.bin` file and of the bundled text.

    Raises:
        ValueError: If there is no such dataset, split or column, or a file cannot be read.
        OSError: If the Hub cannot be reached.
    """
    dataset: Any = bundled_dataset(settings.dataset_path, context_size)
    where = f"the dataset {settings.dataset_path!r}"
    if dataset is None:
        path = Path(settings.dataset_path).expanduser().absolute()
        with explained_errors(path) if path.exists() else contextlib.nullcontext():
            dataset = _local(path, settings, context_size) if path.exists() else _from_hub(settings)
            dataset = with_read_column(dataset, where, settings.text_column, settings.use_chat_formatting)
    elif settings.split is not None or settings.text_column is not None:
        raise ValueError(f"{where} has one split and one column. Leave split and text_column out.")
    dataset = _rows(dataset, settings)
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(
            f"After skip_examples={settings.skip_examples}, {where} has no rows. Lower it, or use more data."
        )
    return dataset


@dataclass(frozen=True)
class LoadedData:
    """A dataset that is ready to be read, and what it is; runs that share it hand it on."""

    dataset: Any
    settings: DataSettings | None
    """None for a dataset object that the user gave, of which nothing is known."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return "override_dataset" if self.settings is None else f"dataset_path={self.settings.dataset_path!r}"


def loaded_data(settings: DataSettings, given: Any, context_size: int) -> LoadedData:
    """What `settings` name, or the dataset that was given.

    Args:
        settings: As in a config.
        given: A dataset object, `LoadedData`, or None to load what is named.
        context_size: As in `load_data`.

    Raises:
        ValueError: As `load_data`, or if a setting has no effect on a dataset object.
    """
    if isinstance(given, LoadedData):
        return given
    if given is None:
        return LoadedData(load_data(settings, context_size), settings)
    settings.check_unused()
    return LoadedData(given, None)


def _local(path: Path, settings: DataSettings, context_size: int) -> Dataset | IterableDataset:
    """A file or folder; its path is absolute, as `datasets` takes a name such as "text" for a kind of file."""
    if path.is_dir() and is_saved_to_disk(path):
        return _saved(path, settings.split)
    files = check_one_kind(path)
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{str(path)!r} is empty. Use data with rows.")
    kind = kind_of(files[0])
    if kind == "bin":
        if settings.split is not None or settings.text_column is not None:
            raise ValueError(f"{str(path)!r} holds token ids alone. Leave split and text_column out.")
        return read_token_files(files, context_size)
    how: dict[str, Any] = {"streaming": settings.streaming}
    if files[0].name.removesuffix(".gz").endswith(".tsv"):
        how["sep"] = "\t"
    with _uncounted():
        if path.is_dir():
            return _split(str(path), settings, **how)
        return _split(str(kind), settings, data_files=str(path), **how)


@contextmanager
def _uncounted() -> Iterator[None]:
    """`datasets` otherwise tells a server that a file of this kind was loaded, and waits where there is no network."""
    before = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _split(name: str, settings: DataSettings, **how: Any) -> Dataset | IterableDataset:
    """The split that is asked for; else "train", or the only one."""
    try:
        return load_dataset(name, split=settings.split or "train", **how)
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"The dataset {settings.dataset_path!r} has no rows. Use one with data.") from error
        is_about_split = "Unknown split" in str(error) or "Bad split" in str(error)
        if not is_about_split:
            raise
    there = ["train"] if "data_files" in how else get_dataset_split_names(name)
    return load_dataset(name, split=_only_split(settings, there), **how)


def _saved(path: Path, split: str | None) -> Dataset:
    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        name = split or "train"
        return dataset[
            name if name in dataset else _only_split(DataSettings(str(path), split), list(map(str, dataset)))
        ]
    if split is not None:
        raise ValueError(f"split={split!r}: the folder {str(path)!r} holds one dataset without splits. Leave it out.")
    return dataset


def _only_split(settings: DataSettings, there: list[str]) -> str:
    if settings.split is None and len(there) == 1:
        return there[0]
    named = "no split 'train'" if settings.split is None else f"no split={settings.split!r}"
    raise ValueError(f"The dataset {settings.dataset_path!r} has {named}. It has {', '.join(there)} (--split).")


def _from_hub(settings: DataSettings) -> Dataset | IterableDataset:
    name = settings.dataset_path
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or kind_of(Path(name)) is not None
    if looks_like_a_path:
        raise ValueError(f"There is no file or folder {name!r}. Expected {ALLOWED}, or a dataset of the Hub.")
    try:
        return _split(name, settings, streaming=settings.streaming)
    except DatasetNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"There is no file or folder {name!r}, and the Hub has no such dataset: {reason} Expected {ALLOWED}, or a "
            "dataset of the Hub."
        ) from error
    except ConnectionError as error:
        raise OSError(f"There is no file or folder {name!r}, and the Hub cannot be asked for it: {error}.") from error


def _rows(dataset: Any, settings: DataSettings) -> Dataset | IterableDataset:
    if settings.shuffle_seed is not None and isinstance(dataset, Dataset):
        dataset = dataset.shuffle(seed=settings.shuffle_seed, keep_in_memory=True)
    elif settings.shuffle_seed is not None:
        dataset = dataset.shuffle(seed=settings.shuffle_seed, buffer_size=SHUFFLE_BUFFER)
    if settings.skip_examples:
        dataset = dataset.skip(settings.skip_examples)
    n = settings.max_examples
    if n is not None and isinstance(dataset, Dataset):
        return dataset.take(min(n, len(dataset)))
    return dataset if n is None else dataset.take(n)


def check_tokenized_for(dataset_path: str, tokenizer: Any) -> None:
    """Reject token ids that another tokenizer made, where SAELens's `sae_lens.json` in the dataset names it.

    Raises:
        ValueError: If the vocabularies differ.
    """
    name, vocabulary = None, None
    # Most datasets have no such file, and some tokenizers are not here: nothing is known then.
    with contextlib.suppress(OSError, HfHubHTTPError, HFValidationError, ValueError, KeyError):
        path: Any = Path(dataset_path) / TOKENIZATION_FILENAME
        if not Path(dataset_path).exists():
            path = hf_hub_download(dataset_path, TOKENIZATION_FILENAME, repo_type="dataset")
        name = json.loads(Path(path).read_text())["tokenizer_name"]
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    if None not in (vocabulary, tokenizer) and vocabulary != tokenizer.get_vocab():
        raise ValueError(
            f"The token ids of {dataset_path!r} were made with the tokenizer of {name!r}, which is not this model's. Use "
            "that model, or other data."
        )
