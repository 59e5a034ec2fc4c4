"""Resizing: of uint8 pixels by torch, and where a window lies on a picture that was scaled."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Interpolation = Literal["bicubic", "bilinear"]

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def resized(pixels: Tensor, height: int, width: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """Resize uint8 (3,H,W) to (3,height,width), antialiased; within 2 levels of Pillow's result.

    torch rounds to uint8 after each direction as Pillow does, but has weights of 16 bits instead of 22: SIMD code that
    is several times as fast. torch always scales rows first. Pillow from version 13 on begins with columns where the
    height shrinks by over twice as many pixels as the width; another order would change a tenth of the pixels.
    """
    rows, columns = pixels.shape[1:]
    if rows > height and rows - height > 2 * (columns - width):
        pixels = _scaled(pixels, height, columns, interpolation)
    return _scaled(pixels, height, width, interpolation)


def _scaled(pixels: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    if pixels.shape[1:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], (height, width), mode=interpolation, antialias=True)[0]


def centre(side: int, size: int, down: bool = False) -> int:
    """Return where a window of `size` begins on a side; negative where it is longer than the side.

    Half a pixel is rounded to the even one (torchvision, open_clip), or `down` (transformers).
    """
    if side < size:
        return -((size - side) // 2)
    return (side - size) // 2 if down else round((side - size) / 2)


def shrunk(start: int, length: int, side: int, whole: int) -> tuple[int, int]:
    """Return start and length of a crop on a side of `whole` pixels that was decoded to `side`."""
    new = round(length * side / whole)
    return min(round(start * side / whole), side - new), new
