"""Fields: callables that turn the bytes of one sample into a tensor, a caption or a label.

A field is called as `field(sample, generator)`. `sample` maps field extensions to bytes; where it also holds
"__key__", error messages name that key. Nothing here unpickles, and sizes are checked before memory is taken.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from mmpretrain.errors import InputError

Sample = Mapping[str, Any]
Transform = Callable[[PILImage.Image, torch.Generator], Tensor]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 89_478_485  # where PIL itself begins to warn of a decompression bomb
MAX_BYTES = 128 * 2**20


class DecodeError(InputError):
    """One sample's bytes cannot be read; the message names the sample."""


def _name(sample: Sample) -> str:
    key = sample.get("__key__")
    return "a sample" if key is None else f"sample {key!r}"


def _find(sample: Sample, extensions: Sequence[str], option: str) -> tuple[str, bytes]:
    for extension in extensions:
        if extension in sample:
            return extension, sample[extension]
    present = ", ".join(sorted(name for name in sample if not name.startswith("__"))) or "nothing"
    raise InputError(
        f"{_name(sample)} has no field {' or '.join(extensions)}, only {present}; set {option} to a field it has"
    )


def _check_names(names: Sequence[str], option: str) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names or not all(isinstance(name, str) and name and name[0] != "." for name in names):
        raise InputError(f"{option}={names!r}; expected field extensions without a leading dot, such as 'jpg'")
    return names


class Image:
    """A picture field -> what `transform` makes of it: uint8 (3,H,W).

    The first of `extensions` that the sample has is read. Only `formats` (PIL's names) are tried, whatever
    the extension says, and of an animation only the first frame. A file over `max_bytes` or a picture over
    `max_pixels` is refused before it is decoded. Raises `InputError` for a missing field, `DecodeError` for
    an unreadable one.
    """

    def __init__(
        self,
        transform: Transform,
        extensions: Sequence[str] = ("jpg", "jpeg", "png", "webp", "gif"),
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
        formats: Sequence[str] = FORMATS,
    ) -> None:
        limit = PILImage.MAX_IMAGE_PIXELS
        if max_pixels < 1 or (limit is not None and max_pixels > limit):
            raise InputError(
                f"max_pixels={max_pixels}; expected 1 to {limit}, "
                "PIL's own limit: raise PIL.Image.MAX_IMAGE_PIXELS to allow more"
            )
        if max_bytes < 1:
            raise InputError(f"max_bytes={max_bytes}; expected at least 1")
        self.transform = transform
        self.extensions = _check_names(extensions, "extensions")
        self.max_pixels = max_pixels
        self.max_bytes = max_bytes
        self.formats = tuple(formats)

    def __call__(self, sample: Sample, generator: torch.Generator) -> Tensor:
        """Decode and transform the sample's picture."""
        return self.transform(self.open(sample), generator)

    def open(self, sample: Sample) -> PILImage.Image:
        """The sample's picture, decoded, in the mode the file has."""
        extension, data = _find(sample, self.extensions, "extensions")
        name = f"{_name(sample)}, field {extension}"
        if len(data) > self.max_bytes:
            raise DecodeError(
                f"{name}: {len(data)} bytes, over the limit of {self.max_bytes}; drop it or raise max_bytes"
            )
        try:
            image = PILImage.open(io.BytesIO(data), formats=self.formats)
            pixels = image.width * image.height
            if pixels <= self.max_pixels:
                image.load()
                return image
        except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
            raise DecodeError(f"{name}: {error}; drop it") from error
        except Exception as error:  # a decoder given damaged bytes raises nearly any type
            raise DecodeError(
                f"{name}: not a picture that can be read as {', '.join(self.formats)} "
                f"({type(error).__name__}: {error}); repair or drop it"
            ) from error
        raise DecodeError(
            f"{name}: {image.width} x {image.height} = {pixels} pixels, over the limit of {self.max_pixels}; "
            "drop it or raise max_pixels"
        )


def _text(sample: Sample, extension: str) -> str:
    _, data = _find(sample, (extension,), "extension")
    try:
        return str(data, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DecodeError(f"{_name(sample)}, field {extension}: not UTF-8 text ({error}); re-encode it") from error


def _json_value(sample: Sample, extension: str, key: str) -> Any:
    """What lies at the dotted path `key` of a JSON field."""
    name = f"{_name(sample)}, field {extension}"
    text = _text(sample, extension)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"{name}: not JSON ({error}); repair or drop it") from error
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            found = f"keys {', '.join(value) or 'none'}" if isinstance(value, dict) else type(value).__name__
            raise InputError(f"{name}: no {part!r} on the path {key!r}, found {found}; set key to a path it has")
        value = value[part]
    return value


class TextCaption:
    """A text field -> its whole UTF-8 text as one caption, without the white space around it."""

    def __init__(self, extension: str = "txt") -> None:
        (self.extension,) = _check_names(extension, "extension")

    def __call__(self, sample: Sample, generator: torch.Generator) -> str:
        """The sample's caption."""
        return self.captions(sample)[0]

    def captions(self, sample: Sample) -> list[str]:
        """The sample's one caption, as a list."""
        return [_text(sample, self.extension).strip()]


class JsonCaption:
    """A JSON field -> one of the captions at the dotted path `key`, drawn with the generator.

    There may be a string, a list of strings, or an object of strings. Of an object, `choose` names the sub
    keys to keep (languages, say), in that order; those a sample lacks are skipped. Raises `InputError` if
    nothing is left.
    """

    def __init__(self, extension: str = "json", key: str = "caption", choose: Sequence[str] | None = None) -> None:
        (self.extension,) = _check_names(extension, "extension")
        if choose is not None and (isinstance(choose, str) or not choose):
            raise InputError(f"choose={choose!r}; expected a list of sub keys such as ['en'], or None for all")
        self.key = key
        self.choose = None if choose is None else tuple(choose)

    def __call__(self, sample: Sample, generator: torch.Generator) -> str:
        """One caption of the sample."""
        captions = self.captions(sample)
        return captions[int(torch.randint(len(captions), (), generator=generator))]

    def captions(self, sample: Sample) -> list[str]:
        """All captions of the sample, at least one."""
        value = _json_value(sample, self.extension, self.key)
        found: Any = value
        if isinstance(value, str):
            found = [value]
        elif isinstance(value, dict):
            found = [value[k] for k in self.choose if k in value] if self.choose else list(value.values())
        if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
            held = f"keys {', '.join(value) or 'none'}" if isinstance(value, dict) else f"{value!r:.80}"
            raise InputError(
                f"{_name(sample)}, field {self.extension}: {self.key!r} holds {held}; expected a caption, "
                f"a list of captions or an object of captions{self._wanted()}: set key or choose"
            )
        return list(found)

    def _wanted(self) -> str:
        return f" with one of {', '.join(self.choose)}" if self.choose else ""


class JsonValue:
    """A JSON field -> the value at the dotted path `key`: int (true is 1), str, list[str] or a tensor.

    A number with a fraction becomes a float32 (), a list of numbers an int64 or float32 (N,), of lists (N,M).
    """

    def __init__(self, extension: str = "json", key: str = "label") -> None:
        (self.extension,) = _check_names(extension, "extension")
        self.key = key

    def __call__(self, sample: Sample, generator: torch.Generator) -> Tensor | str | list[str] | int:
        """The sample's value."""
        value = _json_value(sample, self.extension, self.key)
        if isinstance(value, str):
            return value
        if isinstance(value, int):  # bool too
            return int(value)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            return list(value)
        try:
            return torch.tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(
                f"{_name(sample)}, field {self.extension}: {self.key!r} holds {value!r:.80}; "
                "expected a number, a string, or a list of either: set key"
            ) from error


class Npy:
    """A NumPy .npy field -> its array as a tensor of the same shape and type; pickled objects are refused."""

    def __init__(self, extension: str = "npy") -> None:
        (self.extension,) = _check_names(extension, "extension")

    def __call__(self, sample: Sample, generator: torch.Generator) -> Tensor:
        """The sample's array."""
        _, data = _find(sample, (self.extension,), "extension")
        try:
            return torch.from_numpy(_read_npy(data))
        except Exception as error:  # NumPy's header parser raises nearly any type on damaged bytes
            raise DecodeError(
                f"{_name(sample)}, field {self.extension}: not a .npy array of numbers "
                f"({type(error).__name__}: {error}); save it with numpy.save"
            ) from error


def _read_npy(data: bytes) -> np.ndarray[Any, Any]:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format holds no plain numbers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
    size, held = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if dtype.hasobject or size != held:  # checked before NumPy takes memory for what the header claims
        raise ValueError(f"its header announces {dtype} {shape} = {size} bytes, but {held} follow")
    array: np.ndarray[Any, Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
