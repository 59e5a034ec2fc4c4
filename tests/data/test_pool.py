"""Shared slots: batches are those of no worker, kept ones stay as they are, and a slot is used again when it may be."""

from __future__ import annotations

import gc
import pickle
import time

import pytest
import torch

from mmpretrain.data.datamodule import DataModule, Source
from mmpretrain.data.decode import Image, TextCaption
from mmpretrain.data.pool import Pool, PooledCollate
from mmpretrain.data.preprocess import Augment
from mmpretrain.data.step import Collate, Drawn
from mmpretrain.data.tokenizer import ByteTokenizer


def module(shards, workers: int) -> DataModule:
    fields = {"image": Image(Augment(16), ("png",)), "text": TextCaption(), "again": Image(Augment(8), ("png",))}
    return DataModule({"pairs": Source(str(shards), fields)}, {"text": ByteTokenizer()}, 8, 0, num_workers=workers)


def test_batches_are_the_same_with_and_without_and_kept_ones_do_not_change(shards):
    alone = list(module(shards, 0).loader(0, 1, 0, 14))
    loader = module(shards, 1).loader(0, 1, 0, 14)
    kept = []
    for step in loader:
        copied = {name: padded.values.clone() for name, padded in step.batches["pairs"].items()}
        kept.append((step, copied))
    assert loader.collate_fn.pool._taken.all()  # more steps were kept than there are slots: the rest came without one
    for (step, copied), wanted in zip(kept, alone, strict=True):
        assert list(step.batches["pairs"]) == ["image", "text", "again"]
        assert step.trace.ids == wanted.trace.ids
        for name, padded in wanted.batches["pairs"].items():
            assert torch.equal(step.batches["pairs"][name].values, padded.values)
            assert torch.equal(copied[name], padded.values)


def test_a_slot_is_free_when_the_last_view_is_gone(shards):
    loader = module(shards, 1).loader(0, 1, 0, 3)
    taken = loader.collate_fn.pool._taken
    steps = list(loader)
    row = steps[0].batches["pairs"]["again"].values[3]
    before = row.clone()
    del steps
    gc.collect()
    assert taken.sum() == 1
    assert torch.equal(row, before)
    del row
    gc.collect()
    assert not taken.any()


def test_slots_are_used_again(shards):
    loader = module(shards, 1).loader(0, 1, 0, 40)
    places = set()
    for step in loader:
        places.add(step.batches["pairs"]["image"].values.data_ptr())
        del step
        time.sleep(0.001)
    assert len(places) <= loader.collate_fn.pool.slots


def test_a_pool_that_was_pickled_has_no_slots():
    pool = pickle.loads(pickle.dumps(Pool(2, 3, 100)))
    assert pool.take(0) is None


def test_none_is_left_when_all_are_taken():
    pool = Pool(2, 2, 100)
    assert [pool.take(1), pool.take(1), pool.take(1)] == [2, 3, None]
    pool.give_back(2)
    assert (pool.take(1), pool.take(0)) == (2, 0)


def test_outside_of_a_worker_nothing_is_shared():
    pool = Pool(1, 2, 1000)
    rows = [Drawn("pairs", str(i), {"image": torch.full((3,), i)}, None) for i in range(2)]
    step = PooledCollate(Collate({}), pool)(rows)
    assert step.batches["pairs"]["image"].values.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert not pool._taken.any()


@pytest.mark.parametrize("size", [0, 10])
def test_what_does_not_fit_comes_without_a_slot(shards, size):
    made = module(shards, 1)
    loader = made.loader(0, 1, 0, 2)
    loader.collate_fn.pool = Pool(1, 4, size)
    wanted = list(module(shards, 0).loader(0, 1, 0, 2))
    for step, other in zip(loader, wanted, strict=True):
        assert torch.equal(step.batches["pairs"]["image"].values, other.batches["pairs"]["image"].values)
