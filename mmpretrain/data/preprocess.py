"""Pictures to pixels: a PIL image of any mode -> uint8 (3,S,S), fixed (`Preprocess`) or random (`Augment`).

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

from mmpretrain.errors import InputError

Resize = Literal["crop", "squash", "pad"]

EXIF_ORIENTATION = 0x0112
UNTURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
CROP_TRIES = 10
MAX_STRETCH = 40  # longest side of a scaled picture, in multiples of the crop, that is scaled whole


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as upright RGB: EXIF orientation applied, transparency on white, 16-bit grey scaled to 8.

    Raises `InputError` for modes without a fixed range (I, F).
    """
    turn = UNTURN.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        # PIL would clip everything above 255 to white
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(
            f"got a picture of mode {image.mode}, whose range of values is unknown; "
            "expected 8-bit or 16-bit pixels: save it as 8-bit grey or RGB"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation (1 to 8), or 1 where it is absent or the EXIF block cannot be read."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # a broken metadata block says nothing about the pixels; parsers raise many types
        return 1
    return value if isinstance(value, int) else 1


def _pixels(image: Image.Image) -> Tensor:
    """An RGB picture as a uint8 (3,H,W) view of channels-last memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _check_size(image_size: int) -> None:
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise InputError(f"image_size={image_size!r}; expected an integer number of pixels of at least 1")


class Preprocess:
    """A PIL image -> uint8 (3,S,S), the same every time: RGB by `to_rgb`, then PIL's antialiased bicubic.

    `resize`: "crop" scales the shortest side to S and takes the centre (CLIP), "squash" scales both sides to
    S (SigLIP), "pad" scales the longest side to S and centres it on black. Other values raise `InputError`.
    """

    def __init__(self, image_size: int, resize: Resize = "crop") -> None:
        _check_size(image_size)
        if resize not in get_args(Resize):
            raise InputError(f"resize={resize!r}; expected one of {', '.join(get_args(Resize))}")
        self.image_size = image_size
        self.resize = resize

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """Resize one picture; `generator` is ignored (it is there so that `Augment` fits the same place)."""
        image = to_rgb(image)
        size = (self.image_size, self.image_size)
        if self.resize == "squash":
            return _pixels(image.resize(size, Image.Resampling.BICUBIC)).contiguous()
        if self.resize == "crop":
            return _pixels(self._crop(image)).contiguous()
        return _pixels(self._pad(image)).contiguous()

    def _crop(self, image: Image.Image) -> Image.Image:
        """Scale the shortest side to S, then cut out the centre; both round as torchvision does."""
        size, short = self.image_size, min(image.size)
        scaled = [size if side == short else int(size * side / short) for side in image.size]
        left, top = (round((new - size) / 2) for new in scaled)
        if max(scaled) <= MAX_STRETCH * size:
            whole = image.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
            return whole.crop((left, top, left + size, top + size))
        # A long thin picture scaled whole could need any amount of memory. Only the part that is kept is scaled, whose
        # pixels differ a little from those of the whole.
        box = []
        for start, side, new in zip((left, top), image.size, scaled, strict=True):
            box.append((start * side / new, min((start + size) * side / new, float(side))))
        (x0, x1), (y0, y1) = box
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))

    def _pad(self, image: Image.Image) -> Image.Image:
        ratio = max(image.size) / self.image_size
        width, height = (max(1, round(side / ratio)) for side in image.size)
        canvas = Image.new("RGB", (self.image_size, self.image_size))
        scaled = image.resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(scaled, ((self.image_size - width) // 2, (self.image_size - height) // 2))
        return canvas

    def __repr__(self) -> str:
        return f"Preprocess(image_size={self.image_size}, resize={self.resize!r})"


class Augment:
    """A PIL image -> uint8 (3,S,S): a random crop resized in one call, all randomness from `generator`.

    `scale`: bounds of the crop's share of the area. `ratio`: bounds of its width / height, log-uniform.
    `flip`, `grayscale`: probabilities. `color_jitter`: brightness, contrast and saturation are each
    multiplied by a factor from [1 - color_jitter, 1 + color_jitter]. Raises `InputError` for values out of
    range.

    The resize is torch's uint8 antialiased bicubic: four times as fast as PIL's from 512 to 224 pixels.
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
        pixels = _pixels(to_rgb(image))
        left, top, width, height = self.crop(pixels.shape[2], pixels.shape[1], generator)
        part = pixels[None, :, top : top + height, left : left + width]
        size = (self.image_size, self.image_size)
        if part.shape[-2:] != size:
            part = F.interpolate(part, size, mode="bicubic", antialias=True)
        pixels = part[0]
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
