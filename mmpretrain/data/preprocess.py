"""Pictures to pixels: a picture of any mode -> uint8 (3,S,S), fixed (`Preprocess`) or random (`Augment`).

Pixels stay uint8: the image encoder normalises them on its own device, so a quarter of the bytes travel.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmpretrain.data.pixels import Picture
from mmpretrain.errors import InputError

Resize = Literal["crop", "squash", "pad"]

CROP_TRIES = 10
MAX_STRETCH = 40  # longest side of a scaled picture, in multiples of the crop, that is scaled whole


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (3,H,W) to (3,height,width) by antialiased bicubic; within 2 levels of Pillow's result.

    torch rounds to uint8 after each direction as Pillow does, but has weights of 16 bits instead of 22: SIMD code that
    is several times as fast. torch always scales rows first. Pillow from version 13 on begins with columns where the
    height shrinks by over twice as many pixels as the width; another order would change a tenth of the pixels.
    """
    rows, columns = pixels.shape[1:]
    if rows > height and rows - height > 2 * (columns - width):
        pixels = _scaled(pixels, height, columns)
    return _scaled(pixels, height, width)


def _scaled(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[1:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]


def _check_size(image_size: int) -> None:
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise InputError(f"image_size={image_size!r}; expected an integer number of pixels of at least 1")


class Preprocess:
    """A PIL image -> uint8 (3,S,S), the same every time: upright RGB, resized by antialiased bicubic.

    `resize`: "crop" scales the shortest side to S and takes the centre (CLIP), "squash" scales both sides to
    S (SigLIP), "pad" scales the longest side to S and centres it on black. Other values raise `InputError`.
    `exact`: PIL decodes and resizes, so scores compare to the bit with those of others; False is several times as
    fast, with pixels within 2 levels of those.
    """

    def __init__(self, image_size: int, resize: Resize = "crop", exact: bool = True) -> None:
        _check_size(image_size)
        if resize not in get_args(Resize):
            raise InputError(f"resize={resize!r}; expected one of {', '.join(get_args(Resize))}")
        self.image_size = image_size
        self.resize = resize
        self.exact = exact

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """Resize one picture; `generator` is ignored (it is there so that `Augment` fits the same place)."""
        return self.from_picture(Picture(image), generator)

    def from_picture(self, picture: Picture, generator: torch.Generator | None = None) -> Tensor:
        """Resize one opened picture, as a call does."""
        size, sides = self.image_size, (picture.width, picture.height)
        width, height = self._scaled(*sides)
        left, top = (_centre(new, size) for new in (width, height))
        if max(width, height) > MAX_STRETCH * size:
            # A long thin picture scaled whole could need any amount of memory. Only the part that is kept is scaled,
            # whose pixels differ a little from those of the whole.
            box = []
            for start, side, new in zip((left, top), sides, (width, height), strict=True):
                box.append((start * side / new, min((start + size) * side / new, float(side))))
            (x0, x1), (y0, y1) = box
            kept = picture.rgb().resize((size, size), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
        elif self.exact:
            scaled = picture.rgb().resize((width, height), Image.Resampling.BICUBIC)
            kept = scaled.crop((left, top, left + size, top + size))  # black where that is outside
        else:
            pixels = resized(picture.pixels(min(sides[0] / width, sides[1] / height)), height, width)
            # a negative number of pixels to add takes pixels away
            return F.pad(pixels, (-left, left + size - width, -top, top + size - height)).contiguous()
        return torch.from_numpy(np.array(kept)).permute(2, 0, 1).contiguous()

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """Return the size to which the whole picture is scaled; rounded as torchvision and open_clip round."""
        size = self.image_size
        if self.resize == "squash":
            return size, size
        if self.resize == "pad":
            ratio = max(width, height) / size
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        short = min(width, height)
        return (
            size if width == short else int(size * width / short),
            size if height == short else int(size * height / short),
        )

    def __repr__(self) -> str:
        return f"Preprocess(image_size={self.image_size}, resize={self.resize!r}, exact={self.exact})"


def _centre(side: int, size: int) -> int:
    """Return where a window of `size` begins on a side; negative where it is longer than the side."""
    return round((side - size) / 2) if side >= size else -((size - side) // 2)


class Augment:
    """A PIL image -> uint8 (3,S,S): a random crop resized in one call, all randomness from `generator`.

    `scale`: bounds of the crop's share of the area. `ratio`: bounds of its width / height, log-uniform.
    `flip`, `grayscale`: probabilities. `color_jitter`: brightness, contrast and saturation are each
    multiplied by a factor from [1 - color_jitter, 1 + color_jitter]. Raises `InputError` for values out of
    range.

    Pixels are within 2 levels of PIL's for the same crop, and nearly all are equal.
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.0,
        color_jitter: float = 0.0,
        grayscale: float = 0.0,
    ) -> None:
        _check_size(image_size)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise InputError(f"scale={scale!r}; expected (low, high) with 0 < low <= high <= 1")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] < math.inf:
            raise InputError(f"ratio={ratio!r}; expected (low, high) with 0 < low <= high")
        for name, value in (("flip", flip), ("color_jitter", color_jitter), ("grayscale", grayscale)):
            if not 0 <= value <= 1:
                raise InputError(f"{name}={value!r}; expected a number from 0 to 1")
        self.image_size = image_size
        self.scale = (float(scale[0]), float(scale[1]))  # a configuration gives lists
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.flip = flip
        self.color_jitter = color_jitter
        self.grayscale = grayscale

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """Augment one picture. The same generator state and picture give the same pixels."""
        return self.from_picture(Picture(image), generator)

    def from_picture(self, picture: Picture, generator: torch.Generator) -> Tensor:
        """Augment one opened picture, as a call does; the draws do not depend on how it is decoded."""
        size = self.image_size
        left, top, width, height = self.crop(picture.width, picture.height, generator)
        pixels = picture.pixels(shrink=min(width, height) / size)
        rows, columns = pixels.shape[1:]
        if (rows, columns) != (picture.height, picture.width):  # decoded smaller: the same crop, to a pixel
            left, width = shrunk(left, width, columns, picture.width)
            top, height = shrunk(top, height, rows, picture.height)
        pixels = resized(pixels[:, top : top + height, left : left + width], size, size)
        # five draws whatever the options: switching one on leaves the others' randomness as it was
        flip, gray, *jitter = torch.rand(5, generator=generator).tolist()
        if flip < self.flip:
            pixels = pixels.flip(-1)
        if self.color_jitter > 0:
            pixels = self._jitter(pixels, [1 + self.color_jitter * (2 * u - 1) for u in jitter])
        if gray < self.grayscale:
            from torchvision.transforms.v2 import functional

            pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
        return pixels.contiguous()

    def crop(self, width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        """Left, top, width and height in pixels of a random crop of a `width` x `height` picture."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for share, shape, x, y in torch.rand(CROP_TRIES, 4, generator=generator).tolist():
            area = width * height * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + shape * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
        # no draw fitted inside: the largest centred crop of an allowed ratio
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        return (width - w) // 2, (height - h) // 2, w, h

    def _jitter(self, pixels: Tensor, factors: list[float]) -> Tensor:
        from torchvision.transforms.v2 import functional

        brightness, contrast, saturation = factors
        pixels = functional.adjust_brightness(pixels, brightness)
        pixels = functional.adjust_contrast(pixels, contrast)
        jittered: Tensor = functional.adjust_saturation(pixels, saturation)
        return jittered

    def __repr__(self) -> str:
        return (
            f"Augment(image_size={self.image_size}, scale={self.scale}, ratio={self.ratio}, "
            f"flip={self.flip}, color_jitter={self.color_jitter}, grayscale={self.grayscale})"
        )


def shrunk(start: int, length: int, side: int, whole: int) -> tuple[int, int]:
    """Return start and length of a crop on a side of `whole` pixels that was decoded to `side`."""
    new = round(length * side / whole)
    return min(round(start * side / whole), side - new), new
