"""Compositional choice: does a picture go with the right caption, or with one that differs from it in a detail?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmpretrain.data.decode import Image, Transform
from mmpretrain.errors import InputError
from mmpretrain.evaluation.confidence import class_recall_interval, metric, wilson
from mmpretrain.evaluation.embed import DataFactory, embed_texts
from mmpretrain.evaluation.features import image_features
from mmpretrain.evaluation.retrieval import TIE, captions_of

if TYPE_CHECKING:
    from mmpretrain.pretrained import Pretrained

CHUNK = 4096


class CaptionChoice:
    """Evaluator: `<type>/accuracy`, the share of pictures nearer to their right caption than to any wrong one.

    `data` maps a type of mistake, such as "swap_att", to a data set of (image, [right caption, wrong caption, ...]).
    A tie counts against the model. `accuracy` is the mean over types. Intervals are Wilson's, and the bootstrap of
    `class_recall_interval` for the mean; chance is one in as many captions as there are. Source: SugarCrepe (Hsieh et
    al. 2023) and ARO (Yuksekgonul et al. 2023).
    """

    def __init__(self, data: Mapping[str, DataFactory], batch_size: int = 256, num_workers: int = 0) -> None:
        if not data:
            raise InputError("`data` is empty; expected a data set for each type of mistake")
        self.data = dict(data)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __call__(self, pretrained: Pretrained) -> dict[str, float]:
        """Let the model choose for every picture; the same numbers on every rank."""
        results: dict[str, float] = {}
        hits, counts, chances = [], [], []
        for name, build in self.data.items():
            hit, count, chance = self._choose(pretrained, build(transform=pretrained.preprocess))
            hits.append(hit)
            counts.append(count)
            chances.append(chance)
            results |= {f"{name}/images": float(count)}
            results |= metric(f"{name}/accuracy", hit / count, wilson(hit, count), chance)
        mean = sum(hit / count for hit, count in zip(hits, counts, strict=True)) / len(hits)
        interval = class_recall_interval(hits, counts)
        return results | metric("accuracy", mean, interval, sum(chances) / len(chances))

    def _choose(self, pretrained: Pretrained, data: Dataset[Any]) -> tuple[int, int, float]:
        """Return right choices, pictures, and the share that chance would choose."""
        images, targets = image_features(pretrained.model, data, self.batch_size, self.num_workers)
        captions = captions_of(targets)
        alone = next((index for index, own in enumerate(captions) if len(own) < 2), None)
        if alone is not None:
            raise InputError(f"item {alone} has one caption; expected the right one and one or more wrong ones")
        flat = [caption for own in captions for caption in own]
        texts = embed_texts(pretrained.model, pretrained.tokenizer, flat, self.batch_size)
        sizes = torch.tensor([len(own) for own in captions])
        scores = own_similarities(images, texts, sizes)
        firsts = sizes.cumsum(0) - sizes
        right = torch.zeros(len(scores), dtype=torch.bool)
        right[firsts] = True
        owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        best_wrong = torch.full((len(sizes),), -torch.inf)
        best_wrong.scatter_reduce_(0, owners[~right], scores[~right], "amax")
        hits = int((scores[right] - best_wrong > TIE).sum())
        return hits, len(sizes), float((1 / sizes.double()).mean())


def own_similarities(images: Tensor, texts: Tensor, sizes: Tensor) -> Tensor:
    """Similarity of each text with its own picture, float32 on the CPU: (M,) of images (N,E) and texts (M,E).

    sizes (N,) int64: how many texts, one after the other, each picture has.
    """
    owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(images.device)
    found = []
    for rows, own in zip(torch.split(texts, CHUNK), torch.split(owners, CHUNK), strict=True):
        with torch.autocast(images.device.type, enabled=False):
            found.append((rows.float() * images[own].float()).sum(dim=1).cpu())
    return torch.cat(found)


class CaptionPairs(Dataset[tuple[Tensor, list[str]]]):
    """Pictures with a right and a wrong caption, from a JSON file as SugarCrepe has it: (image, [right, wrong]).

    `annotations`: a JSON list, or an object whose values are meant, of objects with `filename`, `caption` and
    `negative_caption` (a text or several). `pictures`: the folder of the files. Raises `InputError` where something is
    missing, and `DecodeError` for a picture that cannot be read.
    """

    def __init__(
        self, annotations: str | os.PathLike[str], pictures: str | os.PathLike[str], *, transform: Transform
    ) -> None:
        self.pictures, self.transform = Path(pictures), transform
        self.image = Image(transform, extensions=("picture",))
        try:
            content = json.loads(Path(annotations).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{annotations} cannot be read as JSON: {error}") from error
        items = list(content.values()) if isinstance(content, dict) else content
        if not isinstance(items, list) or not items:
            raise InputError(f"{annotations} holds no pictures; expected a list or an object of them")
        self.items = [_pair(item, f"{annotations}, entry {index}") for index, item in enumerate(items)]
        self.identity = ("CaptionPairs", str(self.pictures.resolve()), json.dumps(self.items))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        name, captions = self.items[index]
        path = self.pictures / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; give the folder that holds it") from error
        return self.image({"__key__": name, "picture": content}, torch.Generator()), captions


def _pair(item: Any, where: str) -> tuple[str, list[str]]:
    """Return the name of a picture and its captions, the right one first."""
    keys = ("filename", "caption", "negative_caption")
    name, right, wrong = (item.get(key) for key in keys) if isinstance(item, dict) else (None, None, None)
    texts = [name, right, *(wrong if isinstance(wrong, list) else [wrong])]
    if len(texts) < 3 or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} is {item!s:.120}; expected texts {', '.join(keys)}")
    return texts[0], texts[1:]
