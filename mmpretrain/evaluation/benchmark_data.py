"""Data sets in CLIP_benchmark's layout: a folder or an address with shards by split and three small text files.

    {split}/nshards.txt, {split}/0.tar, {split}/1.tar, ...
    dataset_type.txt                          classification (also without the file), multilabel or retrieval
    classnames.txt                            one a line, in the order of the labels
    zeroshot_classification_templates.txt     one a line, {c} where the class name belongs

A sample is a picture (webp, png, jpg, jpeg) and its target: `cls` (a number), `npy` (a 0 or 1 for each class) or `txt`
(a caption a line).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmpretrain.data.cache import REMOTE, fetch, local_path, scheme_of
from mmpretrain.data.decode import DecodeError, Image, Npy, Sample, TextCaption, Transform
from mmpretrain.data.download import Refused
from mmpretrain.data.fields import name_of
from mmpretrain.data.redact import redact
from mmpretrain.errors import InputError
from mmpretrain.evaluation.benchmark_names import benchmark_classes, benchmark_templates, with_braces
from mmpretrain.evaluation.data import ImageField, Samples

EXTENSIONS = ("webp", "png", "jpg", "jpeg")
HUB_PAGE = re.compile(r"https://huggingface\.co/datasets/([^/]+/[^/]+)(?:/(?:tree|resolve)/([^/]+))?/?")


class BenchmarkData(Dataset[tuple[Tensor, Any]]):
    """One split of a data set in CLIP_benchmark's layout, as (image, target), the target by `kind`.

    `kind` "classification": an int label; "multilabel": a list with a 0 or 1 for each class; "retrieval": a list of
    captions. `root` is a folder, an address (`hf://datasets/org/name`, https, s3, gs), or the data set's page on the
    Hugging Face hub. `classes` and `templates` (with `{}` where the class name belongs) are the folder's own; where it
    has none, those that the `clip-benchmark` package has for `name` in `language`, else None. `image` builds the image
    field, called as `image(transform=transform, extensions=...)`.

    `identity` is equal for equal pictures and targets. Raises `InputError` where a file is missing or says what is
    not known (names and templates when they are asked for), and `DecodeError` for a sample without a picture or target
    that can be read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "test",
        *,
        transform: Transform,
        name: str | None = None,
        language: str = "en",
        image: Callable[..., ImageField] = Image,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root, self.split, self.transform = _address(os.fspath(root)), split, transform
        self.name, self.language, self.cache_dir = name, language, cache_dir
        self.shown = redact(self.root)  # an address may hold a password
        count = self._shards()
        self.kind = (self._optional("dataset_type.txt") or "classification").strip().lower()
        if self.kind not in TARGETS:
            raise InputError(f"{self.shown}/dataset_type.txt says {self.kind!r}; expected one of {', '.join(TARGETS)}")
        shards = [f"{self.root}/{split}/{number}.tar" for number in range(count)]
        self.samples = Samples(shards, cache_dir)
        self.image = image(transform=transform, extensions=EXTENSIONS)
        self.identity = (self.kind, image, *(shard.digest for shard in self.samples.shards))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        sample = self.samples[index]
        return self.image(sample, torch.Generator().manual_seed(index)), TARGETS[self.kind](sample)

    @cached_property
    def classes(self) -> list[str] | None:
        """Names of the classes in the order of the labels, None where they are not known or there are no classes."""
        own = None if self.kind == "retrieval" else _lines(self._optional("classnames.txt"))
        if own is not None and "" in own:
            raise InputError(f"{self.shown}/classnames.txt: line {own.index('') + 1} is empty; write a name a line")
        if own is None and self.kind != "retrieval" and self.name is not None:
            return benchmark_classes(self.name, self.language)
        return own

    @cached_property
    def templates(self) -> list[str] | None:
        """Sentences with `{}` where the class name belongs, None where they are not known or there are no classes."""
        place = "zeroshot_classification_templates.txt"
        own = None if self.kind == "retrieval" else with_braces(_lines(self._optional(place)))
        if own is None and self.kind != "retrieval" and self.name is not None:
            return benchmark_templates(self.name, self.language)
        return own

    def _shards(self) -> int:
        place = f"{self.split}/nshards.txt"
        advice = f"{self.shown} has no {place}, the number of its shards; check the address and the split"
        try:
            text = self._text(place)
        except Refused as error:  # the reason may be another one, such as a package that is missing
            raise InputError(f"{advice} ({error})") from None
        if text is None:
            raise InputError(advice)
        if not text.strip().isdecimal() or int(text) < 1:
            raise InputError(f"{self.shown}/{place} says {text.strip()!r:.80}; expected a number, such as 1")
        count = int(text)
        if scheme_of(self.root) not in REMOTE and local_path(f"{self.root}/{self.split}/{count}.tar").is_file():
            raise InputError(
                f"{self.shown}/{place} says {count}, but there is {count}.tar, one more; correct the number"
            )
        return count

    def _optional(self, name: str) -> str | None:
        try:
            return self._text(name)
        except Refused:  # some stores call forbidden what does not exist
            return None

    def _text(self, name: str) -> str | None:
        """Return the text of a file of the data set, None where there is none; `Refused` where the store says so."""
        place = f"{self.root}/{name}"
        if scheme_of(place) in REMOTE:
            path = fetch(place, self.cache_dir)
        else:
            path = local_path(place)
            if not path.is_file():
                return None
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.shown}/{name} is not UTF-8 text ({error}); re-encode it") from error


def _address(root: str) -> str:
    """Write a hub page as the address of its files; other roots lose no more than a slash at the end."""
    page = HUB_PAGE.fullmatch(root)
    if page is None:
        return root.rstrip("/") or "/"
    return f"hf://datasets/{page[1]}" + (f"@{page[2]}" if page[2] else "")


def _lines(text: str | None) -> list[str] | None:
    """Split at line feeds alone: a name may hold what else Unicode calls the end of a line; the last may be empty."""
    return None if text is None else [line.strip() for line in text.rstrip().split("\n") if text.strip()]


def _label(sample: Sample) -> int:
    text = TextCaption("cls").captions(sample)[0]
    if not text.isdecimal():
        raise DecodeError(f"{name_of(sample, 'cls')}: {text!r:.80} is no class number; expected one from 0 up")
    return int(text)


def _classes(sample: Sample) -> list[int]:
    values = Npy("npy")(sample, torch.Generator())
    if values.ndim != 1 or not bool(((values == 0) | (values == 1)).all()):
        raise DecodeError(
            f"{name_of(sample, 'npy')}: {values.dtype} {list(values.shape)}; expected a 0 or 1 for each class"
        )
    found: list[int] = values.to(torch.int64).tolist()
    return found


def _captions(sample: Sample) -> list[str]:
    text = TextCaption("txt").captions(sample)[0]
    captions = [line.strip() for line in text.split("\n") if line.strip()]
    if not captions:
        raise DecodeError(f"{name_of(sample, 'txt')}: no caption; expected one a line")
    return captions


TARGETS: dict[str, Callable[[Sample], Any]] = {
    "classification": _label,
    "multilabel": _classes,
    "retrieval": _captions,
}
"""What dataset_type.txt may say -> how the target of a sample is read."""
