"""scikit-learn's scans of digits in CLIP_benchmark's layout, and a model that compares them with mean digits."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mmpretrain.data.preprocess import Preprocess
from mmpretrain.model import MultimodalModel
from mmpretrain.pretrained import Pretrained
from mmpretrain.types import Encoded, Padded

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ["the digit {c}", "a scan of {c}."]
SPLITS = {"train": slice(0, 400), "test": slice(1500, 1700)}


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """Pictures (1797,8,8) uint8 and labels (1797,)."""
    data = load_digits()
    return (data.images * 15).astype(np.uint8), data.target


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def write_shards(folder: Path, samples: Sequence[Mapping[str, bytes]], per_shard: int = 90) -> None:
    """Write one split: shards that hold `per_shard` samples, and their number."""
    folder.mkdir(parents=True)
    starts = range(0, len(samples), per_shard)
    for shard, start in enumerate(starts):
        with tarfile.open(folder / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, sample in enumerate(samples[start : start + per_shard], start):
                for field, content in sample.items():
                    info = tarfile.TarInfo(f"s{i:07d}.{field}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "nshards.txt").write_text(f"{len(starts)}\n")


def write_digits(folder: Path, kind: str = "classification") -> Path:
    """Write both splits. Multi-label: the digit, whether it is even, whether it is small. Retrieval: two captions."""
    pictures, labels = scans()
    target: dict[str, Callable[[int], tuple[str, bytes]]] = {
        "classification": lambda label: ("cls", str(label).encode()),
        "multilabel": lambda label: ("npy", npy(multi_hot(label))),
        "retrieval": lambda label: ("txt", f"the digit {NAMES[label]}\na scan of {NAMES[label]}.\n".encode()),
    }
    for split, part in SPLITS.items():
        pairs = zip(pictures[part], labels[part], strict=True)
        samples = [{"png": png(pixels), **dict([target[kind](int(label))])} for pixels, label in pairs]
        write_shards(folder / split, samples)
    (folder / "dataset_type.txt").write_text(f"{kind}\n")
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return folder


def multi_hot(label: int) -> list[int]:
    """Ten classes, of which 8 is "even" and 9 "small"; 0 never occurs."""
    own = [0] * 10
    own[max(label, 1) % 8] = 1
    own[0] = 0
    own[8], own[9] = int(label % 2 == 0), int(label < 5)
    return own


def npy(values: Sequence[int]) -> bytes:
    data = io.BytesIO()
    np.save(data, np.array(values))
    return data.getvalue()


class Pixels(nn.Module):
    """The pixels of one channel as they are: (B,3,8,8) -> (B,64)."""

    width = 64

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Encoded:
        pooled = values[:, 0].float().flatten(1)
        return Encoded(pooled, pooled[:, None], torch.ones(len(pooled), 1, dtype=torch.bool))


class MeanDigits(nn.Module):
    """The sum of the mean digits that a text names: (B,L) -> (B,64)."""

    width = 64

    def __init__(self) -> None:
        super().__init__()
        pictures, labels = scans()
        means = [pictures[:400][labels[:400] == digit].reshape(-1, 64).mean(axis=0) for digit in range(10)]
        table = torch.tensor(np.stack([np.full(64, 2.0), *means]), dtype=torch.float32)
        self.table = nn.Embedding.from_pretrained(table)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Encoded:
        tokens = self.table(values)
        return Encoded(tokens.sum(1), tokens, torch.ones_like(values, dtype=torch.bool))


class NameTokenizer:
    vocab_size, context_length, pad_id, eos_id = 11, 4, 0, 0

    def __call__(self, texts: Sequence[str]) -> Padded:
        found = [[NAMES.index(word) + 1 for word in text.rstrip(".").split() if word in NAMES] for text in texts]
        values = torch.tensor([(row + [0] * 4)[:4] for row in found])
        return Padded(values, values >= 0)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(["", *NAMES][i] for i in ids if i)


def digit_model() -> Pretrained:
    identity = {"image": nn.Identity(), "text": nn.Identity()}
    model = MultimodalModel(64, {"image": Pixels(), "text": MeanDigits()}, projections=identity)
    return Pretrained(model, Preprocess(8), NameTokenizer())  # type: ignore[arg-type]
