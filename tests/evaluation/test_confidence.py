from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import comb
from scipy.stats import binomtest

from mmpretrain.errors import InputError
from mmpretrain.evaluation import (
    chance_recall,
    class_recall_interval,
    mean_interval,
    wilson,
    write_metrics,
)


@given(count=st.integers(1, 10**6), share=st.floats(0, 1))
def test_wilson_is_scipys(count: int, share: float) -> None:
    hits = round(share * count)
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(hits, count).low <= hits / count <= wilson(hits, count).high


@pytest.mark.parametrize(("hits", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(hits: int, count: int) -> None:
    with pytest.raises(InputError, match="out of"):
        wilson(hits, count)


@given(candidates=st.integers(1, 40), positives=st.integers(1, 40), k=st.integers(1, 50))
def test_chance_recall_is_hypergeometric(candidates: int, positives: int, k: int) -> None:
    positives, drawn = min(positives, candidates), min(k, candidates)
    expected = 1 - comb(candidates - positives, drawn, exact=True) / comb(candidates, drawn, exact=True)
    assert chance_recall(k, positives, candidates) == pytest.approx(expected, abs=1e-12)


def test_class_recall_interval_covers_the_truth() -> None:
    """Of 200 draws from classes of unequal size about 95 % of the intervals hold the true mean recall."""
    generator = np.random.default_rng(1)
    truth, counts = np.array([0.9, 0.6, 0.3, 0.75]), np.array([60, 15, 30, 100])
    covered = 0
    for _ in range(200):
        hits = generator.binomial(counts, truth)
        interval = class_recall_interval(hits.tolist(), counts.tolist())
        covered += interval.low <= truth.mean() <= interval.high
    assert 0.90 <= covered / 200 <= 0.985


def test_class_recall_interval_depends_on_counts_alone() -> None:
    assert class_recall_interval([3, 1, 0], [4, 5, 0]) == class_recall_interval([3, 1], [4, 5])
    assert class_recall_interval([4, 5], [4, 5]) == wilson(9, 9)  # resampling would claim certainty
    assert class_recall_interval([0, 0], [4, 5]) == wilson(0, 9)


def test_mean_interval_is_near_the_normal_one() -> None:
    values = np.random.default_rng(0).uniform(size=400)
    half = 1.96 * values.std() / 20
    low, high = mean_interval(values.tolist())
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 5)


def test_write_metrics(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.json"
    write_metrics(path, {"b": 1.0, "a/x": 0.1})
    assert list(json.loads(path.read_text())) == ["a/x", "b"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    for wrong in (math.nan, math.inf):
        with pytest.raises(InputError, match="b not finite"):
            write_metrics(path, {"a/x": 0.2, "b": wrong})
    with pytest.raises(TypeError):
        write_metrics(path, {"a": 0.3, "b": np.float32(1)})  # type: ignore[dict-item]
    # after a failure the old file is whole and nothing else is left
    assert json.loads(path.read_text()) == {"a/x": 0.1, "b": 1.0}
    assert list(path.parent.iterdir()) == [path]
