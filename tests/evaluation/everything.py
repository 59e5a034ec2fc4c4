"""All evaluators on data whose sizes no rank count divides; imports little, because every rank imports it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmpretrain.evaluation import Captioning, Retrieval, ZeroShotClassification, embed_images
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


def everything() -> dict[str, Any]:
    targets = [["é\n"], 1, "x", None, 2.5, [1]]
    images = embed_images(pretrained().model, Colours(COLOURS, targets, picture), batch_size=1)
    return {
        "retrieval": retrieval(),
        "zero_shot": zero_shot(),
        "captioning": captioning(),
        "fewer pictures than ranks": Retrieval(captioned(2), ks=(1,))(pretrained()),
        "embeddings": images.embeddings.tolist(),
        "targets": images.targets,
    }
