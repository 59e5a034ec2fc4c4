"""What a metric says beside its value: its 95 % interval, its chance level, and the file it is written to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mmpretrain.errors import InputError
from mmpretrain.whole_file import write_whole

Z95 = 1.959963984540054
"""Half-width of the central 95 % of a standard normal distribution."""

RESAMPLES = 1000
SEED = 0


class Interval(NamedTuple):
    """The ends of a 95 % confidence interval."""

    low: float
    high: float


def wilson(hits: float, count: int) -> Interval:
    """Wilson's score interval of a proportion, `hits` out of `count` independent trials.

    Unlike the textbook normal interval it stays inside [0, 1] and keeps a width at 0 and 1. Source: Wilson
    1927. Raises `InputError` where `count` is 0 or `hits` is not between 0 and `count`.
    """
    if count < 1 or not 0 <= hits <= count:
        raise InputError(
            f"cannot give an interval for {hits} hits out of {count}; expected 0 <= hits <= count, count > 0"
        )
    share, spread = hits / count, Z95 * Z95 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread * spread / 4) / (1 + spread)
    # The ends are exactly 0 and 1 there; rounding must not push the value itself out of its interval.
    return Interval(0.0 if hits == 0 else centre - half, 1.0 if hits == count else centre + half)


def class_recall_interval(hits: Sequence[int], counts: Sequence[int]) -> Interval:
    """Bootstrap interval of mean per class recall from each class's hits and samples, both of length K.

    Percentiles over 1000 resamples of the samples with a fixed seed; a class that a resample misses leaves
    its mean. Drawing samples with replacement is drawing these counts from a multinomial distribution, so the
    result depends on the counts alone: not on the order of the samples nor on how many ranks counted them.
    Where everything or nothing is a hit resampling shows no spread, and the Wilson interval of all samples is
    given instead.
    """
    count = np.asarray(counts, dtype=np.int64)
    hit, count = np.asarray(hits, dtype=np.int64)[count > 0], count[count > 0]
    total = int(count.sum())
    if hit.sum() in (0, total):
        return wilson(int(hit.sum()), total)
    cells = np.concatenate([hit, count - hit]) / total
    # One resample at a time: a thousand of them for a thousand classes would be a table of millions.
    generator = np.random.default_rng(SEED)
    means = []
    for _ in range(RESAMPLES):
        found, missed = generator.multinomial(total, cells).reshape(2, -1)
        present = found + missed > 0
        means.append((found[present] / (found + missed)[present]).mean())
    return percentiles(means)


def mean_interval(values: Sequence[float]) -> Interval:
    """Bootstrap interval of a mean of scores: percentiles over 1000 resamples with a fixed seed."""
    scores = np.asarray(values, dtype=np.float64)
    return resampled_interval(len(scores), lambda drawn: float(scores[drawn].mean()))


def resampled_interval(count: int, statistic: Callable[[npt.NDArray[np.int64]], float]) -> Interval:
    """Bootstrap interval of any statistic of `count` samples, which is called with the indices of those drawn."""
    return percentiles([statistic(drawn) for drawn in resamples(count)])


def resamples(count: int) -> Iterator[npt.NDArray[np.int64]]:
    """Draw `count` indices below `count` with replacement, 1000 times, the same on every call and every rank."""
    generator = np.random.default_rng(SEED)
    for _ in range(RESAMPLES):
        yield generator.integers(0, count, count)


def percentiles(means: Sequence[npt.NDArray[np.float64] | float]) -> Interval:
    """Return the bounds of the central 95 % of what resampling gave."""
    low, high = np.quantile(np.asarray(means, dtype=np.float64), [0.025, 0.975])
    return Interval(float(low), float(high))


def chance_recall(k: int, positives: int, candidates: int) -> float:
    """Probability that a random order of `candidates` puts any of the `positives` among its first `k`."""
    miss = 1.0
    for drawn in range(min(k, candidates)):
        miss *= max(candidates - positives - drawn, 0) / (candidates - drawn)
    return 1.0 - miss


def metric(name: str, value: float, interval: Interval, chance: float) -> dict[str, float]:
    """Spread a metric over the flat keys `name`, `name/ci_low`, `name/ci_high` and `name/chance`."""
    return {
        name: value,
        f"{name}/ci_low": interval.low,
        f"{name}/ci_high": interval.high,
        f"{name}/chance": chance,
    }


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raise `InputError` where a value is NaN or infinite: JSON cannot hold it, and it is never a result."""
    wrong = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    if wrong:
        raise InputError(
            f"{', '.join(wrong)} not finite; expected numbers: look for NaN in the checkpoint's "
            "weights, or for overflow in half precision"
        )


def write_metrics(path: str | Path, metrics: Mapping[str, float]) -> None:
    """Write metrics as JSON sorted by key, through a temporary file, so that `path` is never half written.

    Raises `InputError` where a value is NaN or infinite.
    """
    check_metrics(metrics)
    write_whole(path, json.dumps(dict(metrics), indent=2, sort_keys=True, allow_nan=False) + "\n")
