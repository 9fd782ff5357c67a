"""Metadata as text of a model card: without paths of the machine that wrote them, and inert in Markdown and in Python."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformer_lens.loading_from_pretrained import get_official_model_name

from e2e_sae_plugin.demo.bundled import BUNDLED
from e2e_sae_plugin.report.text import escape_markdown, is_finite, number_text, printable

LOCAL_PATH = re.compile(r"\s*(?:[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:)")
# The Hub's first models had no owner; TransformerLens still calls them by these names.
OWNERS = {"gpt2": "openai-community", "distilgpt2": "distilbert"}


def is_local_path(text: str) -> bool:
    """Whether it is a path that means nothing on another machine. A relative path without a leading dot cannot be told
    from `owner/name`."""
    return LOCAL_PATH.match(text) is not None


def without_path(text: str) -> str:
    """The last component of a local path; other text as it is."""
    return PureWindowsPath(text.strip()).name if is_local_path(text) else text  # reads both kinds of slashes


def shown(value: Any) -> str:
    """A value of the metadata, whatever its type, as plain text (not escaped)."""
    if isinstance(value, str):
        return printable(without_path(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{shown(key)}={shown(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return "none" if value is None else printable(str(value))


def markdown(value: Any) -> str:
    """`shown`, so that Markdown shows it letter for letter."""
    return escape_markdown(shown(value))


def python_literal(value: Any) -> str:
    """A JSON value as Python source on one line, all in characters that can be seen."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{python_literal(str(k))}: {python_literal(each)}" for k, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(python_literal, value)) + "]"
    if isinstance(value, float) and not is_finite(value):
        return f'float("{value}")'
    source = repr(value)
    is_plain = isinstance(value, str) and source[0] == "'" and '"' not in value
    return f'"{source[1:-1]}"' if is_plain else source


def weight(value: float) -> str:
    """A weight of the objective, in six significant digits."""
    return number_text(int(value)) if float(value).is_integer() and abs(value) < 1e6 else f"{value:.6g}"


def hub_model(name: Any) -> str | None:
    """The Hub id of a model that SAELens or TransformerLens calls `name`; None where it has none that could be known."""
    if not isinstance(name, str) or name == BUNDLED or is_local_path(name):
        return None
    with contextlib.suppress(ValueError):  # not one of TransformerLens's names: a Hub id already, or not known
        name = get_official_model_name(name)
    owner = OWNERS.get(name.partition("-")[0])
    return hub_id(f"{owner}/{name}" if owner and "/" not in name else name)


def hub_id(name: Any) -> str | None:
    """`owner/name` where it is a legal id of the Hub, else None. (A name without an owner may be anything, such as the
    "json" of a local file.)"""
    if not isinstance(name, str) or name.count("/") != 1 or is_local_path(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
