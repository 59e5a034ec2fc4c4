from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.evaluation.everything import captioning, everything, retrieval, zero_shot
from tests.evaluation.toy import COLOURS
from tests.ranks import run_ranks


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_has_the_numbers_of_one_process(world_size: int) -> None:
    alone = everything()
    # the data-set order, and numbers that could be wrong
    expected = torch.nn.functional.normalize(torch.tensor(COLOURS).float(), dim=-1)
    torch.testing.assert_close(torch.tensor(alone["embeddings"]), expected)
    assert alone["targets"] == [["é\n"], 1, "x", None, 2.5, [1]]
    assert 0 < alone["retrieval"]["text_to_image/recall@1"] < alone["retrieval"]["text_to_image/recall@10"] < 1
    assert 0 < alone["zero_shot"]["top2"] < 1
    assert 0 < alone["captioning"]["rouge_l"] < 1
    assert run_ranks(everything, world_size) == [alone] * world_size


@pytest.mark.parametrize("evaluate", [retrieval, zero_shot, captioning])
@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (7, 2), (1000, 1)])
def test_batch_size_and_workers_change_nothing(
    evaluate: Callable[..., dict[str, float]], batch_size: int, num_workers: int
) -> None:
    assert evaluate(batch_size, num_workers) == evaluate()
