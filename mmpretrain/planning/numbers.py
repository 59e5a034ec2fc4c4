"""Numbers as a user gives them."""

from __future__ import annotations

import math

from mmpretrain.errors import InputError


def number(key: str, value: object, least: float | None = None, whole: bool = False) -> float:
    """Return a number above 0, or of at least `least`; `whole` asks for an integer.

    Raises `InputError`, which names `key`, for anything else: text, null, true, infinity or NaN.
    """
    kinds = (int,) if whole else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or (value <= 0 if least is None else value < least):  # type: ignore[operator]
        wanted = f"a {'whole ' if whole else ''}number " + ("above 0" if least is None else f"of at least {least:g}")
        given = "null" if value is None else repr(value)
        raise InputError(f"{key} is {given}; give {wanted}")
    return value  # type: ignore[return-value]
