"""Linear probe: logistic regression on the features of a frozen image encoder, by scikit-learn.

Source: Radford et al. 2021, appendix A.3: L-BFGS of at most 1000 iterations, the L2 penalty chosen on a validation
split among 97 values, eight for each power of ten, by a search that begins with seven of them; then everything but
the test split is fitted once more with the best.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mmpretrain.distributed import gather_objects, of_rank_zero, rank, world_size
from mmpretrain.errors import InputError
from mmpretrain.evaluation.classification import check_ks, class_hits_of, classification_metrics, labels_of
from mmpretrain.evaluation.embed import DataFactory, Embedded
from mmpretrain.evaluation.features import Features, check_features, image_features
from mmpretrain.evaluation.train_split import class_count, held_out

if TYPE_CHECKING:
    from mmpretrain.pretrained import Pretrained

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

GRID: tuple[float, ...] = tuple(10.0 ** (power / 8) for power in range(-48, 49))
"""Values of C, scikit-learn's inverse of the penalty, from 1e-6 to 1e6."""
FIRST_STEP = 16
CHUNK = 4096
"""Test pictures that are scored at a time."""


def search(score: Callable[[float], float], grid: Sequence[float] = GRID) -> tuple[float, float]:
    """Find the value of the grid with the best score, and that score: every 16th first, then around the peak.

    Each rank scores its share of the values. Among equals the smallest value, the strongest penalty, is taken.
    """
    known: dict[int, float] = {}
    points, step = list(range(0, len(grid), FIRST_STEP)), FIRST_STEP
    while True:
        new = [point for point in points if 0 <= point < len(grid) and point not in known]
        mine = [[point, score(grid[point])] for point in new[rank() :: world_size()]]
        known |= {int(point): value for part in gather_objects(mine) for point, value in part}
        best = max(known, key=lambda point: (known[point], -point))
        if step == 1:
            return grid[best], known[best]
        step //= 2
        points = [best - step, best + step]


def fit(features: Floats, labels: Labels, c: float, max_iterations: int = 1000) -> Any:
    """Fit scikit-learn's logistic regression to features (N,D) and labels (N,) of two classes or more; deterministic.

    Raises `InputError` without scikit-learn.
    """
    regression, warning = _regression()
    with warnings.catch_warnings():
        # The limit of iterations is part of the recipe: the weakest penalties of the grid reach it.
        warnings.simplefilter("ignore", warning)
        return regression(C=c, max_iter=max_iterations).fit(features, labels)


def _regression() -> tuple[Any, type[Warning]]:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise InputError("a linear probe needs scikit-learn; pip install 'mmpretrain-contrastive[eval]'") from error
    return LogisticRegression, ConvergenceWarning


def scores_of(model: Any, features: Floats, classes: int) -> Floats:
    """Return the scores (N,classes) of a fitted model; a class it never saw has minus infinity."""
    found = model.decision_function(features)
    scores = np.full((len(features), classes), -np.inf)
    # scikit-learn gives one score for two classes.
    scores[:, model.classes_] = np.stack([-found, found], axis=1) if found.ndim == 1 else found
    return scores


class LinearProbe:
    """Evaluator: `top1`, `top5` and `mean_class_recall` on `data` of a logistic regression fitted on `train`.

    All are data sets of (image, int label). The penalty is chosen on `validation`, or without one on every fifth
    training picture of each class; afterwards both are fitted together. `C` is the inverse of the penalty chosen,
    `validation_top1` the accuracy it was chosen for. `features`: "embedding" gives unit vectors of the shared space as
    CLIP_benchmark does, "pooled" the encoder's output before the projection as CLIP's paper does.

    The fits of the search are shared out over ranks, rank 0 makes the last one. Each holds all features in float64.
    """

    def __init__(
        self,
        train: DataFactory,
        data: DataFactory,
        validation: DataFactory | None = None,
        features: Features = "embedding",
        max_iterations: int = 1000,
        ks: Sequence[int] = (1, 5),
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        check_features(features)
        self.train = train
        self.data = data
        self.validation = validation
        self.features: Features = features
        (self.max_iterations,) = check_ks([max_iterations], "max_iterations")
        self.ks = check_ks(ks)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __call__(self, pretrained: Pretrained) -> dict[str, float]:
        """Fit the probe and classify every picture of `data`; the same numbers on every rank."""
        _regression()  # what is missing is said by every rank, not only by those that fit first
        train_data, data = (build(transform=pretrained.preprocess) for build in (self.train, self.data))
        train, test = self._features(pretrained, train_data), self._features(pretrained, data)
        classes = class_count(train_data, data, train.targets, test.targets)
        x, y = _arrays(train, classes)
        if self.validation is None:
            held = held_out(y)
        else:
            more, more_labels = _arrays(
                self._features(pretrained, self.validation(transform=pretrained.preprocess)), classes
            )
            held = np.arange(len(y) + len(more_labels)) >= len(y)
            x, y = np.concatenate([x, more]), np.concatenate([y, more_labels])
        parts = (x[~held], y[~held], x[held], y[held])
        if len(seen := np.unique(parts[1])) < 2:
            raise InputError(f"the training pictures have the labels {seen.tolist()}; expected at least two classes")
        c, validated = search(lambda value: self._accuracy(*parts, value))
        results = {"images": float(len(test.targets)), "train_images": float(len(y)), "classes": float(classes)}
        labels = labels_of(test.targets, classes)
        found = None
        if rank() == 0:
            model, hits = fit(x, y, c, self.max_iterations), torch.zeros(1 + len(self.ks), classes, dtype=torch.int64)
            features = torch.split(torch.from_numpy(_arrays(test, classes)[0]), CHUNK)
            for rows, own in zip(features, torch.split(labels, CHUNK), strict=True):
                hits += class_hits_of(torch.from_numpy(scores_of(model, rows.numpy(), classes)), own, (1, *self.ks))
            found = hits.tolist()
        hits = torch.tensor(of_rank_zero(found))
        counts = torch.bincount(labels, minlength=classes)
        results |= {"C": c, "validation_top1": validated}
        return results | classification_metrics(hits, counts, self.ks)

    def _features(self, pretrained: Pretrained, data: Any) -> Embedded:
        return image_features(pretrained.model, data, self.batch_size, self.num_workers, self.features)

    def _accuracy(self, x: Floats, y: Labels, held_x: Floats, held_y: Labels, c: float) -> float:
        return float((fit(x, y, c, self.max_iterations).predict(held_x) == held_y).mean())


def _arrays(embedded: Embedded, classes: int) -> tuple[Floats, Labels]:
    labels = labels_of(embedded.targets, classes)
    return embedded.embeddings.cpu().double().numpy(), labels.numpy()
