"""Pictures of several classes each: mean average precision, one class at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.evaluation.confidence import RESAMPLES, metric, percentiles, resamples
from mmpretrain.evaluation.embed import check_finite, in_order, share, similarities


def multi_hot(targets: Sequence[Any], classes: int) -> Tensor:
    """Return (N,classes) bool; raises `InputError` for a target that is not a list of so many zeros and ones."""
    for index, target in enumerate(targets):
        if not isinstance(target, list) or len(target) != classes or not all(value in (0, 1) for value in target):
            raise InputError(
                f"item {index} has the target {target!s:.80}; expected {classes} zeros and ones, "
                "one for each class name: add the missing names or correct the target"
            )
    return torch.tensor(list(targets)).bool()


def average_precision(truth: npt.NDArray[np.bool_], weights: npt.NDArray[np.int64] | None = None) -> float:
    """Mean over the positives of the precision at their place: truth (N,) in order of falling score; nan without any.

    weights (N,): how often each sample counts. Source: CLIP_benchmark's `average_precision_per_class`.
    """
    weights = np.ones(len(truth), dtype=np.int64) if weights is None else weights
    places = np.flatnonzero(truth)
    own = weights[places]
    if not own.sum():
        return float("nan")
    # Before a positive are the others, not its own copies: those would lift every resample above the value itself.
    before, right_before = np.cumsum(weights)[places] - own, np.cumsum(own) - own
    return float((own * (right_before + 1) / (before + 1)).sum() / own.sum())


def chance_precision(positives: int, count: int) -> float:
    """Average precision to expect of a random order, 0 without positives."""
    if positives == 0 or count == 1:
        return float(positives)
    # At place i a positive has (i - 1)(positives - 1)/(count - 1) others before it on average.
    harmonic = float((1 / np.arange(1, count + 1)).sum())
    return (harmonic + (positives - 1) / (count - 1) * (count - harmonic)) / count


def mean_average_precision(images: Tensor, classifier: Tensor, truth: Tensor) -> dict[str, float]:
    """Make `mean_average_precision`, the mean over classes of the average precision of their pictures.

    images (N,E), classifier (K,E), truth (N,K) bool, the same on every rank; each rank sorts its share of the classes.
    As in CLIP_benchmark a class without any picture counts as 0. Ties count against the model. The interval is a
    percentile bootstrap over pictures, in which a class that a resample misses leaves the mean. Raises `InputError`
    where an embedding is not finite.
    """
    check_finite(images)
    check_finite(classifier)
    count, classes = truth.shape
    mine = share(classes)
    orders = [_order(images, classifier[k], truth[:, k]) for k in mine]
    sorted_truth = [truth[:, k].numpy()[order] for k, order in zip(mine, orders, strict=True)]
    scores = np.empty((len(mine), 1 + RESAMPLES))
    scores[:, 0] = [average_precision(own) for own in sorted_truth]
    for column, drawn in enumerate(resamples(count), start=1):
        weights = np.bincount(drawn, minlength=count)
        pairs = zip(sorted_truth, orders, strict=True)
        scores[:, column] = [average_precision(own, weights[order]) for own, order in pairs]
    # Gathered by class, not summed over ranks: the same numbers are added in the same order whatever the ranks.
    every = in_order(torch.from_numpy(scores).to(images.device), classes).cpu().numpy()
    positives = truth.sum(dim=0).tolist()
    value = float(np.nan_to_num(every[:, 0]).mean())
    absent = positives.count(0)
    means = [np.nansum(column) / max(np.isfinite(column).sum() + absent, 1) for column in every[:, 1:].T]
    chance = sum(chance_precision(own, count) for own in positives) / classes
    return metric("mean_average_precision", value, percentiles(means), chance)


def _order(images: Tensor, row: Tensor, truth: Tensor) -> npt.NDArray[np.int64]:
    """Return the pictures in order of falling similarity; among equals those of other classes come first."""
    scores = similarities(images, row[None])[:, 0].cpu().numpy()
    return np.lexsort((truth.numpy(), -scores))
