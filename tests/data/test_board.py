"""The board on which workers say what they read, with every start method of a loader."""

from __future__ import annotations

import os
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from mmpretrain.data.board import ReadingBoard


class Slow(Dataset):
    """Sample i of worker w is 'source w, shard 10 + i, row 100 + i'; reading never ends until the test says so."""

    def __init__(self, board: ReadingBoard, gate) -> None:
        self.board, self.gate = board, gate

    def __getitem__(self, index: int) -> int:
        self.board.begin(index, 10 + index, 100 + index)
        self.gate.wait(60)
        self.board.end()
        return index

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_write_what_they_read(method):
    import torch.multiprocessing as mp

    context = mp.get_context(method)
    board, gate = ReadingBoard(2), context.Event()
    loader = DataLoader(Slow(board, gate), num_workers=2, multiprocessing_context=context)
    rows = iter(loader)
    deadline = time.monotonic() + 60
    while len(board.reading()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    found = board.reading()
    assert [reading[:4] for reading in found] == [(0, 0, 10, 100), (1, 1, 11, 101)]
    assert all(0 <= reading.seconds < 60 for reading in found)
    assert board.pids() == {reading.pid: reading.worker for reading in found} and os.getpid() not in board.pids()
    gate.set()
    assert [int(row) for row in rows] == [0, 1]
    assert board.reading() == []


def test_the_main_process_has_a_slot_of_its_own():
    board = ReadingBoard(0)
    assert board.reading() == []
    board.begin(0, 3, 7)
    (reading,) = board.reading()
    assert (reading.worker, reading.shard, reading.row, reading.pid) == (None, 3, 7, os.getpid())
    assert board.pids() == {}
    board.end()
    assert board.reading() == []
