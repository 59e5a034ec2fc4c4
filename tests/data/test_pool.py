"""Shared slots: batches are those of no worker, kept ones stay as they are, and a slot is used again when it may be."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmpretrain.data import pool as pool_module
from mmpretrain.data.datamodule import DataModule, Source
from mmpretrain.data.decode import Image, TextCaption
from mmpretrain.data.pool import Pool, PooledCollate, Sent, open_sent
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
    loader.pin_memory = False  # pinning copies out of the slots
    pool, uses = loader.collate_fn.pool, list[float]()
    begin = np.frombuffer(pool._memory, np.uint8).ctypes.data
    for step in loader:
        uses.append((step.batches["pairs"]["image"].values.data_ptr() - begin) / pool.size)
        del step
        time.sleep(0.001)
    assert len(uses) == 40 and set(uses) <= set(range(pool.slots))


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


def in_a_worker(rows: list[Drawn], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Collate as the only worker would, and open what it sends."""
    monkeypatch.setattr(pool_module, "get_worker_info", lambda: SimpleNamespace(id=0))
    pool = Pool(1, 2, 10000)
    sent = PooledCollate(Collate({}), pool)(rows)
    return (open_sent(*sent) if isinstance(sent, Sent) else sent), pool


def drawn(*examples: dict[str, Any]) -> list[Drawn]:
    return [Drawn("pairs", str(i), example, None) for i, example in enumerate(examples)]


def test_a_worker_stacks_into_a_slot(monkeypatch):
    step, pool = in_a_worker(drawn(*({"image": torch.full((3,), i)} for i in range(3))), monkeypatch)
    assert step.batches["pairs"]["image"].values.tolist() == [[i] * 3 for i in range(3)] and pool._taken.sum() == 1


@pytest.mark.parametrize(
    "odd",
    [{"image": torch.ones(3)}, {"image": torch.ones(3), "depth": "none"}, {"depth": torch.ones(2)}],
    ids=["missing", "text", "first missing"],
)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_row_that_lacks_a_column_is_an_error_and_never_dropped(odd, at, monkeypatch):
    examples = [{"image": torch.full((3,), float(i)), "depth": torch.full((2,), float(i))} for i in range(4)]
    examples[at] = odd
    other = [Drawn("others", "0", {"image": torch.ones(3)}, None)]  # of another source, which has no such column
    rows = drawn(*examples) + other
    try:
        wanted = Collate({})(rows)
    except Exception as error:
        with pytest.raises(type(error)):
            in_a_worker(rows, monkeypatch)
        return
    assert at == 0 and len(odd) == 1  # the columns are those of the first row
    found, _ = in_a_worker(rows, monkeypatch)
    for source, batch in wanted.batches.items():
        assert {m: x.values.tolist() for m, x in found.batches[source].items()} == {
            m: x.values.tolist() for m, x in batch.items()
        }


def test_a_source_may_lack_what_another_has(monkeypatch):
    rows = drawn({"image": torch.zeros(3)}, {"image": torch.ones(3)})
    rows.append(Drawn("others", "0", {"image": torch.ones(3), "depth": torch.ones(2)}, None))
    step, pool = in_a_worker(rows, monkeypatch)
    assert [len(step.batches[s][m].values) for s, m in (("pairs", "image"), ("others", "depth"))] == [2, 1]
    assert pool._taken.sum() == 1


@pytest.mark.parametrize("told", [True, False])
def test_more_memory_than_there_is_means_no_slots(told, monkeypatch):
    if not told:  # a system that does not say what is left, and then refuses
        monkeypatch.setattr(pool_module, "_room", lambda: sys.maxsize)
    pool = Pool(4, 5, 2**50)
    assert pool.slots == 0 and pool.take(0) is None
    rows = drawn({"image": torch.zeros(3)})
    monkeypatch.setattr(pool_module, "get_worker_info", lambda: SimpleNamespace(id=3))
    assert PooledCollate(Collate({}), pool)(rows).batches["pairs"]["image"].values.tolist() == [[0.0] * 3]


def test_a_pool_takes_a_modest_share_of_the_memory():
    left = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    pool = Pool(1, 100, left // 100)
    assert 0 < pool.slots * pool.size <= left // 4


def test_as_many_slots_as_there_is_room_for(monkeypatch):
    monkeypatch.setattr(pool_module, "_room", lambda: 1000)
    pool = Pool(2, 3, 128)
    assert pool.slots == 3
    pool = Pool(2, 5, 128)
    assert pool.slots == 3 and [pool.take(1) for _ in range(4)] == [3, 4, 5, None]
