from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tests.evaluation.digits import write_digits
from tests.evaluation.digits_ranks import both, measure
from tests.evaluation.everything import (
    captioning,
    choice,
    everything,
    knn,
    multi_label,
    probe,
    retrieval,
    zero_shot,
)
from tests.evaluation.toy import COLOURS
from tests.ranks import run_ranks

EVALUATORS = [retrieval, zero_shot, multi_label, knn, probe, captioning, choice]
ALONE = cache(everything)


def test_the_numbers_could_be_wrong() -> None:
    alone = ALONE()
    expected = torch.nn.functional.normalize(torch.tensor(COLOURS).float(), dim=-1)
    torch.testing.assert_close(torch.tensor(alone["embeddings"]), expected)
    assert alone["targets"] == [["é\n"], 1, "x", None, 2.5, [1]]
    assert 0 < alone["retrieval"]["text_to_image/recall@1"] < alone["retrieval"]["text_to_image/recall@10"] < 1
    assert 0 < alone["zero_shot"]["top2"] < 1
    assert 0 < alone["multi_label"]["mean_average_precision"] < 1
    assert 0 < alone["knn"]["3nn/top1"] < alone["knn"]["3nn/top2"]
    assert 0 < alone["probe"]["top1"] < 1
    assert 0 < alone["captioning"]["rouge_l"] < 1
    assert 0 < alone["captioning"]["cider"] < 10
    assert 0 < alone["choice"]["accuracy"] < 1


@pytest.mark.parametrize("evaluate", EVALUATORS)
@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (7, 2), (64, 0)])
def test_batch_size_and_workers_change_nothing(
    evaluate: Callable[..., dict[str, Any]], batch_size: int, num_workers: int
) -> None:
    assert evaluate(batch_size, num_workers) == evaluate()


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, float]]:
    """Data sets of digits, and what one process measures on them."""
    folder = tmp_path_factory.mktemp("scans")
    for name, kind in [("digits", "classification"), ("several", "multilabel"), ("captions", "retrieval")]:
        write_digits(folder / name, kind)
    return str(folder), measure(str(folder))


def same(found: dict[str, float], expected: dict[str, float]) -> bool:
    """Counts and shares of counts are equal, means and intervals to 1e-6: embeddings differ by rounding."""
    exact = [key for key in expected if key.rsplit("/", 1)[-1].startswith(("top", "recall", "images", "captions", "C"))]
    assert len(exact) > 10
    return {key: found[key] for key in exact} == {key: expected[key] for key in exact} and found == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (7, 2)])
def test_a_transformer_gives_the_same_in_any_batch(
    scans: tuple[str, dict[str, float]], batch_size: int, num_workers: int
) -> None:
    assert same(measure(scans[0], batch_size, num_workers), scans[1])


def test_every_rank_has_the_numbers_of_one_process(scans: tuple[str, dict[str, float]]) -> None:
    found = run_ranks(both, 3, scans[0], 7)  # together: starting ranks takes longer than all of it
    assert all(one == found[0] for one in found)
    exact, rounded = found[0]
    assert exact == ALONE()
    assert same(rounded, scans[1])
