from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from mmpretrain.errors import InputError
from mmpretrain.evaluation import Retrieval, embed_images, embed_texts
from tests.evaluation.toy import COLOURS, Colours, picture, pretrained


def test_evaluation_leaves_training_alone() -> None:
    """Modes of modules (mixed, as with frozen parts) and the global random state are as before."""
    parts = pretrained()
    parts.model.train()
    parts.model.encoders["text"].eval()
    before = [module.training for module in parts.model.modules()]
    state = torch.get_rng_state()
    for workers in (0, 1):
        Retrieval(partial(Colours, COLOURS, ["red"] * 6), num_workers=workers)(parts)
    assert [module.training for module in parts.model.modules()] == before
    assert len(set(before)) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_model_runs_in_evaluation_mode_without_gradients() -> None:
    model = pretrained().model.train()
    seen: list[bool] = []
    model.encoders["text"].register_forward_hook(lambda m, *_: seen.append(m.training or torch.is_grad_enabled()))
    embed_texts(model, pretrained().tokenizer, ["red"] * 5, batch_size=2)
    assert seen == [False] * 3


def test_labels_as_numpy_and_torch_scalars() -> None:
    targets = [np.int64(3), torch.tensor(4)]
    assert embed_images(pretrained().model, Colours(COLOURS[:2], targets, picture)).targets == [3, 4]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter([1])


def test_data_sets_that_do_not_fit() -> None:
    model, _, tokenizer = pretrained()
    with pytest.raises(InputError, match="empty"):
        embed_images(model, Colours([], [], picture))
    with pytest.raises(InputError, match="no length"):
        embed_images(model, Stream())
    with pytest.raises(InputError, match=r"expected \(image tensor, target\)"):
        embed_images(model, Colours(COLOURS, [0] * 6, lambda colour: colour))
    with pytest.raises(InputError, match="different shapes"):
        embed_images(model, Colours(COLOURS, [0] * 6, lambda colour: torch.zeros(3, 1, 1 + colour[0])))
    with pytest.raises(InputError, match="cannot be gathered"):
        embed_images(model, Colours(COLOURS, [object()] * 6, picture))
    with pytest.raises(InputError, match="no text"):
        embed_texts(model, tokenizer, [])


def test_nan_is_refused() -> None:
    model, _, tokenizer = pretrained()
    with torch.no_grad():
        model.encoders["text"].table.weight[1] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(InputError, match="2 of 3 embeddings hold NaN"):
        embed_texts(model, tokenizer, ["red", "blue", "green red"])
