"""What a probe needs of its training pictures: how many classes there are, and a part to choose settings on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from mmpretrain.errors import InputError
from mmpretrain.evaluation.classification import labels_of

HOLD_OUT = 5
"""One of so many pictures of a class is held out."""


def class_count(train: Dataset[Any], data: Dataset[Any], *targets: Sequence[Any]) -> int:
    """Return the number of classes: as many as the data sets name, or as the largest label says.

    Raises `InputError` where the two name other classes, or a target is not a label.
    """
    named = [names for names in (_names(part) for part in (train, data)) if names]
    if len(named) == 2 and named[0] != named[1]:
        raise InputError(
            f"the training data have the classes {named[0][:3]}… ({len(named[0])}), the test data {named[1][:3]}… "
            f"({len(named[1])}); expected the same in the same order"
        )
    return len(named[0]) if named else 1 + max(int(labels_of(part).max()) for part in targets)


def _names(data: Dataset[Any]) -> list[str] | None:
    try:
        names = getattr(data, "classes", None)
    except InputError:  # names that are nowhere to be found are not needed here
        return None
    return None if names is None else list(names)


def held_out(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Say which samples are held out, (N,): every fifth of each class in data-set order, the same on every call.

    Raises `InputError` where no class has five.
    """
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[HOLD_OUT - 1 :: HOLD_OUT]] = True
    if not chosen.any():
        raise InputError(
            f"no class has {HOLD_OUT} training pictures, so none can be held out to choose the regularisation on; "
            "give `validation`, a data set of its own"
        )
    return chosen
