"""Fashion-MNIST: 70,000 grey pictures of clothes in 10 classes, from Debian's package to CLIP_benchmark's layout.

Source: Xiao, Rasul and Vollgraf 2017, MIT licence. The four files are in the IDX format of MNIST, gzipped.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmpretrain.errors import InputError
from mmpretrain.folders import cache_root

DEBIAN = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package puts the files."""
PACKAGE = "dataset-fashion-mnist"
FILES = {"train": "train", "test": "t10k"}
"""Split -> what its files' names begin with."""
CLASSES = (
    "T-shirt",
    "pair of trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
TEMPLATES = (
    "a photo of a {c}.",
    "a black and white photo of a {c}.",
    "a small grey picture of a {c}.",
    "a {c}, a piece of clothing.",
    "a product photo of a {c}.",
)
SAMPLES_PER_SHARD = 10_000
MAX_BYTES = 1 << 28
"""An unpacked file is not larger; Fashion-MNIST's largest has 47 MB."""
_UNSIGNED_BYTES = 8  # the IDX code of the element type


def build(root: str | Path = DEBIAN, out: str | Path | None = None, limit: int | None = None) -> Path:
    """Write the pictures of `root` to `out/{train,test}/*.tar` with the files that go beside; return `out`.

    A sample is a `png` of 28 x 28 grey pixels and a `cls`, in the files' order. A complete `out` is returned at once.
    The same files give the same bytes.

    Args:
        root: Folder of the four files, such as `train-images-idx3-ubyte.gz`, with or without `.gz`.
        out: Folder to make; None is `fashion_mnist` in `$MMPRETRAIN_CACHE`, else `~/.cache/mmpretrain`.
        limit: The first so many pictures of each split only; None is all.

    Raises:
        InputError: a file is missing or is not what its name says, `limit` is below 1, or `out` holds something else.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}; give at least 1, or null for all pictures")
    out = default_out() if out is None else Path(out).expanduser()
    if _is_complete(out, limit):
        return out
    splits = {split: _read_split(Path(root).expanduser(), first, limit) for split, first in FILES.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        for split, (images, labels) in splits.items():
            _write_split(folder / split, images, labels)
        _write(folder / "classnames.txt", *CLASSES)
        _write(folder / "zeroshot_classification_templates.txt", *TEMPLATES)
        _write(folder / "dataset_type.txt", "classification")
        _write(folder / "card.json", json.dumps(_card(limit, splits), indent=1))
        try:
            folder.rename(out)  # replaces an empty folder, fails on a full one
        except OSError:
            if not _is_complete(out, limit):  # another process was first
                raise
    return out


def default_out() -> Path:
    """Where `build` puts the shards when no `out` is given."""
    return cache_root() / "fashion_mnist"


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped or not: an array of the shape that its head names.

    Raises `InputError` where it is damaged, holds other numbers, or unpacks to more than `MAX_BYTES`.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); install {PACKAGE} again, or copy the file again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTES:
        raise InputError(f"{path} is no IDX file of unsigned bytes; expected one of Fashion-MNIST's files")
    axes = content[3]
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if axes == 0 or len(content) - start != math.prod(shape):
        raise InputError(f"{path} announces {shape} = {math.prod(shape)} bytes, but {len(content) - start} follow")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _read_split(root: Path, first: str, limit: int | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    images, labels = (read_idx(_file(root, f"{first}-{what}-ubyte")) for what in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(
            f"{root}: {first} has images {list(images.shape)} and labels {list(labels.shape)}; "
            "expected (N,H,W) and (N,)"
        )
    if len(labels) == 0 or labels.max() >= len(CLASSES):
        raise InputError(f"{root}: the labels of {first} are not those of {len(CLASSES)} classes; expected 0 to 9")
    return images[:limit], labels[:limit]


def _file(root: Path, name: str) -> Path:
    for path in (root / f"{name}.gz", root / name):
        if path.is_file():
            return path
    raise InputError(
        f"{root} has no {name}.gz; install Debian's package with `apt-get install {PACKAGE}`, or give root=, the "
        "folder of Fashion-MNIST's four files"
    )


def _write_split(folder: Path, images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
    from webdataset import TarWriter

    folder.mkdir()
    starts = range(0, len(images), SAMPLES_PER_SHARD)
    for shard, start in enumerate(starts):
        # A fixed time in the headers: the same bytes each time.
        with (folder / f"{shard}.tar").open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as writer:
            for sample in _samples(images, labels, start):
                writer.write(sample)
    _write(folder / "nshards.txt", str(len(starts)))


def _samples(images: npt.NDArray[Any], labels: npt.NDArray[Any], start: int) -> Iterator[dict[str, Any]]:
    for index in range(start, min(start + SAMPLES_PER_SHARD, len(images))):
        data = io.BytesIO()
        Image.fromarray(images[index]).save(data, "PNG")
        yield {"__key__": f"s{index:07d}", "png": data.getvalue(), "cls": str(int(labels[index])).encode()}


def _is_complete(out: Path, limit: int | None) -> bool:
    card = out / "card.json"
    if card.is_file():
        try:
            found = json.loads(card.read_text(encoding="utf-8"))["limit"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{card} is damaged; choose another out, or delete {out}") from error
        if found != limit:
            raise InputError(f"{out} was built with limit={found}, not {limit}; choose another out, or delete it")
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no build of Fashion-MNIST (no card.json); choose another out")
    return False


def _card(limit: int | None, splits: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> dict[str, Any]:
    return {
        "name": "Fashion-MNIST",
        "licence": "MIT",
        "attribution": "Zalando SE: Han Xiao, Kashif Rasul, Roland Vollgraf, 2017",
        "limit": limit,
        "counts": {split: len(labels) for split, (_, labels) in splits.items()},
    }


def _write(path: Path, *lines: str) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
