"""Captioning: how much a generated caption resembles those people wrote, by exact match and ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mmpretrain.distributed import rank, sum_over_ranks, world_size
from mmpretrain.errors import InputError
from mmpretrain.evaluation.confidence import mean_interval, metric, wilson
from mmpretrain.evaluation.embed import DataFactory, batches, device_of, evaluating, gather_json, len_of
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


def words(text: str) -> list[str]:
    """Split into lower-case runs of letters and digits, so spaces around punctuation do not matter."""
    return re.findall(r"[^\W_]+", text.lower())


def exact_match(caption: str, references: Sequence[str]) -> float:
    """1.0 where the caption has the words of any reference, else 0.0; no words match nothing."""
    own = words(caption)
    return float(bool(own) and any(own == words(reference) for reference in references))


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """Best F-measure over references of the longest common subsequence of words.

    Precision is its share of the caption, recall its share of the reference; words are unstemmed. Source: Lin
    2004, with beta = 1.
    """
    own = words(caption)
    return max(_f_measure(own, words(reference)) for reference in references)


def _f_measure(a: list[str], b: list[str]) -> float:
    # lengths[j]: longest common subsequence of the words of `a` read so far and the first j words of `b`.
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    # precision = lcs/|a|, recall = lcs/|b|; their harmonic mean is 2 lcs / (|a| + |b|).
    return 2 * lengths[-1] / (len(a) + len(b)) if lengths[-1] else 0.0


class Captioning:
    """Evaluator: `exact_match` and `rouge_l` of generated captions against those of the data set.

    `strategy` decodes (default `mmpretrain.generation.greedy`). Intervals are Wilson's for exact match and a
    bootstrap over pictures with a fixed seed for ROUGE-L. Chance is the score of each caption held against
    the references of the next picture in the data set: what one gets for writing in the style of the data
    without looking.
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
        others = references[1:] + references[:1]
        # Scoring is slow Python: each rank takes a share of pictures, and the sum fills in the others'.
        scores = torch.zeros(4, count, device=device)
        for i in range(rank(), count, world_size()):
            for row, right in enumerate((references[i], others[i])):
                scores[row, i] = exact_match(captions[i], right)
                scores[2 + row, i] = rouge_l(captions[i], right)
        matches, by_chance, rouge, rouge_by_chance = sum_over_ranks(scores).cpu().double()
        hits = int(matches.sum())
        return {
            "images": float(count),
            **metric("exact_match", hits / count, wilson(hits, count), float(by_chance.mean())),
            **metric("rouge_l", float(rouge.mean()), mean_interval(rouge.tolist()), float(rouge_by_chance.mean())),
        }

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
