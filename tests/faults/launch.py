"""The real command on real ranks, started in milliseconds: a fork server keeps the heavy packages loaded.

The ranks find each other through the variables that `torchrun` sets, so Lightning takes them for ranks of its.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

multiprocessing.set_forkserver_preload(["tests.preload"])


class Ranks:
    """The processes of one run; each leads a process group that holds its loader's workers too."""

    def __init__(self, processes: Sequence[BaseProcess], log: Path) -> None:
        self.processes, self.log = list(processes), log

    def kill(self) -> None:
        """Send SIGKILL to every rank and worker."""
        for process in self.processes:
            self._signal_group(process)
        self.wait(30)

    def wait(self, timeout: float) -> list[int | None]:
        """Return the exit status of each rank; None for one that still runs after `timeout` seconds."""
        for process in self.processes:
            process.join(timeout)
        return [process.exitcode for process in self.processes]

    def running(self) -> bool:
        """Tell whether every rank is alive."""
        return all(process.is_alive() for process in self.processes)

    def output(self) -> str:
        """Return what the ranks printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @staticmethod
    def _signal_group(process: BaseProcess) -> None:
        assert process.pid is not None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet, or is gone
            process.kill()


def start(ranks: int, arguments: Sequence[str], log: Path) -> Ranks:
    """Start `mmpretrain ARGUMENTS` on `ranks` processes, their output going to `log`."""
    context = multiprocessing.get_context("forkserver")
    port = _free_port()
    processes = [
        context.Process(target=_run, args=(rank, ranks, port, list(arguments), str(log))) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return Ranks(processes, log)


def _run(rank: int, ranks: int, port: int, arguments: list[str], log: str) -> None:
    multiprocessing.set_start_method("fork", force=True)  # else the loader would start a fork server of its own
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "faults",
            "MMPRETRAIN_RUN_ID": "faults",
        }
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from mmpretrain.cli import main

    rank_zero_only.rank = rank  # Lightning has read the environment when the fork server imported it

    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = ["mmpretrain", *arguments]
    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(status)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
