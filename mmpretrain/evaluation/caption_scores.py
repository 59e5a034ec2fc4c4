"""How much a caption resembles those people wrote: exact match, ROUGE-L, BLEU-4 and CIDEr-D.

All compare words: lower-case runs of letters and digits. The evaluation code of COCO takes its words from a Java
program instead, which differs in apostrophes and hyphens only; given the same words the numbers are equal.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LONGEST = 4
"""BLEU-4 and CIDEr-D count runs of 1 to 4 words."""
SIGMA = 6.0
"""Words of difference in length at which CIDEr-D's penalty is exp(-1/2)."""

Ngram = tuple[str, ...]


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


def ngrams(text: str) -> Counter[Ngram]:
    """Count the runs of 1 to 4 words."""
    own = words(text)
    return Counter(tuple(own[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(own) - n + 1))


def bleu_counts(caption: str, references: Sequence[str]) -> list[int]:
    """Return what BLEU-4 adds up over captions: matches and runs of 1 to 4 words, own and reference length (10 ints).

    A run matches as often as it stands in the reference that has it most often. The reference length is the nearest
    of the references', the shorter of two.
    """
    own = ngrams(caption)
    allowed: Counter[Ngram] = Counter()
    for reference in references:
        allowed |= ngrams(reference)
    matches, runs = [0] * LONGEST, [0] * LONGEST
    for ngram, count in own.items():
        matches[len(ngram) - 1] += min(count, allowed[ngram])
        runs[len(ngram) - 1] += count
    lengths = (len(words(reference)) for reference in references)
    return [*matches, *runs, runs[0], min(lengths, key=lambda length: (abs(length - runs[0]), length))]


def bleu_4(counts: npt.NDArray[np.float64]) -> float:
    """Make BLEU-4 of the `bleu_counts` (N,10) of a whole data set; 0 where no run of 4 words matches.

    Source: Papineni et al. 2002.
    """
    *shares, length, reference_length = (float(total) for total in counts.sum(axis=0))
    matches, runs = shares[:LONGEST], shares[LONGEST:]
    if min(matches) == 0:
        return 0.0
    mean = math.exp(sum(math.log(match / run) for match, run in zip(matches, runs, strict=True)) / LONGEST)
    return mean * min(1.0, math.exp(1 - reference_length / length))


class _Weighted(NamedTuple):
    """A caption's runs of n words with their tf-idf, their Euclidean length for each n, and its count of words."""

    weights: dict[Ngram, float]
    norms: list[float]
    length: int


class CiderD:
    """CIDEr-D against the references of a whole data set, 0 to 10: `score(caption, references)`.

    A run of words weighs the less the more pictures' references have it; with one picture everything weighs 0.
    Source: Vedantam et al. 2015 with the clipping and the length penalty of CIDEr-D, as COCO's evaluation has it.
    """

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        self.pictures: Counter[Ngram] = Counter()
        count = 0
        for own in references:
            count += 1
            self.pictures.update({ngram for reference in own for ngram in ngrams(reference)})
        self.log_count = math.log(max(count, 1))

    def score(self, caption: str, references: Sequence[str]) -> float:
        """Mean over the references of the similarity of runs of 1 to 4 words, times 10."""
        own = self._weighted(caption)
        found = [self._similarity(own, self._weighted(reference)) for reference in references]
        return 10.0 * sum(found) / len(found)

    def _weighted(self, text: str) -> _Weighted:
        weights = {
            ngram: count * (self.log_count - math.log(max(self.pictures[ngram], 1)))
            for ngram, count in ngrams(text).items()
        }
        squares = [0.0] * LONGEST
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        return _Weighted(weights, [math.sqrt(square) for square in squares], len(words(text)))

    def _similarity(self, own: _Weighted, other: _Weighted) -> float:
        products = [0.0] * LONGEST
        for ngram, weight in own.weights.items():
            there = other.weights.get(ngram, 0.0)
            products[len(ngram) - 1] += min(weight, there) * there
        pairs = zip(products, own.norms, other.norms, strict=True)
        cosines = [product / (a * b) if a and b else 0.0 for product, a, b in pairs]
        return sum(cosines) / LONGEST * math.exp(-((own.length - other.length) ** 2) / (2 * SIGMA**2))
