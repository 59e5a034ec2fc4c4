"""Captioning: how much generated captions resemble those people wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.evaluation.caption_scores import CiderD, bleu_4, bleu_counts, exact_match, rouge_l
from mmpretrain.evaluation.confidence import mean_interval, metric, resampled_interval, wilson
from mmpretrain.evaluation.embed import DataFactory, batches, device_of, evaluating, gather_json, len_of, share
from mmpretrain.evaluation.retrieval import captions_of
from mmpretrain.types import Tokenizer

if TYPE_CHECKING:
    from mmpretrain.model import MultimodalModel
    from mmpretrain.pretrained import Pretrained


class Strategy(Protocol):
    """How to decode: images (B,3,H,W) -> B texts of at most `max_length` tokens (None: no limit)."""

    def __call__(
        self, model: MultimodalModel, images: Tensor, tokenizer: Tokenizer, max_length: int | None
    ) -> list[str]:
        """Generate one caption for each picture."""


class Captioning:
    """Evaluator: `exact_match`, `rouge_l`, `bleu_4` and `cider` of generated captions against the data set's.

    `strategy` decodes (default `mmpretrain.generation.greedy`). `cider` is CIDEr-D from 0 to 10, often reported times
    100. Intervals are Wilson's for exact match and a bootstrap over pictures with a fixed seed for the others. Chance
    is the score of each caption held against the references of the next picture in the data set: what one gets for
    writing in the style of the data without looking.
    """

    def __init__(
        self,
        data: DataFactory,
        max_length: int | None = None,
        strategy: Strategy | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        self.data = data
        self.max_length = max_length
        self.strategy = strategy
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __call__(self, pretrained: Pretrained) -> dict[str, float]:
        """Caption every picture and score the captions; the same numbers on every rank."""
        data = self.data(transform=pretrained.preprocess)
        device, count = device_of(pretrained.model), len_of(data)
        written: list[str] = []
        targets: list[object] = []
        with evaluating(pretrained.model):
            for images, found in batches(data, self.batch_size, self.num_workers):
                written += self._generate(pretrained, images.to(device))
                targets += found
        references = captions_of(gather_json(targets, count, device))
        captions = gather_json(written, count, device)
        cider = CiderD(references)
        own = _scores(captions, references, cider, device)
        chance = _scores(captions, references[1:] + references[:1], cider, device)
        results = {"images": float(count)}
        for column, name in enumerate(("exact_match", "rouge_l", "cider")):
            values = own[:, column]
            # The first is a share of pictures, the others are means of scores.
            interval = mean_interval(values.tolist()) if column else wilson(float(values.sum()), count)
            results |= metric(name, float(values.mean()), interval, float(chance[:, column].mean()))
        counts = own[:, 3:]
        interval = resampled_interval(count, lambda drawn: bleu_4(counts[drawn]))
        return results | metric("bleu_4", bleu_4(counts), interval, bleu_4(chance[:, 3:]))

    def _generate(self, pretrained: Pretrained, images: Tensor) -> list[str]:
        strategy = self.strategy
        if strategy is None:
            from mmpretrain.generation import greedy

            strategy = greedy
        captions = strategy(pretrained.model, images, pretrained.tokenizer, self.max_length)
        if len(captions) != len(images):
            raise InputError(
                f"the strategy wrote {len(captions)} captions for {len(images)} pictures; expected one each"
            )
        return captions


def _scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], cider: CiderD, device: torch.device
) -> npt.NDArray[np.float64]:
    """Score every caption: exact match, ROUGE-L, CIDEr-D and the ten counts of BLEU-4, (N,13).

    This is slow Python: each rank scores its share.
    """
    mine = [(captions[i], references[i]) for i in share(len(captions))]
    rows = [
        [exact_match(*pair), rouge_l(*pair), cider.score(*pair), *(float(number) for number in bleu_counts(*pair))]
        for pair in mine
    ]
    return np.array(gather_json(rows, len(captions), device), dtype=np.float64)
