"""Photographs that packages bring along, cut and scaled to any size, as JPEGs."""

from __future__ import annotations

import io
from functools import cache

from PIL import Image
from sklearn.datasets import load_sample_images


@cache
def photos() -> list[Image.Image]:
    """Two photographs of 640 x 427 pixels."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def photo(width: int, height: int, number: int = 0) -> Image.Image:
    return photos()[number].resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()
