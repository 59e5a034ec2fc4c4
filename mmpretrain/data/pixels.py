"""One opened picture: upright RGB as a PIL image or as a tensor, decoded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmpretrain.data import jpeg
from mmpretrain.errors import InputError

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
ON_ITS_SIDE = 5
"""The first orientation of which width and height are exchanged."""


class Picture:
    """An opened picture of known size, decoded when it is asked for.

    `width`, `height`: pixels of the upright picture. `data`: the file's bytes, where libjpeg-turbo may decode them
    (without them PIL decodes). `scaled`: let `pixels` make a JPEG smaller while decoding. `fault`: what to raise for
    bytes that cannot be decoded; None raises the decoder's own error.
    """

    def __init__(
        self,
        image: Image.Image,
        data: bytes | None = None,
        scaled: bool = False,
        fault: Callable[[Exception], Exception] | None = None,
    ) -> None:
        self.image, self.scaled, self.fault = image, scaled, fault
        self.data = data if image.format == "JPEG" and image.mode in ("RGB", "L") else None
        if self.data is None:
            self.decoded()  # only a JPEG has all metadata in front of its pixels
        self.orientation = _orientation(image)
        sides = image.size[::-1] if self.orientation >= ON_ITS_SIDE else image.size
        self.width, self.height = sides

    def decoded(self) -> Image.Image:
        """Return the picture as PIL decodes it, in the mode and orientation that the file has."""
        try:
            self.image.load()
        except Exception as error:  # a decoder given damaged bytes raises nearly any type
            if self.fault is None:
                raise
            raise self.fault(error) from error
        return self.image

    def rgb(self) -> Image.Image:
        """Return the whole picture as upright RGB of PIL's own decoder; raises as `to_rgb`."""
        return to_rgb(self.decoded())

    def pixels(self, shrink: float = 1.0) -> Tensor:
        """Return upright RGB, uint8 (3,H,W) in channels-last memory, equal to `rgb`.

        With `scaled`, a JPEG may come out up to `shrink` times smaller, its sides rounded up. Raises as `to_rgb`.
        """
        if self.data is not None:
            found = jpeg.decode(self.data, *self.image.size, shrink if self.scaled else 1.0)
            if found is not None:
                return torch.from_numpy(_upright(found, self.orientation)).permute(2, 0, 1)
        return torch.from_numpy(np.array(self.rgb())).permute(2, 0, 1)


@runtime_checkable
class FromPicture(Protocol):
    """A transform that asks for the pixels it needs instead of taking a whole decoded PIL image."""

    def from_picture(self, picture: Picture, generator: torch.Generator) -> Tensor:
        """Transform one picture to uint8 (3,H,W)."""


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


def converted(image: Image.Image) -> Image.Image:
    """Any picture as RGB the way transformers 5 converts it: transparency on white, nothing turned, no range kept."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation (1 to 8), or 1 where it is absent, unknown or the EXIF block cannot be read."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # a broken metadata block says nothing about the pixels; parsers raise many types
        return 1
    return value if isinstance(value, int) and value in UNTURN else 1


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn (H,W,3) as `UNTURN` does a PIL image."""
    if orientation == 1:
        return pixels
    if orientation >= ON_ITS_SIDE:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
