"""What every way to classify shares: labels that are checked, hits that are counted, and the metrics made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.evaluation.confidence import class_recall_interval, metric, wilson


def check_ks(ks: Sequence[int], option: str = "ks") -> tuple[int, ...]:
    """Return `ks` as a tuple; raises `InputError` unless they are positive."""
    if not ks or min(ks) < 1:
        raise InputError(f"{option} is {list(ks)}; expected positive numbers such as [1, 5]")
    return tuple(ks)


def labels_of(targets: Sequence[Any], classes: int | None = None) -> Tensor:
    """Return the labels as (N,) int64; raises `InputError` for one that is not a whole number below `classes`."""
    bound = "up" if classes is None else f"to {classes - 1}, one for each of the {classes} class names"
    for index, label in enumerate(targets):
        if not isinstance(label, int) or label < 0 or (classes is not None and label >= classes):
            raise InputError(
                f"item {index} has label {label!r}; expected a whole number from 0 {bound}: "
                "add the missing names or correct the label"
            )
    return torch.tensor(list(targets), dtype=torch.int64)


def class_hits_of(scores: Tensor, labels: Tensor, ks: Sequence[int], behind: Tensor | None = None) -> Tensor:
    """Count per class the samples whose label is among the k highest scores: (len(ks),K).

    scores (B,K) of any range, labels (B,) int64 on the same device. Ties count against the model: a class with the
    label's score comes before it. `behind` (K,) says of how many that is not so: classes of the same score that come
    after it whatever the sample.
    """
    own = scores.gather(1, labels[:, None])
    before = (scores >= own).sum(dim=1) - 1
    if behind is not None:
        before -= behind[labels]
    found = [torch.bincount(labels[before < k], minlength=scores.shape[1]) for k in ks]
    return torch.stack(found)


def classification_metrics(hits: Tensor, counts: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Make `top<k>` and `mean_class_recall` of hits (1+len(ks),K), of which the first row is top-1, and samples (K,).

    Mean per class recall is the mean over the classes that occur of their top-1 recall. Intervals are Wilson's and
    the bootstrap of `class_recall_interval`; chance is that of a random order of the classes.
    """
    found, total, classes = hits.sum(dim=1).tolist(), int(counts.sum()), len(counts)
    results: dict[str, float] = {}
    for k, hit in zip(ks, found[1:], strict=True):
        results |= metric(f"top{k}", hit / total, wilson(hit, total), min(k, classes) / classes)
    hits, counts = hits.cpu(), counts.cpu()
    present = counts > 0
    recall = float((hits[0][present].double() / counts[present]).mean())
    interval = class_recall_interval(hits[0].tolist(), counts.tolist())
    return results | metric("mean_class_recall", recall, interval, 1 / classes)
