"""Small shards of real pictures, with chosen samples spoiled."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection, Mapping
from pathlib import Path

from PIL import Image as PILImage

from mmpretrain.data.datamodule import DataModule, Source
from mmpretrain.data.decode import Image, TextCaption
from mmpretrain.data.examples import Field
from mmpretrain.data.preprocess import Augment
from mmpretrain.data.tokenizer import ByteTokenizer


def picture(number: int) -> bytes:
    data = io.BytesIO()
    PILImage.new("RGB", (8, 8), (number % 256, number // 256, 99)).save(data, "PNG")
    return data.getvalue()


def write_shard(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, fields in samples.items():
            for field, data in fields.items():
                info = tarfile.TarInfo(f"{key}.{field}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(
    folder: Path,
    count: int = 4,
    size: int = 10,
    undecodable: Collection[str] = (),
    silent: Collection[str] = (),
    bare: Collection[str] = (),
) -> Path:
    """Write shards 0.tar, 1.tar ... of samples 0000, 0001 ...; some have no sound picture, words or caption."""
    for shard in range(count):
        samples: dict[str, dict[str, bytes]] = {}
        for number in range(shard * size, (shard + 1) * size):
            key = f"{number:04}"
            fields = {"png": b"no picture" if key in undecodable else picture(number)}
            if key not in bare:
                fields["txt"] = b" \n" if key in silent else f"picture {key}".encode()
            samples[key] = fields
        write_shard(folder / f"{shard}.tar", samples)
    return folder


def fields() -> dict[str, Field]:
    return {"image": Image(Augment(image_size=8, scale=(0.5, 1.0))), "text": TextCaption()}


def tokenizer() -> ByteTokenizer:
    return ByteTokenizer(context_length=24)


def data_module(*folders: Path, batch: int = 8, **options: object) -> DataModule:
    source = Source([str(folder) for folder in folders], fields())
    return DataModule({"pictures": source}, {"text": tokenizer()}, batch, seed=3, **options)  # type: ignore[arg-type]
