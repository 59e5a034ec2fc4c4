"""Shared memory that is used again and again: how a worker's pixels reach the trainer without new pages each time.

A batch is some ten megabytes. Memory for it that the system has to find, clear and map anew, once to stack it and once
to share it, costs several times what copying the pixels does.
"""

from __future__ import annotations

import itertools
import mmap
import re
import sys
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mmpretrain.data.step import Collate, Drawn, Step
from mmpretrain.types import Padded

SPARE = 3
"""Slots of a worker beyond those in its queue: one it fills, and two that the trainer holds on to."""
SHARE = 4
"""A pool is at most one part in so many of the memory the machine has left."""
ALIGNED = 64
Column = tuple[str, str]
"""Source and modality."""


class Pool:
    """Slots of shared memory, `slots` of `size` bytes for each worker; make it before the workers are.

    A worker takes a free slot and writes into it. The trainer's process sees the same memory as a tensor, and the slot
    is free again once the last view of that tensor is gone: who keeps batches keeps them unchanged. Only forked workers
    share it; in others, and while all slots are taken, `take` gives None. Slots that would fill more than a part of
    the memory that is left are not made, and none where the system refuses them.
    """

    def __init__(self, workers: int, slots: int, size: int) -> None:
        self.key, self.size = next(_NUMBERS), -(-size // ALIGNED) * ALIGNED
        self.slots = min(slots, _room() // max(1, workers * self.size)) if size else 0
        try:
            self._memory = mmap.mmap(-1, max(1, workers * self.slots * self.size))
        except OSError:  # out of memory: batches then come without a slot
            self.slots, self._memory = 0, mmap.mmap(-1, 1)
        count = workers * self.slots
        self._taken = np.frombuffer(mmap.mmap(-1, max(1, count)), np.uint8)[:count]
        _POOLS[self.key] = self

    def __reduce__(self) -> tuple[type[Pool], tuple[int, int, int]]:
        return Pool, (0, 0, 0)  # memory without a name reaches forked processes only

    def take(self, worker: int) -> int | None:
        """Take a free slot of a worker, in that worker."""
        free = np.flatnonzero(self._taken[worker * self.slots : (worker + 1) * self.slots] == 0)
        if not len(free):
            return None
        slot = worker * self.slots + int(free[0])
        self._taken[slot] = 1
        return slot

    def give_back(self, slot: int) -> None:
        """Mark a slot as free."""
        self._taken[slot] = 0

    def bytes_of(self, slot: int) -> Any:
        """Return a slot as an array (size,) uint8."""
        return np.frombuffer(self._memory, np.uint8, self.size, slot * self.size)

    def receive(self, slot: int) -> Tensor:
        """Return a slot as a tensor (size,) uint8 that frees it when the last view of it is gone."""
        array = self.bytes_of(slot)
        weakref.finalize(array, self.give_back, slot).atexit = False
        return torch.from_numpy(array)


def _room() -> int:
    """Say how many bytes a pool may have; where the system does not tell what is left, as many as it gives."""
    try:
        left = re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        left = None
    return int(left[1]) * 1024 // SHARE if left else sys.maxsize


_NUMBERS = itertools.count()
_POOLS: weakref.WeakValueDictionary[int, Pool] = weakref.WeakValueDictionary()


class Place(NamedTuple):
    """Where a tensor lies in a slot."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, memory: Tensor) -> Tensor:
        """Return the tensor as a view of the slot's bytes."""
        end = self.offset + torch.Size(self.shape).numel() * self.dtype.itemsize
        return memory[self.offset : end].view(self.dtype).view(self.shape)


class Sent(NamedTuple):
    """A step on its way from a worker: `step` lacks the columns of `places`, which lie in a slot of a pool."""

    key: int
    slot: int
    step: Step
    places: dict[Column, Place]
    modalities: dict[str, list[str]]  # of each source, in the order of its fields

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open_sent, tuple(self)


def open_sent(key: int, slot: int, step: Step, places: dict[Column, Place], modalities: dict[str, list[str]]) -> Step:
    """Return the whole step, in the trainer's process."""
    memory = _POOLS[key].receive(slot)
    columns = {column: Padded(place.of(memory)) for column, place in places.items()}
    batches = {
        source: {
            name: columns[source, name] if (source, name) in columns else step.batches[source][name] for name in names
        }
        for source, names in modalities.items()
    }
    return step._replace(batches=batches)


class PooledCollate:
    """`collate`, but tensors are stacked straight into a slot of `pool` where that is possible."""

    def __init__(self, collate: Collate, pool: Pool) -> None:
        self.collate, self.pool = collate, pool

    def __call__(self, rows: Sequence[Drawn]) -> Step | Sent:
        """Collate the rows of one step; the queue to the trainer's process turns what is `Sent` into a `Step`."""
        worker = get_worker_info()
        columns = _columns(rows) if worker is not None else {}
        places = _places(columns, Counter(row.source for row in rows), self.pool.size)
        slot = self.pool.take(worker.id) if worker is not None and places else None
        if slot is None:
            return self.collate(rows)
        memory = torch.from_numpy(self.pool.bytes_of(slot))
        for column, place in places.items():
            torch.stack(columns[column], out=place.of(memory))
        modalities: dict[str, list[str]] = {}
        for row in rows:
            modalities.setdefault(row.source, list(row.example))
        rest = [
            row._replace(
                example={name: value for name, value in row.example.items() if (row.source, name) not in places}
            )
            for row in rows
        ]
        return Sent(self.pool.key, slot, self.collate(rest), places, modalities)


def _columns(rows: Sequence[Drawn]) -> dict[Column, list[Tensor]]:
    """Return the columns that are tensors."""
    found: dict[Column, list[Tensor]] = {}
    for row in rows:
        for modality, value in row.example.items():
            if isinstance(value, Tensor):
                found.setdefault((row.source, modality), []).append(value)
    return found


def _places(columns: dict[Column, list[Tensor]], rows: Mapping[str, int], size: int) -> dict[Column, Place]:
    """Lay the columns out one behind the other; nothing where they do not fit, or cannot be stacked at all.

    `rows`: how many there are of each source.
    """
    places, end = {}, 0
    for column, tensors in columns.items():
        first = tensors[0]
        if len(tensors) != rows[column[0]] or any(
            tensor.shape != first.shape or tensor.dtype != first.dtype for tensor in tensors
        ):
            return {}  # an error, which is `Collate`'s to raise
        places[column] = Place(end, (len(tensors), *first.shape), first.dtype)
        end += -(-len(tensors) * first.nbytes // ALIGNED) * ALIGNED
    return places if end <= size else {}
