"""JPEG files: their segments, how often a decoder goes over the pixels, and decoding by libjpeg-turbo.

PIL stays the judge: what the fast decoder does not read without a single warning is left to it. So both give the same
pixels, and a file that PIL refuses is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from numpy.typing import NDArray

FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the segment that announces size and components."""
ONE_PASS = frozenset({0xC0, 0xC1})
"""Those of a baseline or extended sequential JPEG; the others' scans may each refine all pixels."""
SCAN = b"\xff\xda"
NO_SCALE = 16  # over 8, the most that libjpeg-turbo makes a picture smaller


def decode(data: bytes, width: int, height: int, shrink: float = 1.0) -> NDArray[np.uint8] | None:
    """Decode a JPEG of `width` x `height` to RGB, (H,W,3); None where PIL must decide.

    The picture may come out up to `shrink` times smaller (sides rounded up): by 2, 4 or 8, for which inverse cosine
    transforms have SIMD code and which are no exact pixels. None is for any error or warning.
    """
    divisor = next((divisor for divisor in (8, 4, 2) if divisor <= shrink), 1)
    rows, columns = -(-height // divisor), -(-width // divisor)
    # Without `min_factor` simplejpeg scales pictures of up to 7 x 7 pixels although nobody asked.
    factor = NO_SCALE if divisor == 1 else divisor
    try:
        pixels: NDArray[Any] = simplejpeg.decode_jpeg(
            data, "RGB", min_height=rows, min_width=columns, min_factor=factor
        )
    except Exception:  # damage, a warning of it, or a kind that simplejpeg does not take: PIL says which
        return None
    return pixels if pixels.shape == (rows, columns, 3) else None


def segments(data: bytes) -> Iterator[int]:
    """Yield where the segments begin, to the first scan or to what is no segment."""
    position = 2
    while position + 1 < len(data) and data[position] == 0xFF and data[position + 1] != SCAN[1]:
        yield position
        position += _length(data, position)


def scans(data: bytes) -> int:
    """Count how often decoding goes over all pixels, or more."""
    end, components = 2, 0
    for position in segments(data):
        end = position + _length(data, position)
        if data[position + 1] in FRAMES:
            if data[position + 1] not in ONE_PASS or components:
                return data.count(SCAN)
            components = int.from_bytes(data[position + 9 : position + 10], "big")
    # A decoder is done after a first scan that holds all components, and takes a second one for an error.
    if components and data[end : end + 2] == SCAN and data[end + 4 : end + 5] == bytes([components]):
        return 1
    return data.count(SCAN)


def _length(data: bytes, position: int) -> int:
    """Return the length of the segment at `position`, its marker included."""
    marker = data[position + 1]
    if marker in (0x00, 0xFF):  # filling: PIL goes on by one byte
        return 1
    if marker == 0x01 or 0xD0 <= marker <= 0xD9:  # these have no content
        return 2
    return 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
