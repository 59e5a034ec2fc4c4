"""What every field shares: finding its bytes in a sample, reading them as text, and the errors of one sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmpretrain.data.events import Cause
from mmpretrain.errors import InputError

Sample = Mapping[str, Any]

MAX_CAPTION = 2**16
"""Bytes of one caption: cleaning a text takes a tokenizer time that grows with its length."""


class DecodeError(InputError):
    """One sample's bytes cannot be read; the message names the sample, `cause` is that of a `DataEvent`.

    `field` is the extension of the field at fault, None where it is not known.
    """

    def __init__(self, message: str, cause: Cause = "undecodable", field: str | None = None) -> None:
        super().__init__(message)
        self.cause: Cause = cause
        self.field = field


class MissingField(DecodeError):
    """A sample lacks a field, or its JSON lacks a key."""

    def __init__(self, message: str, cause: Cause = "missing", field: str | None = None) -> None:
        super().__init__(message, cause, field)


def name_of(sample: Sample, extension: str | None = None) -> str:
    """Name a sample, and the field of it that is meant, for an error message."""
    key = sample.get("__key__")
    name = "a sample" if key is None else f"sample {key!r}"
    return name if extension is None else f"{name}, field {extension}"


def find(sample: Sample, extensions: Sequence[str], option: str) -> tuple[str, bytes]:
    """Return the first of `extensions` that the sample has, with its bytes; raises `MissingField`."""
    for extension in extensions:
        if extension in sample:
            return extension, sample[extension]
    present = ", ".join(sorted(name for name in sample if not name.startswith("__"))) or "nothing"
    raise MissingField(
        f"{name_of(sample)} has no field {' or '.join(extensions)}, only {present}; set {option} to a field it has",
        field=extensions[0],
    )


def check_names(names: Sequence[str], option: str) -> tuple[str, ...]:
    """Return field extensions as a tuple; raises `InputError` for none, or one that begins with a dot."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names or not all(isinstance(name, str) and name and name[0] != "." for name in names):
        raise InputError(f"{option}={names!r}; expected field extensions without a leading dot, such as 'jpg'")
    return names


def check_limit(value: int, option: str) -> int:
    """Return a limit; raises `InputError` unless it is at least 1."""
    if value < 1:
        raise InputError(f"{option}={value}; expected at least 1")
    return value


def text_field(sample: Sample, extension: str, max_bytes: int) -> str:
    """Return a field's UTF-8 text; raises `DecodeError` for other bytes and for more than `max_bytes` of them."""
    _, data = find(sample, (extension,), "extension")
    name = name_of(sample, extension)
    if len(data) > max_bytes:
        raise DecodeError(
            f"{name}: {len(data)} bytes of text, over the limit of {max_bytes}; drop it or raise max_bytes",
            "refused",
            extension,
        )
    try:
        return str(data, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DecodeError(f"{name}: not UTF-8 text ({error}); re-encode it", field=extension) from error


def check_caption(text: str, sample: Sample, extension: str) -> str:
    """Return a caption that every tokenizer takes; raises `DecodeError` for one with NUL or half a character, or
    over `MAX_CAPTION` bytes."""
    name = name_of(sample, extension)
    if "\0" in text:
        raise DecodeError(f"{name}: a NUL character in the caption; remove it", field=extension)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise DecodeError(f"{name}: the caption is not Unicode text ({error}); re-encode it", field=extension) from None
    if size > MAX_CAPTION:
        raise DecodeError(
            f"{name}: a caption of {size} bytes, over the limit of {MAX_CAPTION}; shorten it", "refused", extension
        )
    return text
