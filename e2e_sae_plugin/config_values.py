"""Values of a config as Python's own: what numpy, torch and pathlib have instead is converted, the rest is refused."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy
import torch

_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a mapping",
    NoneType: "None",
}
_PLURALS = {int: "whole numbers", str: "strings", NoneType: "None"}
# The values of a `Literal` are checked where they are used: SAELens's own lists lack some.
_CLASSES = {str: str, dict: Mapping, NoneType: NoneType, Literal: str}


def plain(value: Any) -> Any:
    """Convert numbers, arrays, paths, dtypes and devices to what JSON has, in lists, tuples and mappings too."""
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, numpy.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
    return value


def plain_as(name: str, value: Any, wanted: Any) -> Any:
    """Convert a value to the type of its field: `plain`, and 256.0 to a whole number, 1 to a switch.

    Args:
        name: The field, for messages.
        value: What was given.
        wanted: The field's type. Types other than numbers, switches, strings, lists and mappings are not checked.

    Raises:
        ValueError: If the value is of another kind.
    """
    given, value = value, plain(value)
    if not _is_of_kind(value, wanted):
        raise ValueError(f"{name} must be {_expected(wanted)}, got {_shown(given)} ({type(given).__name__}).")
    return _converted(value, wanted)


def _kinds(wanted: Any) -> tuple[Any, ...]:
    return get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)


def _is_of_kind(value: Any, wanted: Any) -> bool:
    if len(_kinds(wanted)) > 1:
        return any(_is_of_kind(value, kind) for kind in _kinds(wanted))
    base = get_origin(wanted) or wanted
    if base in (list, tuple):
        return isinstance(value, list | tuple) and all(_is_of_kind(entry, get_args(wanted)[0]) for entry in value)
    if base is bool:
        return isinstance(value, numbers.Integral) and value in (0, 1)
    if base in (int, float):
        return not isinstance(value, bool) and isinstance(value, numbers.Real) and _is_number(value, base)
    if base in _CLASSES:
        return isinstance(value, _CLASSES[base])
    return True


def _is_number(value: numbers.Real, kind: type) -> bool:
    try:
        number = float(value)
    except OverflowError:  # beyond 1e308, where arithmetic with other settings would fail
        return False
    return kind is float or number.is_integer()


def _converted(value: Any, wanted: Any) -> Any:
    # Of bool | int, a 1 stays a number.
    kinds = sorted(_kinds(wanted), key=lambda kind: type(value) is not kind)
    kind = next(kind for kind in kinds if _is_of_kind(value, kind))
    base = get_origin(kind) or kind
    if base in (list, tuple):
        return base(_converted(entry, get_args(kind)[0]) for entry in value)
    if kind is float and type(value) is int:
        return value  # files have what was written
    if kind is str:
        return str.__str__(value)  # of a subclass, such as a member of an enumeration
    return kind(value) if kind in (bool, int, float) else value


def _expected(wanted: Any) -> str:
    return " or ".join(_name_of(kind) for kind in _kinds(wanted))


def _name_of(kind: Any) -> str:
    if get_origin(kind) in (list, tuple):
        return f"a list of {' or '.join(_PLURALS[entry] for entry in _kinds(get_args(kind)[0]))}"
    if get_origin(kind) is Literal:
        return f"one of {list(get_args(kind))}"
    return _NAMES.get(get_origin(kind) or kind, str(kind))


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a very large number"


def read_fields(part: Any, prefix: str = "") -> None:
    """Convert every field of a dataclass, frozen or not, to its type.

    Raises:
        ValueError: If a value is not of its field's kind.
    """
    for field in fields(part):
        given = getattr(part, field.name)
        if given is None and field.default is None:
            continue
        value = plain_as(prefix + field.name, given, field.type)
        object.__setattr__(part, field.name, value)


def require_writable(values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse what a run's files cannot hold, before the first of them is due.

    Raises:
        ValueError: If a value is anything but a number, a string, None, or lists and mappings of them.
    """
    for name, value in values.items():
        if not _is_writable(value):
            raise ValueError(
                f"{prefix}{name}={value!r} cannot be saved with the run. Give numbers, strings, None, and lists and "
                "mappings of them."
            )


def _is_writable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_writable(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_writable, value))
    is_nan = isinstance(value, float) and math.isnan(value)  # no file gives back what equals it
    return value is None or (isinstance(value, bool | int | float | str) and not is_nan)


def require_round_trip(config: Any) -> None:
    """Refuse a config that its own files would not give back.

    Args:
        config: has `to_dict` and `from_dict`.

    Raises:
        ValueError: If `from_dict` refuses what was written, or reads another value.
    """
    written = json.loads(json.dumps(config.to_dict()))
    again = type(config).from_dict({**written, "verbose": False}).to_dict()
    read = json.loads(json.dumps({**again, "verbose": written.get("verbose")}))
    for name, value in written.items():
        if read.get(name) != value:
            raise ValueError(
                f"{name}={value!r} is read back from a run's files as {read.get(name)!r}. Give it as files have it."
            )
