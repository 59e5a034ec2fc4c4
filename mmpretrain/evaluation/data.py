"""Evaluation data sets read from shards; any other map-style data set of (image, target) pairs serves as
well.

Built like torchvision's, `data(transform=preprocess)`, so a config gives everything else and `_partial_:
true`.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmpretrain.data.decode import Image, JsonCaption, JsonValue, Sample, Transform
from mmpretrain.data.shards import Shard, expand
from mmpretrain.errors import InputError

LabelField = Callable[[Sample, torch.Generator], Any]
ImageField = Callable[[Sample, torch.Generator], Tensor]


class CaptionField(Protocol):
    """A field that can list all captions of a sample, such as `JsonCaption` and `TextCaption`."""

    def captions(self, sample: Sample) -> list[str]:
        """List the captions."""


class ShardClassification(Dataset[tuple[Tensor, int]]):
    """Samples of shards as (image, int label).

    `label` is a field that gives a whole number, or a string to look up in `classes` (without `classes`, a
    string of digits is the number it shows). `image` builds the image field, called as
    `image(transform=transform)`. Raises `InputError` where the shards hold no sample, or a label is not one
    of `classes`.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        transform: Transform,
        label: LabelField | None = None,
        classes: Sequence[str] | None = None,
        image: Callable[..., ImageField] = Image,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.samples = Samples(shards, cache_dir)
        self.image = image(transform=transform)
        self.label = JsonValue() if label is None else label
        self.classes = None if classes is None else list(classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.samples[index]
        generator = torch.Generator().manual_seed(index)
        return self.image(sample, generator), self._number(self.label(sample, generator), sample["__key__"])

    def _number(self, label: Any, key: str) -> int:
        if isinstance(label, str):
            if self.classes is not None and label in self.classes:
                return self.classes.index(label)
            if self.classes is None and label.isdecimal():
                return int(label)
        elif isinstance(label, int) and (self.classes is None or 0 <= label < len(self.classes)):
            return label
        expected = "a whole number; give `classes` to look names up"
        if self.classes is not None:
            expected = f"one of the {len(self.classes)} classes {self.classes[:5]}… or its number; correct `classes`"
        raise InputError(f"sample {key!r} has label {label!r}; expected {expected}, or read another field as `label`")


class ShardCaptions(Dataset[tuple[Tensor, list[str]]]):
    """Samples of shards as (image, list of all its captions).

    `captions` is a caption field (default: "caption" of the sample's json). `image` builds the image field,
    called as `image(transform=transform)`. Raises `InputError` where the shards hold no sample, or a sample
    no caption.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        transform: Transform,
        captions: CaptionField | None = None,
        image: Callable[..., ImageField] = Image,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.samples = Samples(shards, cache_dir)
        self.image = image(transform=transform)
        self.captions: CaptionField = JsonCaption() if captions is None else captions

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        sample = self.samples[index]
        captions = [caption for caption in self.captions.captions(sample) if caption.strip()]
        if not captions:
            raise InputError(
                f"sample {sample['__key__']!r} has no caption; drop it, or read another field as `captions`"
            )
        return self.image(sample, torch.Generator().manual_seed(index)), captions


class Samples:
    """The samples of several shards, numbered through; `InputError` where damage cost some of them."""

    def __init__(self, shards: str | Sequence[str], cache_dir: str | os.PathLike[str] | None) -> None:
        self.shards = [Shard(path, cache_dir) for path in expand(shards)]
        for shard in self.shards:
            if shard.lost:  # a number measured on fewer samples is another number
                first = shard.events[0] if shard.events else None
                what = "" if first is None else f" (byte {first.offset}, sample {first.key!r}: {first.detail})"
                raise InputError(
                    f"{shard.name} is damaged: {shard.lost} of its samples are lost{what}; restore the shard, or write "
                    "a sound one of the samples that are left"
                )
        self.ends = list(accumulate(len(shard) for shard in self.shards))
        if not self.ends or self.ends[-1] == 0:
            raise InputError(f"the shards {shards!r} hold no sample; check the path")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self.ends, index)
        shard, place = self.shards[number], index - (self.ends[number - 1] if number else 0)
        return {"__key__": shard.keys[place], **shard.read(place)}
