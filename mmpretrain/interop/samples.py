"""Pictures and texts on which an exported model is compared with ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmpretrain.interop.parity import max_abs_error
from mmpretrain.interop.programs import TEXTS
from mmpretrain.types import Padded

SEED = 0
SIZES = ((96, 64), (40, 120), (224, 224))
"""Width and height of the pictures."""
ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is turned."""
SAMPLE_TEXTS = (*TEXTS, "The Cat's 3rd hat, #1!", " ".join(["a very long caption that has to be cut"] * 40))


class Samples(NamedTuple):
    """What both sides are given: images, and as pictures (3,H,W) uint8, preprocessed but not normalised; and texts.

    `files`: images as they come out of a file that libraries read in different ways, by what is odd with them.
    """

    images: list[Image.Image]
    pictures: list[Tensor]
    texts: list[str]
    files: dict[str, Image.Image]

    def described(self) -> dict[str, Any]:
        """Say what they are, for the report."""
        return {
            "seed": SEED,
            "pictures": [list(size) for size in SIZES],
            "files": list(self.files),
            "preprocessed": [list(picture.shape) for picture in self.pictures],
            "texts": self.texts,
        }


def samples(preprocess: Any) -> Samples:
    """Draw pictures of noise, coarse and fine, and take the texts."""
    generator = torch.Generator().manual_seed(SEED)
    images = []
    for width, height in SIZES:
        coarse = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
        fine = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        scaled = Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        images.append(Image.blend(scaled, Image.fromarray(fine.numpy()), 0.3))
    return Samples(images, [preprocess(image) for image in images], list(SAMPLE_TEXTS), _files(images[0]))


def _files(image: Image.Image) -> dict[str, Image.Image]:
    """Make files of a picture that are read in different ways."""
    odd = image.resize((95, 63))
    turned, transparent = image.copy(), image.copy()
    turned.getexif()[ORIENTATION] = 6  # on its side
    transparent.putalpha(image.convert("L"))
    return {"of odd sides": odd, "turned (EXIF)": turned, "transparent": transparent, "grey": image.convert("L")}


class Reading(NamedTuple):
    """How a target reads files: pairs (theirs, ours) of pixels that must be equal, and differences that are known."""

    outputs: dict[str, tuple[Tensor, Tensor]]
    notes: dict[str, float]


def read_files(
    given: Samples, theirs: Callable[[Image.Image], Tensor], ours: Callable[[Image.Image], Tensor], same: bool
) -> Reading:
    """Compare the normalised pixels of odd files with those of the model's own preprocessing.

    `same`: whether that reads files as the target does, so that pixels must be equal; else they are noted.
    """
    pairs = {f"pixels of files {kind}": (theirs(image), ours(image)) for kind, image in given.files.items()}
    return Reading(pairs, {}) if same else Reading({}, {name: max_abs_error(*pair) for name, pair in pairs.items()})


def normalized(pictures: list[Tensor], mean: list[float], std: list[float]) -> list[Tensor]:
    """Normalise (3,H,W) uint8 pictures, as another library does before its model."""
    centre, spread = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return [(picture.float() / 255 - centre) / spread for picture in pictures]


def real_ids(ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """Ids (B,L) with -1 where padding stands, as (B,length)."""
    kept = ids.masked_fill(~mask.bool(), -1)
    return torch.nn.functional.pad(kept, (0, length - kept.shape[1]), value=-1)


def batched(preprocess: Any, pictures: list[Tensor]) -> Padded:
    """Put preprocessed pictures into one batch, on canvases where they differ in shape."""
    collate = getattr(preprocess, "collate", None)
    found: Padded = Padded(torch.stack(pictures)) if collate is None else collate(pictures)
    return found
