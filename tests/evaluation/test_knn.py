from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from mmpretrain.errors import InputError
from mmpretrain.evaluation import BenchmarkData, NearestNeighbours, embed_images, wilson
from mmpretrain.evaluation.knn import nearest, votes
from tests.evaluation.digits import digit_model, write_digits
from tests.evaluation.toy import COLOURS, Colours, pretrained

TRAIN = partial(Colours, COLOURS, [0, 1, 2, 1, 2, 1])


def rows(count: int, seed: int, width: int = 6) -> torch.Tensor:
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("tile_size", [1, 3, 16, 1000])
def test_nearest_are_those_of_the_full_matrix(tile_size: int) -> None:
    queries, bank = rows(9, 0), rows(50, 1)
    for k in (1, 7, 50):
        scores, indices = nearest(queries, bank, k, tile_size)
        expected, order = (queries @ bank.T).sort(dim=1, descending=True)
        torch.testing.assert_close(scores, expected[:, :k])
        assert torch.equal(indices, order[:, :k])
    with pytest.raises(InputError, match="51 neighbours of 50"):
        nearest(queries, bank, 51)


def test_votes_by_hand() -> None:
    scores, labels = torch.tensor([[0.9, 0.8, 0.3]]), torch.tensor([[2, 0, 2]])
    found = votes(scores, labels, 4, 0.1)[0] * math.exp(9)
    expected = [math.exp(8), 0, math.exp(9) + math.exp(3), 0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


def test_equal_to_scikit_learn(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "digits")
    train, test = partial(BenchmarkData, folder, "train"), partial(BenchmarkData, folder)
    metrics = NearestNeighbours(train, test, (1, 20), batch_size=64)(digit_model())
    known, images = (
        embed_images(digit_model().model, part(transform=digit_model().preprocess)) for part in (train, test)
    )
    x, queries = (part.embeddings.double().numpy() for part in (known, images))
    for k in (1, 20):
        weights = {"weights": lambda distances: np.exp((1 - distances) / 0.07)}
        expected = KNeighborsClassifier(k, metric="cosine", algorithm="brute", **weights).fit(x, known.targets)
        right = int((expected.predict(queries) == np.array(images.targets)).sum())
        assert metrics[f"{k}nn/top1"] == right / 200
        assert (metrics[f"{k}nn/top1/ci_low"], metrics[f"{k}nn/top1/ci_high"]) == wilson(right, 200)
    assert 0.8 < metrics["20nn/top1"] <= metrics["20nn/top5"]
    assert (metrics["images"], metrics["train_images"], metrics["classes"]) == (200, 400, 10)
    assert metrics["20nn/top5/chance"] == 0.5


def test_chunks_and_kinds_of_features_change_nothing(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "digits")
    train, test = partial(BenchmarkData, folder, "train"), partial(BenchmarkData, folder)
    expected = NearestNeighbours(train, test)(digit_model())
    assert NearestNeighbours(train, test, chunk_size=7)(digit_model()) == expected
    assert NearestNeighbours(train, test, features="pooled")(digit_model()) == expected  # the same directions


def test_a_class_without_a_vote_is_no_hit() -> None:
    # The nearest neighbour is the picture itself: only its own class has a vote.
    metrics = NearestNeighbours(TRAIN, partial(Colours, COLOURS, [0, 1, 2, 1, 2, 0]), (1,), ks=(1, 2))(pretrained())
    assert metrics["1nn/top1"] == metrics["1nn/top2"] == 5 / 6
    # More neighbours than pictures are all of them, so every class has votes.
    assert NearestNeighbours(TRAIN, TRAIN, (100,), ks=(3,))(pretrained())["100nn/top3"] == 1


def test_bad_input() -> None:
    for arguments, message in [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"neighbours": ()}, "neighbours is"),
        ({"neighbours": (0,)}, "neighbours is"),
        ({"chunk_size": 0}, "chunk_size is"),
        ({"ks": (0,)}, "ks is"),
    ]:
        with pytest.raises(InputError, match=message):
            NearestNeighbours(TRAIN, TRAIN, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="item 0 has label"):
        NearestNeighbours(TRAIN, partial(Colours, COLOURS, [["red"]] * 6))(pretrained())


def test_the_two_parts_have_the_same_classes(tmp_path: Path) -> None:
    folder, other = write_digits(tmp_path / "a"), write_digits(tmp_path / "b")
    (other / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match="expected the same in the same order"):
        NearestNeighbours(partial(BenchmarkData, folder), partial(BenchmarkData, other))(digit_model())
