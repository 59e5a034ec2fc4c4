"""Golden inputs, fixed for good, and what a model makes of them: pixels, ids and embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.types import Padded

if TYPE_CHECKING:
    from mmpretrain.pretrained import Pretrained

TEXTS = (
    "a photo of a red bicycle",
    "Two CATS, asleep &amp; dreaming; don't wake\tthem!",
    "Größe 3×4 — ein Café in 東京 🚲",
    "seven words that are said over again " * 12,
)
SIDES = ((331, 257), (61, 97))
"""Width and height of the golden pictures in pixels: both ways, odd, larger and smaller than a model's input."""

PIXELS = tuple(f"image.pixels.{number}" for number in range(len(SIDES)))

LEVELS = 2
"""By how much of 255 pixels may differ: versions of Pillow resize in another order."""
TOLERANCE = 1e-4
"""Largest difference of a unit vector's component in float32 between processors; another activation is over 1e-3."""


class Golden(NamedTuple):
    """Golden outputs: ids of the texts, tensors by name, and why an encoder has none.

    Tensors are `image.pixels.0` and so on, one for each picture (some preprocessing gives them shapes of their own),
    `image.embeddings` and `text.embeddings`.
    """

    ids: list[list[int]] | None
    tensors: dict[str, Tensor]
    missing: dict[str, str]

    @property
    def pixels(self) -> list[Tensor]:
        """The golden pictures as the preprocessing gave them; none where no encoder takes pictures."""
        return [self.tensors[name] for name in PIXELS if name in self.tensors]


def picture(width: int, height: int) -> Image.Image:
    """Draw slopes of colour, a chequered channel and a disc, from integers alone."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), ((x // 7 + y // 5) % 2) * 200 + 20], -1)
    inside = (4 * x - 2 * width) ** 2 + (4 * y - 2 * height) ** 2 < min(width, height) ** 2
    pixels[inside] = 255 - pixels[inside]
    return Image.fromarray(pixels.astype(np.uint8))


def golden_outputs(parts: Pretrained) -> Golden:
    """Feed the golden inputs to each encoder that takes a picture or a text; the model must lie on the CPU."""
    model: Any = parts.model
    ids, tensors, missing = None, dict[str, Tensor](), dict[str, str]()
    for name in model.encoders:
        try:
            if name == "image":
                pixels = _pixels(parts)
                tensors |= dict(zip(PIXELS, pixels, strict=True))
                tensors["image.embeddings"] = embeddings(parts, "image", _collated(parts, pixels))
            elif name == "text":
                padded = parts.tokenizer(TEXTS)
                ids = rows(padded)
                tensors["text.embeddings"] = embeddings(parts, "text", padded)
            else:
                missing[name] = "no golden input of this modality"
        except Exception as error:  # an encoder of somebody else's may want anything else
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
    return Golden(ids, tensors, missing)


def embeddings(parts: Pretrained, modality: str, values: Padded | Tensor) -> Tensor:
    """Embed golden inputs (B,E) in float32, in evaluation mode and without compiled code."""
    model: Any = parts.model
    with _plainly(model), torch.no_grad(), torch.autocast("cpu", enabled=False):
        found: Tensor = model.embed(modality, values)
    return found.float().contiguous()


def disagreement(saved: Golden, parts: Pretrained) -> str | None:
    """Say what the model makes of the golden inputs that differs from what was saved; None where nothing does."""
    try:
        if saved.ids is not None:
            for text, then, now in zip(TEXTS, saved.ids, rows(parts.tokenizer(TEXTS)), strict=True):
                if then != now:
                    return f"golden ids: the tokenizer gives {now[:12]} for {text[:30]!r}, the card says {then[:12]}"
        made = _pixels(parts) if saved.pixels else []
        found = [_unlike(then, now) for then, now in zip(saved.pixels, made, strict=True)]
        return next((line for line in found if line is not None), None) or other_vectors(saved, parts)
    except (InputError, RuntimeError, LookupError, TypeError) as error:
        return f"golden inputs cannot be embedded any more ({' '.join(str(error).split())[:300]})"


def other_vectors(saved: Golden, parts: Pretrained) -> str | None:
    """Say how far the model's embeddings of the same pixels and texts are from those saved; None within tolerance."""
    found = None
    if saved.ids is not None:
        found = _apart("text", saved.tensors["text.embeddings"], embeddings(parts, "text", parts.tokenizer(TEXTS)))
    if found is None and saved.pixels:
        now = embeddings(parts, "image", _collated(parts, saved.pixels))
        found = _apart("image", saved.tensors["image.embeddings"], now)
    return found


def rows(padded: Padded) -> list[list[int]]:
    """Return the real ids of each text."""
    if padded.mask is None:
        return [row.tolist() for row in padded.values]
    return [row[kept].tolist() for row, kept in zip(padded.values, padded.mask, strict=True)]


def _pixels(parts: Pretrained) -> list[Tensor]:
    return [parts.preprocess(picture(*sides)).contiguous() for sides in SIDES]


def _collated(parts: Pretrained, pixels: list[Tensor]) -> Padded | Tensor:
    """Make a batch, as the preprocessing says where pictures differ in shape."""
    collate: Any = getattr(parts.preprocess, "collate", torch.stack)
    batch: Padded | Tensor = collate(pixels)
    return batch


def _unlike(then: Tensor, now: Tensor) -> str | None:
    if then.shape != now.shape or then.dtype != now.dtype:
        return f"golden pixels: they are {now.dtype} {list(now.shape)}, the card's {then.dtype} {list(then.shape)}"
    apart = (then.double() - now.double()).abs().max().item()
    limit = LEVELS if then.dtype == torch.uint8 else LEVELS / 255 / 0.2  # normalised by a std of 0.2 or more
    return None if apart <= limit else f"golden pixels: the preprocessing is up to {apart:g} levels off the card's"


def _apart(name: str, then: Tensor, now: Tensor) -> str | None:
    if then.shape != now.shape:
        return f"golden vectors: {name} embeddings are {list(now.shape)}, the card's {list(then.shape)}"
    if torch.allclose(then, now, rtol=0, atol=TOLERANCE):
        return None
    apart = (then - now).abs().nan_to_num(torch.inf).max().item()
    return f"golden vectors: {name} embeddings are up to {apart:.1e} off the card's, over {TOLERANCE:.0e}"


@contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """Evaluation mode, full float32 products, nothing compiled; all as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        for module, mode in training.items():
            module.training = mode
