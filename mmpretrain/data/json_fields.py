"""Fields that read JSON: captions, labels and numbers at a dotted path of an object.

Size and depth are checked before parsing; NaN and infinity, which are no JSON, are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from mmpretrain.data.fields import (
    DecodeError,
    MissingField,
    Sample,
    check_caption,
    check_limit,
    check_names,
    name_of,
    text_field,
)
from mmpretrain.errors import InputError

MAX_JSON = 2**22
MAX_DEPTH = 64
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?+|[\[{]|[\]}]', re.DOTALL)  # possessive: time grows with the length only


class _Json:
    """A JSON field of at most `max_bytes` and `max_depth` levels, and the dotted path `key` in it."""

    def __init__(self, extension: str, key: str, max_bytes: int, max_depth: int) -> None:
        (self.extension,) = check_names(extension, "extension")
        self.key = key
        self.max_bytes = check_limit(max_bytes, "max_bytes")
        self.max_depth = check_limit(max_depth, "max_depth")

    def read(self, sample: Sample) -> Any:
        """Return what lies at the path; raises `DecodeError`, or `MissingField` where nothing does."""
        name = name_of(sample, self.extension)
        text = text_field(sample, self.extension, self.max_bytes)
        if _too_deep(text, self.max_depth):
            raise DecodeError(
                f"{name}: not JSON of at most {self.max_depth} levels; drop it or raise max_depth",
                "refused",
                self.extension,
            )
        try:
            value = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise DecodeError(f"{name}: not JSON ({error}); repair or drop it", field=self.extension) from error
        for part in self.key.split("."):
            if not isinstance(value, dict) or part not in value:
                found = f"keys {_keys(value)}" if isinstance(value, dict) else type(value).__name__
                raise MissingField(
                    f"{name}: no {part!r} on the path {self.key!r}, found {found}; set key to a path it has",
                    field=self.extension,
                )
            value = value[part]
        return value

    def wrong(self, sample: Sample, held: str, expected: str) -> DecodeError:
        """Return the error for a value of another kind."""
        name = name_of(sample, self.extension)
        return DecodeError(f"{name}: {self.key!r} holds {held}; expected {expected}", field=self.extension)


class JsonCaption:
    """A JSON field -> one of the captions at the dotted path `key`, drawn with the generator.

    There may be a string, a list of strings, or an object of strings. Of an object, `choose` names the sub
    keys to keep (languages, say), in that order; those a sample lacks are skipped. Raises `DecodeError` if
    nothing is left, and for JSON over `max_bytes` or deeper than `max_depth`.
    """

    def __init__(
        self,
        extension: str = "json",
        key: str = "caption",
        choose: Sequence[str] | None = None,
        max_bytes: int = MAX_JSON,
        max_depth: int = MAX_DEPTH,
    ) -> None:
        self._json = _Json(extension, key, max_bytes, max_depth)
        if choose is not None and (isinstance(choose, str) or not choose):
            raise InputError(f"choose={choose!r}; expected a list of sub keys such as ['en'], or None for all")
        self.extension = self._json.extension
        self.key = key
        self.choose = None if choose is None else tuple(choose)

    def __call__(self, sample: Sample, generator: torch.Generator) -> str:
        """One caption of the sample."""
        captions = self.captions(sample)
        return captions[int(torch.randint(len(captions), (), generator=generator))]

    def captions(self, sample: Sample) -> list[str]:
        """All captions of the sample, at least one."""
        value = self._json.read(sample)
        found: Any = value
        if isinstance(value, str):
            found = [value]
        elif isinstance(value, dict):
            found = [value[k] for k in self.choose if k in value] if self.choose else list(value.values())
        if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
            held = f"keys {_keys(value)}" if isinstance(value, dict) else f"{value!r:.80}"
            wanted = f" with one of {', '.join(self.choose)}" if self.choose else ""
            raise self._json.wrong(
                sample, held, f"a caption, a list of captions or an object of captions{wanted}: set key or choose"
            )
        return [check_caption(text, sample, self.extension) for text in found]


class JsonValue:
    """A JSON field -> the value at the dotted path `key`: int (true is 1), str, list[str] or a tensor.

    A number with a fraction becomes a float32 (), a list of numbers an int64 or float32 (N,), of lists (N,M).
    Raises `DecodeError` for anything else, and for JSON over `max_bytes` or deeper than `max_depth`.
    """

    def __init__(
        self, extension: str = "json", key: str = "label", max_bytes: int = MAX_JSON, max_depth: int = MAX_DEPTH
    ) -> None:
        self._json = _Json(extension, key, max_bytes, max_depth)
        self.extension = self._json.extension
        self.key = key

    def __call__(self, sample: Sample, generator: torch.Generator) -> Tensor | str | list[str] | int:
        """The sample's value."""
        value = self._json.read(sample)
        if isinstance(value, str):
            return check_caption(value, sample, self.extension)
        if isinstance(value, int):  # bool too
            return int(value)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            return [check_caption(text, sample, self.extension) for text in value]
        try:
            tensor = torch.tensor(value)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError("a number too large for float32")
            return tensor
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise self._json.wrong(
                sample, f"{value!r:.80}", "a number, a string, or a list of either: set key"
            ) from error


def _too_deep(text: str, limit: int) -> bool:
    if text.count("[") + text.count("{") <= limit:
        return False
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > limit:
            return True
    return False


def _keys(value: dict[str, Any]) -> str:
    shown = [f"{key:.40}" for key in list(value)[:20]]
    return ", ".join(shown) + (", ..." if len(value) > 20 else "") or "none"


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")
