from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from mmpretrain.data.preprocess import Preprocess
from mmpretrain.errors import InputError
from mmpretrain.evaluation import (
    BenchmarkData,
    LinearProbe,
    NearestNeighbours,
    ZeroShotClassification,
    image_features,
    run_evaluators,
    shared_features,
)
from mmpretrain.evaluation.data import ShardClassification
from mmpretrain.pretrained import Pretrained
from tests.evaluation.digits import digit_model, write_digits


def counted() -> tuple[Pretrained, list[int]]:
    """A model, and a list that every forward pass of its image encoder adds its pictures to."""
    parts, seen = digit_model(), []
    parts.model.encoders["image"].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    return parts, seen


def test_evaluators_of_one_data_set_embed_it_once(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "digits")
    train, test = partial(BenchmarkData, folder, "train"), partial(BenchmarkData, folder)
    evaluators = {
        "zero_shot": ZeroShotClassification(test),
        "probe": LinearProbe(train, test, max_iterations=20),
        "knn": NearestNeighbours(train, test, (5,)),
    }
    parts, seen = counted()
    together = run_evaluators(parts, evaluators)
    assert sum(seen) == 400 + 200
    parts, seen = counted()
    alone = {f"{name}/{key}": value for name, one in evaluators.items() for key, value in one(parts).items()}
    assert sum(seen) == 2 * (400 + 200) + 200
    assert together == alone


def test_what_is_shared_and_what_is_not(tmp_path: Path) -> None:
    data = BenchmarkData(write_digits(tmp_path / "digits"), transform=Preprocess(8))
    parts, seen = counted()
    with shared_features():
        first = image_features(parts.model, data)
        with shared_features():  # inside another one shares that
            again = image_features(parts.model, data)
        assert torch.equal(first.embeddings, again.embeddings) and first.targets == again.targets
        assert len(seen) == 1
        pooled = image_features(parts.model, data, features="pooled").embeddings
        image_features(parts.model, BenchmarkData(data.root, transform=Preprocess(8)))  # another transform
        image_features(digit_model().model, data)  # another model, not counted
        assert len(seen) == 3
    image_features(parts.model, data)
    assert len(seen) == 4
    torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=-1), first.embeddings)
    assert pooled.norm(dim=1).min() > 2


def test_data_without_identity_are_embedded_each_time(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits")
    data = ShardClassification(
        str(tmp_path / "digits" / "test"), transform=Preprocess(8), label=lambda sample, _: int(sample["cls"])
    )
    parts, seen = counted()
    with shared_features():
        image_features(parts.model, data)
        image_features(parts.model, data)
    assert len(seen) == 2


def test_unknown_kind_of_features() -> None:
    with pytest.raises(InputError, match="features='tokens'"):
        image_features(digit_model().model, [], features="tokens")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="features='x'"):
        LinearProbe(None, None, features="x")  # type: ignore[arg-type]
