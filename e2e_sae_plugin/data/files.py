"""Local data: which kind of file something is, token files without a copy, and errors that name file and row."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.exceptions import DatasetsError
from datasets.table import InMemoryTable

logger = logging.getLogger(__name__)

KINDS = {
    ".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".bin": "bin",
}  # fmt: skip
"""File ending -> builder of `datasets`; "bin" is our own."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Descriptions that lie next to data and have a data file's ending.
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "sae_lens.json")
ALLOWED = f"files ({', '.join(KINDS)}), a folder of them, or one that save_to_disk wrote"


def kind_of(path: Path) -> str | None:
    """The kind of a data file by its ending; None for other files."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    return KINDS.get(endings[-1]) if endings else None


def data_files(path: Path) -> list[Path]:
    """The file itself, or all data files of a folder that are not hidden, sorted."""
    if path.is_file():
        return [path]
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    return [
        file for file in inside if kind_of(file) and file.name not in NO_DATA and not _is_hidden(file.relative_to(path))
    ]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def is_saved_to_disk(path: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def check_one_kind(path: Path) -> list[Path]:
    """The data files of a file or folder.

    Raises:
        ValueError: If there are none, or files of several kinds, of which `datasets` would read one.
    """
    files = data_files(path)
    if path.is_file() and kind_of(path) is None:
        raise ValueError(f"{str(path)!r} is not a data file. Expected {ALLOWED}.")
    if not files:
        raise ValueError(f"The folder {str(path)!r} holds no data. Expected {ALLOWED}.")
    kinds = {kind_of(file): file for file in files}
    if len(kinds) > 1 and not _has_configs(path / "README.md"):
        names = " and ".join(str(file.relative_to(path)) for file in list(kinds.values())[:2])
        raise ValueError(
            f"The folder {str(path)!r} holds data files of several kinds, such as {names}. Name one file, or move "
            "the others away."
        )
    return files


def _has_configs(card: Path) -> bool:
    """Return whether a dataset card says which files are data."""
    return card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace")


def read_token_files(files: Sequence[Path], context_size: int) -> Dataset:
    """Memory-mapped files of uint16 token ids, as sparsify reads them, in rows of `context_size` tokens.

    A rest of each file that fills no row is left out.

    Raises:
        ValueError: If a file cannot be that.
    """
    dataset = Dataset(
        InMemoryTable(pa.concat_tables([_token_table(file, context_size) for file in files])),
        fingerprint="-".join(f"{file.name}-{file.stat().st_size}-{file.stat().st_mtime_ns}" for file in files)[:64],
    )
    if not len(dataset):
        raise ValueError(
            f"{', '.join(map(str, files))} holds fewer tokens than one sequence of context_size={context_size}. Use more "
            "data, or a shorter context_size."
        )
    return dataset


def _token_table(file: Path, context_size: int) -> pa.Table:
    n_bytes = file.stat().st_size
    if n_bytes % 2:
        raise ValueError(f"{str(file)!r} has {n_bytes} bytes, which are no uint16 token ids. Write it as uint16.")
    n_rows = n_bytes // 2 // context_size
    buffer = pa.memory_map(str(file)).read_buffer() if n_bytes else pa.py_buffer(b"")
    values = pa.Array.from_buffers(pa.uint16(), n_rows * context_size, [None, buffer])
    first = values[:4096].to_numpy()
    # The upper halves of 32-bit numbers; real tokens are not that alike.
    if len(first) > 64 and first[1::2].max() <= 2 < np.median(first[::2]):
        raise ValueError(
            f"{str(file)!r} seems to hold numbers of 32 bits, not uint16. Write it as uint16, or as parquet."
        )
    return pa.table({"tokens": pa.FixedSizeListArray.from_arrays(values, context_size)})


@contextmanager
def explained_errors(path: Path) -> Iterator[None]:
    """Turn what `datasets` raises at a local file that cannot be read into an error that names file and row.

    Raises:
        ValueError: If a file cannot be read.
    """
    try:
        yield
    except (DatasetsError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(_what_is_wrong(path, error.__cause__ or error)) from error


def _what_is_wrong(path: Path, error: BaseException) -> str:
    for file in data_files(path):
        if isinstance(error, UnicodeDecodeError) and (line := _undecodable_line(file)):
            return f"{str(file)!r}, line {line}, is not UTF-8. Save the file as UTF-8, or leave that line out."
        if isinstance(error, pa.ArrowInvalid) and kind_of(file) == "json" and (line := _bad_json_line(file)):
            return f"{str(file)!r}, line {line}, is not a JSON object. Correct that line, or leave it out."
    reason = " ".join(str(error).split()).rstrip(".")
    return f"{str(path)!r} cannot be read: {reason}. Expected {ALLOWED}, all with the same columns."


def _undecodable_line(file: Path) -> int | None:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return None


def _bad_json_line(file: Path) -> int | None:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                is_object = not line.strip() or isinstance(json.loads(line), dict)
            except ValueError:
                is_object = False
            if not is_object:
                return number
    return None
