from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from mmpretrain.errors import InputError
from mmpretrain.evaluation import BenchmarkData, LinearProbe, embed_images, linear_probe, wilson
from mmpretrain.evaluation.linear_probe import GRID, fit, scores_of, search
from mmpretrain.evaluation.train_split import held_out
from tests.evaluation.digits import digit_model, write_digits
from tests.evaluation.toy import COLOURS, Colours, pretrained

LABELS = [0, 1, 2, 1, 2, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("probe") / "digits")


def test_equal_to_scikit_learn_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_probe, "CHUNK", 64)
    train, test = partial(BenchmarkData, folder, "train"), partial(BenchmarkData, folder)
    metrics = LinearProbe(train, test, batch_size=64)(digit_model())
    parts = digit_model()
    (x, y), (queries, labels) = (
        (found.embeddings.double().numpy(), np.array(found.targets))
        for found in (embed_images(parts.model, part(transform=parts.preprocess)) for part in (train, test))
    )
    assert metrics["C"] in GRID
    with np.errstate(all="ignore"):
        expected = LogisticRegression(C=metrics["C"], max_iter=1000).fit(x, y)
    scores = expected.decision_function(queries)
    right = round(expected.score(queries, labels) * 200)
    assert metrics["top1"] == right / 200 > 0.75
    assert (metrics["top1/ci_low"], metrics["top1/ci_high"]) == wilson(right, 200)
    assert metrics["top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
    assert metrics["mean_class_recall"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))
    # no value of C far from the one chosen does better on what was held out
    held = held_out(y)
    for c in (1e-6, 1e-3, 1.0, 1e3, 1e6):
        assert fit(x[~held], y[~held], c).score(x[held], y[held]) <= metrics["validation_top1"]
    assert LinearProbe(train, test, batch_size=64)(digit_model()) == metrics


def test_a_validation_split_of_its_own(folder: Path) -> None:
    train, test = partial(BenchmarkData, folder, "train"), partial(BenchmarkData, folder)
    metrics = LinearProbe(train, train, validation=test, max_iterations=50)(digit_model())
    assert metrics["train_images"] == 600  # both are fitted at the end
    assert metrics["top1"] > 0.95


@pytest.mark.parametrize("peak", [0, 3, 16, 40, 63, 95, 96])
def test_the_search_finds_a_single_peak_in_15_steps(peak: int) -> None:
    asked: list[float] = []

    def score(value: float) -> float:
        asked.append(value)
        return -abs(GRID.index(value) - peak)

    assert search(score) == (GRID[peak], 0.0)
    assert len(asked) == len(set(asked)) <= 15


def test_among_equals_the_strongest_penalty() -> None:
    assert search(lambda _: 0.5) == (GRID[0], 0.5)
    assert (GRID[0], GRID[48], GRID[96], len(GRID)) == (1e-6, 1.0, 1e6, 97)


def test_every_fifth_of_a_class_is_held_out() -> None:
    labels = np.array([0] * 5 + [1] * 11 + [2] * 4 + [0])
    assert np.flatnonzero(held_out(labels)).tolist() == [4, 9, 14]


def test_classes_never_seen_have_no_chance() -> None:
    x = np.array([[0.0], [1.0], [0.1], [0.9]])
    scores = scores_of(fit(x, np.array([1, 3, 1, 3]), 10.0), x, 5)
    assert scores.argmax(1).tolist() == [1, 3, 1, 3]
    assert np.isneginf(scores[:, [0, 2, 4]]).all() and np.isfinite(scores[:, [1, 3]]).all()


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    data = partial(Colours, COLOURS, LABELS)
    with pytest.raises(InputError, match="no class has 5 training pictures"):
        LinearProbe(data, data)(pretrained())
    with pytest.raises(InputError, match=r"have the labels \[1\]"):
        LinearProbe(partial(Colours, COLOURS, [1] * 6), data, validation=data)(pretrained())
    with pytest.raises(InputError, match="item 0 has label"):
        LinearProbe(partial(Colours, COLOURS, [[1, 0]] * 6), data)(pretrained())
    with pytest.raises(InputError, match="max_iterations is"):
        LinearProbe(data, data, max_iterations=0)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match="needs scikit-learn"):
        LinearProbe(data, data)(pretrained())


def test_a_small_set_with_validation() -> None:
    data = partial(Colours, COLOURS, LABELS)
    metrics = LinearProbe(data, data, validation=data, ks=(1, 2))(pretrained())
    assert metrics["train_images"] == 12
    assert 0.5 < metrics["top1"] <= metrics["top2"] <= 1
    assert torch.isfinite(torch.tensor(list(metrics.values()))).all()
