"""All evaluators on data whose sizes no rank count divides; imports little, because every rank imports it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmpretrain.evaluation import (
    CaptionChoice,
    Captioning,
    LinearProbe,
    NearestNeighbours,
    Retrieval,
    ZeroShotClassification,
    embed_images,
)
from mmpretrain.model import MultimodalModel
from mmpretrain.types import Tokenizer
from tests.evaluation.toy import COLOURS, WORDS, Colours, picture, pretrained

NAMES = list(WORDS)


def captioned(count: int = 41) -> partial[Colours]:
    """Random pictures with 1 to 3 captions each, some of them shared."""
    generator = torch.Generator().manual_seed(3)
    colours = torch.randint(0, 256, (count, 3), generator=generator).tolist()
    draws = torch.randint(0, 3, (count, 3, 4), generator=generator).tolist()
    texts = [[" ".join(NAMES[w] for w in words) for words in own] for own in draws]
    captions = [own[: 1 + i % 3] for i, own in enumerate(texts)]
    return partial(Colours, colours, captions)


def labelled(count: int = 41) -> partial[Colours]:
    """Random pictures labelled, mostly, with the strongest colour; class 2 never occurs."""
    colours = torch.randint(0, 256, (count, 3), generator=torch.Generator().manual_seed(5))
    labels = [int(c.argmax()) % 2 if i % 4 else i % 2 for i, c in enumerate(colours)]
    return partial(Colours, colours.tolist(), labels)


def several(count: int = 41) -> partial[Colours]:
    """Random pictures of several classes: which of the colours are strong, and whether it is an odd one."""
    colours = torch.randint(0, 256, (count, 3), generator=torch.Generator().manual_seed(7)).tolist()
    return partial(Colours, colours, [[int(c > 99) for c in own] + [i % 2] for i, own in enumerate(colours)])


def nearest(model: MultimodalModel, images: Tensor, tokenizer: Tokenizer, max_length: int | None) -> list[str]:
    """Write the picture's strongest colour."""
    texts = model.embed("text", tokenizer(NAMES))
    return [NAMES[i] for i in (model.embed("image", images) @ texts.T).argmax(1).tolist()]


def retrieval(batch_size: int = 4, num_workers: int = 0) -> dict[str, float]:
    return Retrieval(captioned(), batch_size=batch_size, num_workers=num_workers)(pretrained())


def zero_shot(batch_size: int = 4, num_workers: int = 0) -> dict[str, float]:
    names, templates = [*NAMES, "red green"], ["{}", "{} blue"]
    return ZeroShotClassification(labelled(), names, templates, (2,), batch_size, num_workers)(pretrained())


def captioning(batch_size: int = 4, num_workers: int = 0) -> dict[str, float]:
    return Captioning(captioned(), 9, nearest, batch_size, num_workers)(pretrained())


def multi_label(batch_size: int = 4, num_workers: int = 0) -> dict[str, float]:
    names = [*NAMES, "red green"]
    return ZeroShotClassification(several(), names, ["{}"], (1,), batch_size, num_workers)(pretrained())


def knn(batch_size: int = 4, num_workers: int = 0) -> dict[str, float]:
    evaluator = NearestNeighbours(labelled(50), labelled(41), (3, 200), ks=(1, 2), batch_size=batch_size, chunk_size=4)
    evaluator.num_workers = num_workers
    return evaluator(pretrained())


def probe(batch_size: int = 4, num_workers: int = 0) -> dict[str, float]:
    evaluator = LinearProbe(labelled(50), labelled(41), max_iterations=100, ks=(1, 2), batch_size=batch_size)
    evaluator.num_workers = num_workers
    return evaluator(pretrained())


def choice(batch_size: int = 4, num_workers: int = 0) -> dict[str, float]:
    colours = captioned().args[0]
    pairs = [["red blue", "green"], ["green", "blue", "red"], ["blue green", "red"]]
    first = partial(Colours, colours, [pairs[i % 3] for i in range(41)])
    second = partial(Colours, colours[:3], pairs)
    return CaptionChoice({"first": first, "second": second}, batch_size, num_workers)(pretrained())


def everything() -> dict[str, Any]:
    targets = [["é\n"], 1, "x", None, 2.5, [1]]
    images = embed_images(pretrained().model, Colours(COLOURS, targets, picture), batch_size=1)
    return {
        "retrieval": retrieval(),
        "zero_shot": zero_shot(),
        "captioning": captioning(),
        "multi_label": multi_label(),
        "knn": knn(),
        "probe": probe(),
        "choice": choice(),
        "fewer pictures than ranks": Retrieval(captioned(2), ks=(1,))(pretrained()),
        "embeddings": images.embeddings.tolist(),
        "targets": images.targets,
    }
