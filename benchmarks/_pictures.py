"""Shards of JPEGs that look like photographs, made from the two that scikit-learn ships."""

from __future__ import annotations

import functools
import io
import random
from pathlib import Path
from typing import Any

from mmpretrain.data.shards import expand

SHARD = 128
QUALITY = 75  # 26 kB for a picture of 512 x 384
WORDS = "a the old red boat lies in front of palace and flower opens on green lake under morning"


def shards(folder: Path, count: int, size: tuple[int, int] = (512, 384)) -> str:
    """Return the pattern of shards with `count` pictures (`jpg`) and captions (`txt`), no two alike; made once.

    A quarter of the pictures stand upright.
    """
    import webdataset

    place = folder / f"pictures-{count}-{size[0]}x{size[1]}-q{QUALITY}"
    last = (count - 1) // SHARD
    pattern = str(place / f"{{00000..{last:05}}}.tar")
    if (place / "made").is_file():
        return pattern
    place.mkdir(parents=True, exist_ok=True)
    for number in range(last + 1):
        with webdataset.TarWriter(str(place / f"{number:05}.tar"), encoder=False) as writer:
            for i in range(number * SHARD, min(count, (number + 1) * SHARD)):
                writer.write({"__key__": f"{i:06}", "jpg": picture(i, size), "txt": caption(i).encode()})
    (place / "made").touch()
    assert len(expand(pattern)) == last + 1
    return pattern


def caption(index: int) -> str:
    """Return the caption of a picture: about 16 ids with start and end, and no other picture's."""
    generator = random.Random(index)
    return " ".join([*generator.choices(WORDS.split(), k=generator.randint(4, 16)), *str(index)])


def picture(index: int, size: tuple[int, int]) -> bytes:
    """Return a JPEG: two parts of the photographs, mixed, with a little noise of the sensor's kind."""
    import numpy as np
    from PIL import Image

    generator = random.Random(index)
    width, height = size if generator.random() < 0.75 else size[::-1]
    parts = []
    for _ in range(2):
        photo = Image.fromarray(generator.choice(_photos()))
        share = generator.uniform(0.4, 1)
        scale = share * min(photo.width / width, photo.height / height)
        left = generator.uniform(0, photo.width - scale * width)
        top = generator.uniform(0, photo.height - scale * height)
        part = photo.resize(
            (width, height), Image.Resampling.BICUBIC, (left, top, left + scale * width, top + scale * height)
        )
        parts.append(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else part)
    mixed = np.asarray(Image.blend(parts[0], parts[1], generator.choice([0.0, 0.2, 0.4])))
    noise = np.random.default_rng(index).normal(0, 1, mixed.shape[:2])[..., None]
    made = Image.fromarray(np.clip(mixed + noise, 0, 255).astype(np.uint8))
    stream = io.BytesIO()
    made.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


@functools.cache
def _photos() -> list[Any]:
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)
