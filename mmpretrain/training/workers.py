"""What a loader's workers are doing, in words: which sample each is reading, and which one has died."""

from __future__ import annotations

import os
import re
import time
import traceback
from typing import Any

from mmpretrain.data.board import Reading

_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited)")
_NOTE = "worker {worker} (pid {pid}) has died"
_NOTED = re.compile(r"worker \d+ \(pid (\d+)\) has died")


def readings(data: Any) -> list[str]:
    """Say of each worker of a `DataModule` what it is reading, or that it is dead; no file is touched for it."""
    board = getattr(data, "board", None)
    if board is None:
        return []
    dead = {pid: worker for pid, worker in board.pids().items() if _is_dead(pid)}
    return [
        *(f"worker {worker} (pid {pid}) is dead" for pid, worker in dead.items()),
        *(_in_words(data, reading) for reading in board.reading() if reading.pid not in dead),
    ]


def note_dead_workers(error: BaseException, data: Any) -> None:
    """Note on an error which workers have died, as long as it can be seen: a trainer's teardown ends all of them."""
    board = getattr(data, "board", None)
    if board is None or not _connection_broke(error):
        return
    deadline = time.monotonic() + 1  # a dying process closes its connections before it counts as dead
    while not (dead := [pid for pid in board.pids() if _is_dead(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in dead:
        error.add_note(_NOTE.format(worker=board.pids()[pid], pid=pid))


def dead_worker(error: BaseException, data: Any) -> str | None:
    """Explain, in one line, the error that training ends with when a worker was killed; None for any other error.

    torch sees the death itself (RuntimeError), or its connection to the worker breaks first (OSError, EOFError).
    """
    found = _DIED.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is not None:
        pid, signal = int(found[1].split(",")[0]), found[2]
    elif _connection_broke(error):
        noted = [match for match in map(_NOTED.fullmatch, getattr(error, "__notes__", [])) if match is not None]
        pid, signal = int(noted[0][1]) if noted else 0, None
    else:
        return None
    board = getattr(data, "board", None)
    worker = None if board is None else board.pids().get(pid)
    last = [] if board is None else [_in_words(data, r) for r in board.reading() if r.pid == pid]
    name = f"worker {worker} (pid {pid})" if worker is not None else "a worker of the data loader"
    doing = f"; at the end: {last[0]}" if last else ""
    if signal == "Bus error":
        return f"{name} was killed (bus error), most often because shared memory ran out: enlarge /dev/shm{doing}"
    how = f"was killed ({signal})" if signal is not None else "died"
    return f"{name} {how}, most often because memory ran out: lower data.num_workers or data.prefetch_factor{doing}"


def _connection_broke(error: BaseException) -> bool:
    """Tell whether an error came up while a batch was taken from a worker."""
    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, OSError | EOFError) and any(f.f_code.co_name == "_try_get_data" for f, _ in frames)


def _in_words(data: Any, reading: Reading) -> str:
    source = list(data.shards)[reading.source]
    shard = data.shards[source][reading.shard].name
    who = "the main process" if reading.worker is None else f"worker {reading.worker} (pid {reading.pid})"
    return f"{who} reads {source}: {shard} row {reading.row} for {reading.seconds:.0f} s"


def _is_dead(pid: int) -> bool:
    """Tell whether a process has ended, without taking its exit status from torch, which wants to see it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # none of this process: its status was taken, or a fork server started it
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False
