"""English text that every installation has: the docstrings of the packages that torch and SAELens bring along.

A module belongs to training or to evaluation by a hash of its path, so that no docstring is on both sides.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PACKAGES = (
    "torch", "transformers", "numpy", "pandas", "scipy", "sympy", "networkx", "nltk", "datasets", "huggingface_hub",
    "statsmodels",
)  # fmt: skip
MIN_CHARACTERS = 300
EVALUATION_SHARE = 20  # one module in so many

Split = Literal["train", "evaluation"]


def docstrings(split: Split) -> list[str]:
    """The longer docstrings of one split, one text per module; a package that is not installed is left out."""
    root = Path(sysconfig.get_paths()["purelib"])
    texts: list[str] = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            is_evaluation = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % EVALUATION_SHARE == 0
            if is_evaluation == (split == "train") or "/tests/" in name:
                continue
            if found := _docstrings_of(path):
                texts.append("\n\n".join(found))
    return texts


def _docstrings_of(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return list(dict.fromkeys(text for text in texts if text is not None and len(text) >= MIN_CHARACTERS))


def docstring_tokens(split: Split, tokenizer: PreTrainedTokenizerBase, context_size: int) -> Tensor:
    """Token ids `[sequences, context_size]` in shuffled order: BOS, then consecutive tokens of texts joined by token 0."""
    ids: list[int] = []
    for text in tokenizer(docstrings(split), add_special_tokens=False)["input_ids"]:  # pyright: ignore[reportGeneralTypeIssues]
        ids += [*text, 0]  # <|endoftext|> of SmolLM2  # pyright: ignore[reportGeneralTypeIssues]
    rows = torch.tensor(ids[: len(ids) - len(ids) % (context_size - 1)]).view(-1, context_size - 1)
    rows = torch.nn.functional.pad(rows, (1, 0), value=tokenizer.bos_token_id)  # pyright: ignore[reportArgumentType]
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
