"""Pictures in their own shape: the largest size whose patches fit a budget, and canvases that hold several (NaFlex)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmpretrain.data.pixels import Picture, converted
from mmpretrain.data.resize import RESAMPLING, Interpolation
from mmpretrain.errors import InputError
from mmpretrain.types import Padded

Read = Literal["upright", "rgb"]

MAX_SCALE = 100.0
"""How much a tiny picture is enlarged at most."""
PRECISION = 1e-5
"""How finely the scale is searched."""


class NaFlexPreprocess:
    """A PIL image -> uint8 (3,H,W), the same every time: upright RGB in its own shape, resized by PIL (SigLIP 2).

    H and W are multiples of `patch_size`, the largest of which at most `max_patches` patches are needed. `read` is that
    of `Preprocess`: "rgb" takes files as transformers does. Raises `InputError` for numbers under 1 and other words.
    """

    def __init__(
        self,
        patch_size: int = 16,
        max_patches: int = 256,
        interpolation: Interpolation = "bilinear",
        read: Read = "upright",
    ) -> None:
        for name, value in (("patch_size", patch_size), ("max_patches", max_patches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}; expected an integer of at least 1")
        for name, word, kind in (("interpolation", interpolation, Interpolation), ("read", read, Read)):
            if word not in get_args(kind):
                raise InputError(f"{name}={word!r}; expected one of {', '.join(get_args(kind))}")
        self.patch_size, self.max_patches = patch_size, max_patches
        self.interpolation, self.read = interpolation, read

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """Resize one picture; `generator` is ignored (it is there as in the other transforms)."""
        return self.from_picture(Picture(image), generator)

    def from_picture(self, picture: Picture, generator: torch.Generator | None = None) -> Tensor:
        """Resize one opened picture, as a call does."""
        image = picture.rgb() if self.read == "upright" else converted(picture.decoded())
        height, width = fitting_size(image.height, image.width, self.patch_size, self.max_patches)
        scaled = image.resize((width, height), RESAMPLING[self.interpolation])
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()

    def collate(self, pictures: Sequence[Tensor]) -> Padded:
        """Put resized pictures, which may differ in shape, on canvases for `NaFlexImageEncoder`."""
        return on_canvas(pictures, self.patch_size)

    def __repr__(self) -> str:
        return (
            f"NaFlexPreprocess(patch_size={self.patch_size}, max_patches={self.max_patches}, "
            f"interpolation={self.interpolation!r}, read={self.read!r})"
        )


def fitting_size(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Height and width of the largest scaled picture that needs at most `max_patches` patches (SigLIP 2).

    Each side is rounded up to a multiple of `patch_size`, and the scale found by bisection, as big_vision finds it.
    """

    def side(length: int, scale: float) -> int:
        return max(math.ceil(length * scale / patch_size), 1)

    low, high = PRECISION / 10, MAX_SCALE
    while high - low >= PRECISION:
        middle = (low + high) / 2
        if side(height, middle) * side(width, middle) <= max_patches:
            low = middle
        else:
            high = middle
    return side(height, low) * patch_size, side(width, low) * patch_size


def on_canvas(pictures: Sequence[Tensor], patch_size: int) -> Padded:
    """Stand pictures (C,h,w) top left on canvases of one size: values (B,C,H,W), mask (B,N) over patches.

    Raises `InputError` for no pictures, and for sides that are no multiples of `patch_size`.
    """
    if not pictures:
        raise InputError("there is no picture to put on a canvas; expected at least one")
    for picture in pictures:
        if picture.ndim != 3 or picture.shape[-2] % patch_size or picture.shape[-1] % patch_size:
            raise InputError(
                f"a picture has shape {tuple(picture.shape)}; expected (C,H,W) with sides that are multiples of "
                f"{patch_size}: resize it with NaFlexPreprocess of that patch_size"
            )
    height, width = (max(picture.shape[side] for picture in pictures) for side in (-2, -1))
    values = pictures[0].new_zeros(len(pictures), len(pictures[0]), height, width)
    mask = torch.zeros(len(pictures), height // patch_size, width // patch_size, dtype=torch.bool)
    for row, picture in enumerate(pictures):
        values[row, :, : picture.shape[-2], : picture.shape[-1]] = picture
        mask[row, : picture.shape[-2] // patch_size, : picture.shape[-1] // patch_size] = True
    return Padded(values, mask.flatten(1))
