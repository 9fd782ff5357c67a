"""Text that every user has: the source of the running interpreter's own standard library.

Files are assigned to the train or the evaluation split by a hash of their path inside the library, so that a file
stays on its side of the split across machines and Python versions: what the bundled model was trained on is never
what an SAE on it is evaluated on.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from pathlib import Path
from typing import Literal

Split = Literal["train", "evaluation"]

# Not on every machine (tests, which some distributions leave out), or tables rather than text.
EXCLUDED_DIRECTORIES = frozenset(
    {"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "dist-packages", "test", "tests"}
)
EVALUATION_SHARE_PERCENT = 10


def split_of(relative_path: str) -> Split:
    """The split that a file belongs to, from its POSIX path relative to the standard library alone."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % 100
    return "evaluation" if bucket < EVALUATION_SHARE_PERCENT else "train"


def stdlib_files(split: Split, root: Path | None = None, *, include_tests: bool = False) -> list[Path]:
    """The `.py` files of one split, sorted by path.

    Args:
        split: `"train"` (90 % of the files) or `"evaluation"`.
        root: folder to read instead of the running interpreter's standard library.
        include_tests: also take folders named `test` or `tests` (the bundled model was trained with them).

    Raises:
        ValueError: an unknown split.
        FileNotFoundError: the folder holds no Python source (an embedded interpreter that ships only byte code).
    """
    if split not in ("train", "evaluation"):
        raise ValueError(f"split must be 'train' or 'evaluation', got {split!r}.")
    root = root or Path(sysconfig.get_paths()["stdlib"])
    excluded = EXCLUDED_DIRECTORIES - {"test", "tests"} if include_tests else EXCLUDED_DIRECTORIES
    found = [
        path for path in sorted(root.rglob("*.py")) if not excluded.intersection(path.relative_to(root).parts[:-1])
    ]
    if not found:
        raise FileNotFoundError(
            f"No Python source below {root}. The demo reads the standard library of the running interpreter; "
            "use an interpreter that ships its .py files, or pass root= a folder of Python source."
        )
    return [path for path in found if split_of(path.relative_to(root).as_posix()) == split]


def read_source(path: Path) -> str | None:
    """The text of one source file in its declared encoding, or None where it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # the library's own test data holds files that are broken on purpose
        return None


def stdlib_texts(split: Split, root: Path | None = None, *, include_tests: bool = False) -> list[str]:
    """The texts of one split (see `stdlib_files`), without files that are empty or cannot be decoded."""
    texts = (read_source(path) for path in stdlib_files(split, root, include_tests=include_tests))
    return [text for text in texts if text]
