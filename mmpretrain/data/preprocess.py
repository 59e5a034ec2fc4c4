"""Pictures to pixels: a picture of any mode -> uint8 (3,S,S), fixed (`Preprocess`) or random (`Augment`).

Pixels stay uint8: the image encoder normalises them on its own device, so a quarter of the bytes travel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmpretrain.data.pixels import Picture, converted
from mmpretrain.data.resize import RESAMPLING, Interpolation, centre, resized, shrunk
from mmpretrain.errors import InputError

Resize = Literal["crop", "squash", "pad"]
Read = Literal["upright", "rgb", "stored"]

CROP_TRIES = 10
MAX_STRETCH = 40  # longest side of a scaled picture, in multiples of the crop, that is scaled whole


def _check_size(image_size: int) -> None:
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise InputError(f"image_size={image_size!r}; expected an integer number of pixels of at least 1")


class Preprocess:
    """A PIL image -> uint8 (3,S,S), the same every time: upright RGB, resized by antialiased bicubic or bilinear.

    `resize`: "crop" scales the shortest side to S and takes the centre (CLIP, open_clip's `shortest`), "squash" scales
    both sides to S (SigLIP), "pad" scales the longest side to S and centres it on `fill` (open_clip's `longest`), a
    grey level or (red, green, blue) from 0 to 255. Other values raise `InputError`.
    `exact`: PIL decodes and resizes, so scores compare to the bit with those of others; False is several times as
    fast, with pixels within 2 levels of those.
    `read`: what a file is taken for. "upright" applies the EXIF orientation, puts transparency on white and keeps the
    range of 16-bit grey. For pixels equal to another library's on every file, "rgb" only converts to RGB (transparency
    on white), resizes and cuts out a centre rounded down (transformers 5), and "stored" resizes in the mode the file
    has and then drops transparency (OpenAI CLIP, open_clip): both leave pictures turned, and need `exact`.
    """

    def __init__(
        self,
        image_size: int,
        resize: Resize = "crop",
        exact: bool = True,
        interpolation: Interpolation = "bicubic",
        fill: int | Sequence[int] = 0,
        read: Read = "upright",
    ) -> None:
        _check_size(image_size)
        for name, value, kind in (
            ("resize", resize, Resize),
            ("interpolation", interpolation, Interpolation),
            ("read", read, Read),
        ):
            if value not in get_args(kind):
                raise InputError(f"{name}={value!r}; expected one of {', '.join(get_args(kind))}")
        if read != "upright" and not exact:
            raise InputError(f"read={read!r} is how PIL reads a file; set exact=true, or read=upright")
        self.image_size = image_size
        self.resize = resize
        self.exact = exact
        self.interpolation = interpolation
        self.fill = _fill(fill)
        self.read = read

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """Resize one picture; `generator` is ignored (it is there so that `Augment` fits the same place)."""
        return self.from_picture(Picture(image), generator)

    def from_picture(self, picture: Picture, generator: torch.Generator | None = None) -> Tensor:
        """Resize one opened picture, as a call does."""
        if self.read == "stored":
            kept = self._kept(picture.decoded())
        elif self.read == "rgb":
            kept = self._kept(converted(picture.decoded()))
        elif self.exact or self._stretched(picture.width, picture.height):
            kept = self._kept(picture.rgb())
        else:
            return self._approximate(picture)
        return torch.from_numpy(np.array(kept.convert("RGB"))).permute(2, 0, 1).contiguous()

    def _kept(self, image: Image.Image) -> Image.Image:
        """Resize a PIL image of any mode to (S,S)."""
        size, sides = self.image_size, image.size
        width, height = self._scaled(*sides)
        left, top = (centre(new, size, self.read == "rgb") for new in (width, height))
        method = RESAMPLING[self.interpolation]
        if self._stretched(*sides):
            # A long thin picture scaled whole could need any amount of memory. Only the part that is kept is scaled,
            # whose pixels differ a little from those of the whole.
            box = []
            for start, side, new in zip((left, top), sides, (width, height), strict=True):
                box.append((start * side / new, min((start + size) * side / new, float(side))))
            (x0, x1), (y0, y1) = box
            return image.resize((size, size), method, box=(x0, y0, x1, y1))
        scaled = image.resize((width, height), method)
        if min(width, height) >= size:
            return scaled.crop((left, top, left + size, top + size))
        if image.mode != "RGB":  # what a number stands for depends on the mode: as open_clip takes it
            from torchvision.transforms import functional

            border = [-left, -top, size - width + left, size - height + top]
            padded: Image.Image = functional.pad(scaled, border, fill=self.fill)
            return padded
        canvas = Image.new("RGB", (size, size), self._colour())
        canvas.paste(scaled, (-left, -top))
        return canvas

    def _approximate(self, picture: Picture) -> Tensor:
        """Resize with torch; only here may the picture be decoded smaller."""
        size, sides = self.image_size, (picture.width, picture.height)
        width, height = self._scaled(*sides)
        left, top = (centre(new, size) for new in (width, height))
        pixels = resized(picture.pixels(min(sides[0] / width, sides[1] / height)), height, width, self.interpolation)
        if min(width, height) >= size:
            return pixels[:, top : top + size, left : left + size].contiguous()
        canvas = torch.tensor(self._colour(), dtype=torch.uint8).view(3, 1, 1).repeat(1, size, size)
        canvas[:, -top : height - top, -left : width - left] = pixels
        return canvas

    def _colour(self) -> tuple[int, int, int]:
        return (self.fill, self.fill, self.fill) if isinstance(self.fill, int) else self.fill

    def _stretched(self, width: int, height: int) -> bool:
        return max(self._scaled(width, height)) > MAX_STRETCH * self.image_size

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
        return (
            f"Preprocess(image_size={self.image_size}, resize={self.resize!r}, exact={self.exact}, "
            f"interpolation={self.interpolation!r}, fill={self.fill}, read={self.read!r})"
        )


def _fill(fill: int | Sequence[int]) -> int | tuple[int, int, int]:
    levels = [fill] if isinstance(fill, int) else list(fill)
    if len(levels) not in (1, 3) or not all(type(level) is int and 0 <= level <= 255 for level in levels):
        raise InputError(f"fill={fill!r}; expected a level from 0 to 255, or three of them (red, green, blue)")
    return (levels[0], levels[1], levels[2]) if len(levels) == 3 else levels[0]


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
