"""Twenty real pictures as files: odd sizes, every mode that files have, and all EXIF orientations."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image

from tests.data.photos import photo

ORIENTATION = 0x0112


@cache
def odd_pictures() -> dict[str, bytes]:
    """Return name -> bytes of a file."""
    made = {f"exif {n} {w}x{h}": _jpeg(photo(w, h, n % 2), n) for n, (w, h) in enumerate(SIDES, start=1)}
    grey, wide, tall = photo(157, 211).convert("L"), photo(333, 129, 1), photo(101, 307)
    made["grey png"] = _png(grey)
    made["grey jpeg"] = _file(photo(91, 45, 1).convert("L"), "JPEG", quality=90)
    made["grey with alpha"] = _png(_with_alpha(grey, "LA"))
    made["colour with alpha"] = _png(_with_alpha(wide, "RGBA"))
    made["webp with alpha"] = _file(_with_alpha(tall, "RGBA"), "WEBP", lossless=True)
    made["palette"] = _png(tall.quantize(61))
    made["palette with a transparent colour"] = _png(wide.quantize(17), transparency=3)
    made["gif"] = _file(photo(67, 83).quantize(200), "GIF")
    made["cmyk jpeg"] = _file(photo(119, 173, 1).convert("CMYK"), "JPEG", quality=95)
    made["16-bit grey"] = _png(Image.fromarray(np.asarray(photo(143, 97).convert("L")).astype(np.uint16) * 257))
    made["black and white"] = _png(wide.convert("1"))
    made["larger than a screen"] = _file(photo(1531, 1013), "JPEG", quality=85)
    return made


SIDES = ((301, 223), (97, 411), (65, 64), (223, 224), (500, 375), (33, 49), (449, 447), (227, 731))


def _with_alpha(image: Image.Image, mode: str) -> Image.Image:
    """A picture whose transparency rises from left to right, with a clear corner."""
    alpha = np.tile(np.linspace(0, 255, image.width).astype(np.uint8), (image.height, 1))
    alpha[: image.height // 3, : image.width // 3] = 0
    made = image.convert(mode)
    made.putalpha(Image.fromarray(alpha))
    return made


def _jpeg(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return _file(image, "JPEG", quality=92, exif=exif)


def _png(image: Image.Image, **options: object) -> bytes:
    return _file(image, "PNG", **options)


def _file(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()
