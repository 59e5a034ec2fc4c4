"""A board in shared memory on which every worker says which sample it is reading, so that a stall can be named."""

from __future__ import annotations

import os
import time
from multiprocessing.sharedctypes import RawArray
from typing import NamedTuple

from torch.utils.data import get_worker_info

_FIELDS = 5  # source, shard, row, begin in ns (0 = idle), pid


class Reading(NamedTuple):
    """One sample being read. `worker`: its index, None for the main process; `seconds`: since when."""

    worker: int | None
    source: int
    shard: int
    row: int
    seconds: float
    pid: int


class ReadingBoard:
    """One slot for each of `workers` loader workers and one for the main process; every process writes only its own.

    It goes to workers inside the dataset, with any start method. A slot is read without a lock: at worst a report
    shows a sample that was finished in that very moment.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._slots = RawArray("q", (workers + 1) * _FIELDS)

    def begin(self, source: int, shard: int, row: int) -> None:
        """Say that the calling process begins to read this sample."""
        at = self._slot()
        self._slots[at : at + _FIELDS] = [source, shard, row, time.monotonic_ns(), os.getpid()]

    def end(self) -> None:
        """Say that the calling process is done with its sample."""
        self._slots[self._slot() + 3] = 0

    def reading(self) -> list[Reading]:
        """List what is being read now, in the order of workers, the main process last."""
        now, found = time.monotonic_ns(), []  # one clock for all processes of a machine
        for worker in range(self.workers + 1):
            source, shard, row, since, pid = self._slots[worker * _FIELDS : (worker + 1) * _FIELDS]
            if since:
                index = worker if worker < self.workers else None
                found.append(Reading(index, source, shard, row, (now - since) / 1e9, pid))
        return found

    def pids(self) -> dict[int, int]:
        """Map the process id of each worker that has read something to its index."""
        slots = ((worker, self._slots[worker * _FIELDS + 4]) for worker in range(self.workers))
        return {pid: worker for worker, pid in slots if pid}

    def _slot(self) -> int:
        info = get_worker_info()
        return (self.workers if info is None else info.id) * _FIELDS
