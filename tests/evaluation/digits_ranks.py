"""A Transformer of random weights on real scans: zero-shot, probe, neighbours, retrieval; every rank imports it."""

from __future__ import annotations

from functools import partial
from typing import Any

from mmpretrain.data.preprocess import Preprocess
from mmpretrain.evaluation import (
    BenchmarkData,
    LinearProbe,
    NearestNeighbours,
    Retrieval,
    ZeroShotClassification,
    run_evaluators,
)
from mmpretrain.pretrained import Pretrained
from tests.evaluation.digits import NameTokenizer
from tests.evaluation.everything import everything
from tests.models import clip


def measure(folder: str, batch_size: int = 64, num_workers: int = 0) -> dict[str, float]:
    """Evaluate `folder`/digits and `folder`/captions."""
    speed = {"batch_size": batch_size, "num_workers": num_workers}
    train, test = (partial(BenchmarkData, f"{folder}/digits", split) for split in ("train", "test"))
    captions = partial(BenchmarkData, f"{folder}/captions")
    evaluators = {
        "zero_shot": ZeroShotClassification(test, **speed),
        "several": ZeroShotClassification(partial(BenchmarkData, f"{folder}/several"), **speed),
        "probe": LinearProbe(train, test, features="pooled", max_iterations=30, **speed),
        "knn": NearestNeighbours(train, test, **speed),
        "retrieval": Retrieval(captions, ks=(1, 5, 50), **speed),
    }
    parts = Pretrained(clip().eval(), Preprocess(16), NameTokenizer())  # type: ignore[arg-type]
    return run_evaluators(parts, evaluators)


def both(folder: str, batch_size: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Evaluate the toys and the scans."""
    return everything(), measure(folder, batch_size)
