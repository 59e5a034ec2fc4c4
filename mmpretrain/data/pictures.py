"""The picture field: bytes -> a decoded PIL image -> pixels, with every limit checked before memory or time is spent.

What a decoder costs is bounded by three numbers: bytes of the file, pixels of the picture (at most 27 bytes of
memory each, for a turned WebP with transparency) and parts of the file (each is a step of a Python loop inside
PIL). A progressive JPEG goes over all its pixels once per scan, so scans times pixels are bounded too.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal, get_args

import torch
from PIL import Image as PILImage
from torch import Tensor

from mmpretrain.data import jpeg
from mmpretrain.data.fields import DecodeError, Sample, check_limit, check_names, find, name_of
from mmpretrain.data.pixels import FromPicture, Picture
from mmpretrain.errors import InputError

Decode = Literal["exact", "scaled"]
Transform = Callable[[PILImage.Image, torch.Generator], Tensor]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 2**25  # 5792 x 5792: under 1 GiB at the worst 27 bytes a pixel
MAX_BYTES = 2**26
MAX_PARTS = 2**16
MAX_SCANNED = 2**32  # scans x pixels of a JPEG: five seconds, twice that where libjpeg-turbo gives up and PIL decides


class Image:
    """A picture field -> what `transform` makes of it: uint8 (3,H,W).

    `transform`: takes a decoded PIL image of any mode, or is a `FromPicture`, as `Augment` and `Preprocess` are, for
    which JPEGs are decoded by libjpeg-turbo. `decode`: "exact" gives PIL's own pixels; "scaled" lets a JPEG be decoded
    at 1/2, 1/4 or 1/8 of its size where the transform still has as many pixels as it returns: faster, approximate.

    The first of `extensions` that the sample has is read. Only `formats` (PIL's names) are tried, whatever
    the extension says, and of an animation only the first frame. A file over `max_bytes` or a picture over
    `max_pixels` is refused before it is decoded, and so is a file of far more parts or JPEG scans than any
    encoder writes. Raises `MissingField` for a missing field, `DecodeError` for an unreadable one.
    """

    def __init__(
        self,
        transform: Transform | FromPicture,
        extensions: Sequence[str] = ("jpg", "jpeg", "png", "webp", "gif"),
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
        formats: Sequence[str] = FORMATS,
        decode: Decode = "exact",
    ) -> None:
        limit = PILImage.MAX_IMAGE_PIXELS
        if max_pixels < 1 or (limit is not None and max_pixels > limit):
            raise InputError(
                f"max_pixels={max_pixels}; expected 1 to {limit}, "
                "PIL's own limit: raise PIL.Image.MAX_IMAGE_PIXELS to allow more"
            )
        if decode not in get_args(Decode):
            raise InputError(f"decode={decode!r}; expected one of {', '.join(get_args(Decode))}")
        self.transform = transform
        self.extensions = check_names(extensions, "extensions")
        self.max_pixels = max_pixels
        self.max_bytes = check_limit(max_bytes, "max_bytes")
        self.formats = tuple(formats)
        self.decode: Decode = decode

    def __call__(self, sample: Sample, generator: torch.Generator) -> Tensor:
        """Decode and transform the sample's picture."""
        extension, data = find(sample, self.extensions, "extensions")
        try:
            if isinstance(self.transform, FromPicture):
                return self.transform.from_picture(self._picture(sample, extension, data), generator)
            return self.transform(self.open(sample), generator)
        except DecodeError:
            raise
        except InputError as error:  # pixels of a kind that the transform does not take
            raise DecodeError(f"{name_of(sample, extension)}: {error}", field=extension) from error

    def open(self, sample: Sample) -> PILImage.Image:
        """The sample's picture, decoded by PIL, in the mode the file has."""
        return self._picture(sample, *find(sample, self.extensions, "extensions")).decoded()

    def _picture(self, sample: Sample, extension: str, data: bytes) -> Picture:
        """Open the picture, and decode it unless it is a JPEG; all limits are checked before."""
        name = name_of(sample, extension)

        def fault(error: Exception) -> DecodeError:
            if isinstance(error, PILImage.DecompressionBombError | PILImage.DecompressionBombWarning):
                return DecodeError(f"{name}: {error}; drop it", "refused", extension)
            return DecodeError(
                f"{name}: not a picture that can be read as {', '.join(self.formats)} "
                f"({type(error).__name__}: {error}); repair or drop it",
                field=extension,
            )

        if len(data) > self.max_bytes:
            problem = f"{len(data)} bytes, over the limit of {self.max_bytes}; drop it or raise max_bytes"
        elif parts_of(data) > MAX_PARTS:
            problem = f"a picture file of over {MAX_PARTS} parts; drop it"
        else:
            try:
                image = PILImage.open(io.BytesIO(data), formats=self.formats)
            except Exception as error:  # a parser given damaged bytes raises nearly any type
                raise fault(error) from error
            pixels = image.width * image.height
            scanned = pixels * (jpeg.scans(data) if data[:2] == b"\xff\xd8" else 0)
            if pixels <= self.max_pixels and scanned <= MAX_SCANNED:
                return Picture(image, data, self.decode == "scaled", fault)
            size = f"{image.width} x {image.height} = {pixels} pixels"
            if pixels > self.max_pixels:
                problem = f"{size}, over the limit of {self.max_pixels}; drop it or raise max_pixels"
            else:
                problem = f"{size} in {scanned // pixels} JPEG scans, over the limit of {MAX_SCANNED} together; drop it"
        raise DecodeError(f"{name}: {problem}", "refused", extension)


def parts_of(data: bytes) -> int:
    """Count the parts of a picture file that PIL walks before its pixels (JPEG, GIF) or in all (PNG).

    Counting ends behind `MAX_PARTS`; other formats have 0.
    """
    if data[:2] == b"\xff\xd8":
        return _count(jpeg.segments(data))
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _count(_png_chunks(data))
    if data[:4] == b"GIF8":
        return _count(_gif_blocks(data))
    return 0


def _count(positions: Iterator[int]) -> int:
    return sum(1 for _ in islice(positions, MAX_PARTS + 1))


def _png_chunks(data: bytes) -> Iterator[int]:
    position = 8
    while position < len(data) and data[position + 4 : position + 8] != b"IEND":
        yield position
        position += 12 + int.from_bytes(data[position : position + 4], "big")


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Where extensions and their blocks begin, to the first frame or the end."""
    position = 13 + (3 * 2 ** ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    inside = False
    while position < len(data) and (inside or data[position] not in (0x2C, 0x3B)):
        yield position
        if inside:
            inside = data[position] != 0
            position += 1 + data[position]
        else:
            inside = data[position] == 0x21
            position += 2 if inside else 1
