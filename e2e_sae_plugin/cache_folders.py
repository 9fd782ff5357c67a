"""Cache folders of Hugging Face that cannot be written: which one it is, and the variable that moves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import config as datasets_config
from huggingface_hub import constants


def cache_problem(error: OSError) -> str | None:
    """Explain an error at a cache folder, or at a folder above one that had to be created; None for other errors."""
    if not isinstance(error.filename, str):
        return None
    path = Path(error.filename)
    folders = {
        "HF_DATASETS_CACHE": Path(datasets_config.HF_DATASETS_CACHE),
        "HF_HUB_CACHE": Path(constants.HF_HUB_CACHE),
    }
    for variable, folder in folders.items():
        is_within = folder in path.parents and not isinstance(error, FileNotFoundError)
        if path == folder or path in folder.parents or is_within:
            return (
                f"The cache folder {str(folder)!r} cannot be written: {error.strerror} ({error.filename!r}). Set "
                f"{variable}, or HF_HOME for all of Hugging Face's caches, to a folder that can be, for instance "
                "HF_HOME=/tmp/huggingface."
            )
    return None


@contextmanager
def explained_cache_errors() -> Iterator[None]:
    """Explain errors at cache folders.

    Raises:
        OSError: If a cache folder cannot be written, in these words; other errors pass unchanged.
    """
    try:
        yield
    except OSError as error:
        problem = cache_problem(error)
        if problem is None:
            raise
        raise OSError(problem) from error
