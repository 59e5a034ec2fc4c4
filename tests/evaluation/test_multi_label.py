from __future__ import annotations

from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn.functional import normalize

from mmpretrain.errors import InputError
from mmpretrain.evaluation import BenchmarkData, ZeroShotClassification, mean_average_precision
from mmpretrain.evaluation.multi_label import average_precision, chance_precision
from tests.evaluation.digits import digit_model, write_digits
from tests.evaluation.toy import Colours, pretrained


def problem(classes: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(60, 8, generator=generator), dim=-1)
    classifier = normalize(torch.randn(classes, 8, generator=generator), dim=-1)
    truth = torch.rand(60, classes, generator=generator) < 0.2
    truth[:, 3] = False
    return images, classifier, truth


def test_equal_to_scikit_learn_and_clip_benchmark() -> None:
    images, classifier, truth = problem()
    value = mean_average_precision(images, classifier, truth)["mean_average_precision"]
    scores = (images @ classifier.T).numpy()
    each = [average_precision_score(truth[:, k], scores[:, k]) for k in range(7) if k != 3]
    assert value == pytest.approx(sum(each) / 7, abs=1e-6)  # a class without pictures counts as 0
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    expected = theirs.average_precision_per_class(torch.from_numpy(scores), truth.float()).mean().item()
    assert value == pytest.approx(expected, abs=1e-6)


def test_the_evaluator_on_pictures_of_several_classes(tmp_path: Path) -> None:
    data = partial(BenchmarkData, write_digits(tmp_path / "digits", "multilabel"))
    metrics = ZeroShotClassification(data, batch_size=64)(digit_model())
    name = "mean_average_precision"
    assert set(metrics) == {"images", "classes", name, f"{name}/ci_low", f"{name}/ci_high", f"{name}/chance"}
    assert metrics[f"{name}/chance"] < metrics[f"{name}/ci_low"] < metrics[name] < metrics[f"{name}/ci_high"] < 1


def test_ties_count_against_the_model() -> None:
    truth = torch.tensor([[True], [False], [False]])
    same = torch.ones(3, 1)
    assert mean_average_precision(same, torch.ones(1, 1), truth)["mean_average_precision"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("positives", "count"), [(0, 3), (1, 1), (1, 4), (2, 5), (5, 5)])
def test_chance_is_the_mean_over_all_orders(positives: int, count: int) -> None:
    truth = [i < positives for i in range(count)]
    found = [average_precision(np.array(order)) for order in permutations(truth)]
    assert chance_precision(positives, count) == pytest.approx(np.nan_to_num(found).mean())


def test_weights_are_repetitions() -> None:
    generator = np.random.default_rng(0)
    truth, weights = generator.random(20) < 0.4, generator.integers(0, 3, 20)
    weights[truth] = np.minimum(weights[truth], 1)  # of equal positives none stands before the other
    assert average_precision(truth, weights) == pytest.approx(average_precision(np.repeat(truth, weights)))
    assert average_precision(truth, np.ones(20, dtype=np.int64)) == average_precision(truth)


def test_the_interval_holds_the_value_for_many_classes() -> None:
    """Copies of a picture that help each other would lift every resample, and the more classes the narrower."""
    generator = torch.Generator().manual_seed(0)
    images, classifier = (normalize(torch.randn(count, 64, generator=generator), dim=-1) for count in (250, 40))
    name = "mean_average_precision"
    found = mean_average_precision(images, classifier, torch.rand(250, 40, generator=generator) < 0.05)
    low, value, high = found[f"{name}/ci_low"], found[name], found[f"{name}/ci_high"]
    assert 0.25 < (value - low) / (high - low) < 0.75


@pytest.mark.parametrize("target", [[1, 0], [1, 0, 2], [1, 0, "x"], 1])
def test_wrong_targets(target: object) -> None:
    data = partial(Colours, [(1, 2, 3)] * 2, [[1, 0, 0], target])
    with pytest.raises(InputError, match="item 1 has the target"):
        ZeroShotClassification(data, ["red", "green", "blue"])(pretrained())


def test_nan_is_refused() -> None:
    images, classifier, truth = problem()
    with pytest.raises(InputError, match="NaN"):
        mean_average_precision(images * torch.nan, classifier, truth)
