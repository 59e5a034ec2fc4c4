"""Whether the values of another library's JSON are of the kind that their defaults are, before anything uses them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from mmpretrain.errors import InputError

LARGEST = 2**31 - 1
"""Of any count; more fits no file."""
COUNTERS = ("eos_token_id", "eos_id", "pad_id")
"""Whole numbers that may be 0."""


def section(config: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    """Return a part of a config, empty where it is left out; raises `InputError` for what is no object."""
    found = config.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise InputError(f"{source}: {name} is {_shown(found)}; expected names with values")
    return found


def check_kinds(values: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> None:
    """Raise `InputError` for a value that is not of its default's kind: a count, a number, a name, true or false.

    Lists and dictionaries are left to who reads them, and so is what has no default.
    """
    for name, default in defaults.items():
        value = values[name]
        if isinstance(default, bool):
            fits, kind = isinstance(value, bool), "true or false"
        elif isinstance(default, int):
            lowest = 0 if name in COUNTERS else 1
            fits, kind = is_count(value, lowest), f"a whole number from {lowest} to {LARGEST}"
        elif isinstance(default, float):
            fits, kind = is_number(value), "a number"
        elif isinstance(default, str):
            fits, kind = isinstance(value, str), "a name"
        elif default is None:
            fits, kind = value is None or is_count(value), "null or a whole number"
        else:
            continue
        if not fits:
            raise InputError(f"{source}.{name} is {_shown(value)}; expected {kind}")


def colours(value: Any, name: str, source: str) -> list[float]:
    """Return three numbers, one for each colour; one number stands for all three, as in transformers."""
    values = [value] * 3 if is_number(value) else value
    if not isinstance(values, Sequence) or len(values) != 3 or not all(map(is_number, values)):
        raise InputError(f"{source}: {name} is {_shown(value)}; expected one number, or three")
    return [float(x) for x in values]


def is_count(value: Any, lowest: int = 1) -> TypeGuard[int]:
    """Whether it is a whole number from `lowest` to `LARGEST`."""
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= LARGEST


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return repr(value)[:80]
