"""Reading configs that were written by hand: files, keys with their nearest, numbers that YAML reads as text."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml


def names_of(config_class: type) -> set[str]:
    """Of its fields."""
    return {field.name for field in fields(config_class)}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file that --config names.

    Raises:
        ValueError: there is no such file, it is not valid, or it holds no mapping.
    """
    if not path.is_file():
        raise ValueError(f"--config: there is no file {str(path)!r}.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config: {str(path)!r} must hold a mapping of settings, got {type(content).__name__}.")
    return content


def require_known_keys(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Refuse a key that is not known, with the nearest one that is.

    Raises:
        ValueError: names the key.
    """
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Expected some of {sorted(known)}."
            raise ValueError(f"Unknown key {key!r} in {where}.{hint}")


def read_numbers(given: Mapping[str, Any], config_class: type, where: str) -> dict[str, Any]:
    """Numbers as numbers: YAML reads `3e-4` (without a dot) as a string, and `1.0e6` tokens as a float."""
    types = {f.name: f.type for f in fields(config_class)}
    converted = dict(given)
    for key, value in given.items():
        wanted = types.get(key)
        if wanted in (float, float | None) and isinstance(value, str):
            try:
                converted[key] = float(value)
            except ValueError:
                raise ValueError(f"{key} in {where} must be a number, got {value!r}.") from None
        elif wanted in (int, int | None) and isinstance(value, str | float):
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if not number.is_integer():
                raise ValueError(f"{key} in {where} must be a whole number, got {value!r}.")
            converted[key] = int(number)
    return converted
