"""Pictures and texts on which an exported model is compared with ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmpretrain.interop.programs import TEXTS
from mmpretrain.types import Padded

SEED = 0
SIZES = ((96, 64), (40, 120), (224, 224))
"""Width and height of the pictures."""
SAMPLE_TEXTS = (*TEXTS, "The Cat's 3rd hat, #1!", " ".join(["a very long caption that has to be cut"] * 40))


class Samples(NamedTuple):
    """What both sides are given: images, and as pictures (3,H,W) uint8, preprocessed but not normalised; and texts."""

    images: list[Image.Image]
    pictures: list[Tensor]
    texts: list[str]

    def described(self) -> dict[str, Any]:
        """Say what they are, for the report."""
        return {
            "seed": SEED,
            "pictures": [list(size) for size in SIZES],
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
    return Samples(images, [preprocess(image) for image in images], list(SAMPLE_TEXTS))


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
