"""Fields: callables that turn the bytes of one sample into a tensor, a caption or a label.

A field is called as `field(sample, generator)`. `sample` maps field extensions to bytes; where it also holds
"__key__", error messages name that key. Nothing here unpickles, and sizes are checked before memory is taken.
Pictures are in `pictures`, JSON in `json_fields`.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpretrain.data.fields import (
    MAX_CAPTION,
    DecodeError,
    MissingField,
    Sample,
    check_caption,
    check_names,
    find,
    name_of,
    text_field,
)
from mmpretrain.data.json_fields import MAX_DEPTH, MAX_JSON, JsonCaption, JsonValue
from mmpretrain.data.pictures import FORMATS, MAX_BYTES, MAX_PIXELS, Image, Transform

__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "MAX_CAPTION",
    "MAX_DEPTH",
    "MAX_JSON",
    "MAX_PIXELS",
    "DecodeError",
    "Image",
    "JsonCaption",
    "JsonValue",
    "MissingField",
    "Npy",
    "Sample",
    "TextCaption",
    "Transform",
]


class TextCaption:
    """A text field -> its whole UTF-8 text as one caption, without the white space around it.

    Raises `DecodeError` for other bytes, a NUL character, and more than 64 KiB.
    """

    def __init__(self, extension: str = "txt") -> None:
        (self.extension,) = check_names(extension, "extension")

    def __call__(self, sample: Sample, generator: torch.Generator) -> str:
        """The sample's caption."""
        return self.captions(sample)[0]

    def captions(self, sample: Sample) -> list[str]:
        """The sample's one caption, as a list."""
        text = text_field(sample, self.extension, MAX_CAPTION)
        return [check_caption(text, sample, self.extension).strip()]


class Npy:
    """A NumPy .npy field -> its array as a tensor of the same shape and type; pickled objects are refused."""

    def __init__(self, extension: str = "npy") -> None:
        (self.extension,) = check_names(extension, "extension")

    def __call__(self, sample: Sample, generator: torch.Generator) -> Tensor:
        """The sample's array."""
        _, data = find(sample, (self.extension,), "extension")
        try:
            return torch.from_numpy(_read_npy(data))
        except Exception as error:  # NumPy's header parser raises nearly any type on damaged bytes
            raise DecodeError(
                f"{name_of(sample, self.extension)}: not a .npy array of numbers "
                f"({type(error).__name__}: {error!s:.300}); save it with numpy.save",
                field=self.extension,
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
