"""Captions for benchmarks, as texts, so that each side tokenizes them itself.

| kind | what | ids of a caption, start and end included |
| --- | --- | --- |
| `openmoji` | English names of OpenMoji's pictures | 8 on average, 21 at most |
| `web` | one-token words of those names, as many as alt texts of the web have | 16 on average, 77 at most |

Lengths of `web` are the quantiles of a log-normal distribution (sigma 0.6) cut at the context length: most captions
are short, a few fill the context. So every batch has the mean of the distribution, whatever the seed.
"""

from __future__ import annotations

import math
import random
import statistics
from functools import cache

from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.datasets.openmoji_render import drawings

KINDS = ("openmoji", "web")
MEAN, SIGMA, CONTEXT = 16, 0.6, 77


def captions(kind: str, count: int, seed: int = 0) -> list[str]:
    """Draw `count` captions of a kind."""
    generator = random.Random(f"{kind}/{count}/{seed}")
    if kind == "openmoji":
        names = _names()
        return [names[generator.randrange(len(names))] for _ in range(count)]
    if kind == "web":
        words, lengths = _words(), web_lengths(count)
        generator.shuffle(lengths)
        return [" ".join(generator.choices(words, k=length - 2)) for length in lengths]
    raise SystemExit(f"no captions of kind {kind!r}; there are {', '.join(KINDS)}")


def web_lengths(count: int) -> list[int]:
    """`count` lengths in ids, start and end included, in ascending order, `MEAN` on average."""
    normal = statistics.NormalDist(0, SIGMA)
    shape = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    low, high = 1.0, float(CONTEXT)
    for _ in range(60):  # the median whose lengths, cut and rounded, have the mean that is wanted
        median = (low + high) / 2
        found = [min(CONTEXT, max(3, round(median * factor))) for factor in shape]
        low, high = (median, high) if sum(found) < MEAN * count else (low, median)
    return found


@cache
def _names() -> list[str]:
    return [drawing.names["en"] for drawing in drawings()]


@cache
def _words() -> list[str]:
    tokenizer = ClipTokenizer(CONTEXT)
    words = sorted({word for name in _names() for word in name.lower().split() if word.isalpha()})
    return [word for word, row in zip(words, tokenizer(words).mask.sum(1), strict=True) if int(row) == 3]  # type: ignore[union-attr]
