"""A small real training run with our callbacks, on as many ranks as the environment says; used by the stopping tests.

`python -m tests.training.toy '{"devices": 2, ...}'` runs it under Lightning's own launcher, or under torchrun.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

from mmpretrain.data.board import ReadingBoard
from mmpretrain.data.worker import StartWorker
from mmpretrain.distributed import rank
from mmpretrain.errors import EXIT_PREEMPTED
from mmpretrain.training.preemption import Preemption, release
from mmpretrain.training.watchdog import Watchdog, paused
from mmpretrain.training.workers import dead_worker

multiprocessing.set_forkserver_preload(["tests.preload"])
ROWS = 1_000_000


class Named:
    """As much of a shard as a report needs."""

    name = "shards/00007.tar"


class Rows(Dataset):
    """Row i; `stuck` = (rank, worker, row): there reading never ends, as from a dead file server."""

    def __init__(self, board: ReadingBoard, own_rank: int, stuck: list[Any] | None) -> None:
        self.board, self.rank, self.stuck = board, own_rank, stuck

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> torch.Tensor:
        self.board.begin(0, 0, row)
        info = torch.utils.data.get_worker_info()
        me = [self.rank, None if info is None else info.id]
        if self.stuck is not None and me == self.stuck[:2] and row >= self.stuck[2]:
            os.read(os.pipe()[0], 1)  # blocks in C
        time.sleep(0.002)
        self.board.end()
        return torch.tensor([float(row % 7)])


class Data(lightning.LightningDataModule):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options, self.shards = options, {"image_text": [Named()]}
        self.board = ReadingBoard(options.get("workers", 0))

    def train_dataloader(self) -> DataLoader:
        rows = Rows(self.board, rank(), self.options.get("stuck"))
        return DataLoader(rows, 1, num_workers=self.board.workers, worker_init_fn=StartWorker())


class Toy(lightning.LightningModule):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options, self.layer = options, torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        time.sleep(self.options.get("step_seconds", 0.02))
        if self.options.get("hang") == [self.global_rank, self.global_step]:
            os.read(os.pipe()[0], 1)
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-4)


class Log(lightning.Callback):
    """Write each step to a file of this rank, so that a test knows when to send a signal."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        with (self.folder / f"steps_{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step} {os.getpid()} {time.monotonic()}\n")
        if trainer.global_step == self.options.get("pause_at"):
            with paused(trainer, "evaluating"):
                time.sleep(self.options["pause"])


def run(folder: str, options: dict[str, Any]) -> int:
    """Train until a signal comes; returns the exit status that `mmpretrain train` would have."""
    torch.set_num_threads(1)
    stop = Preemption()
    stop.install()
    Path(folder, f"installed_{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    time.sleep(options.get("startup", 0))
    devices = int(os.environ.get("WORLD_SIZE", options.get("devices", 1)))
    data = Data(options)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=options.get("max_steps", 10_000),
        callbacks=[Log(Path(folder), options), stop, Watchdog(options.get("seconds"), Path(folder))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(Toy(options), data)
    except (RuntimeError, OSError, EOFError) as error:
        if (message := dead_worker(error, data)) is None:
            raise
        print(f"mmpretrain: error: {message}", file=sys.stderr)
        return 1
    finally:
        stop.restore()
    if stop.stopped_at is None:
        return 0
    time.sleep(options.get("save_seconds", 0))  # where the checkpoint is saved
    Path(folder, f"stopped_{trainer.global_rank}").write_text(str(stop.stopped_at))
    release(trainer)
    time.sleep(options.get("linger", 0))  # what rank 0 does when the others have ended
    return EXIT_PREEMPTED


def _rank(number: int, ranks: int, port: int, folder: str, options: dict[str, Any]) -> None:
    output = os.open(Path(folder) / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own, on Linux
    if ranks > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        os.environ |= dict(zip(names, map(str, (number, number, ranks, ranks, port)), strict=True))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "toy"}
    raise SystemExit(run(folder, options))


def start(ranks: int, folder: Path, **options: Any) -> list[Any]:
    """Start `run` on ranks that find each other as under torchrun; their output goes to `folder/output`."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_rank, args=(n, ranks, port, str(folder), options)) for n in range(ranks)]
    for process in processes:
        process.start()
    return processes


def steps(folder: Path, number: int) -> list[tuple[int, int, float]]:
    """Read what a rank logged: (step, pid, time on the monotonic clock)."""
    path = folder / f"steps_{number}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(a), int(b), float(c)) for a, b, c in map(str.split, lines)]


def wait_for_step(folder: Path, ranks: int, step: int, seconds: float = 90) -> list[int]:
    """Wait until every rank has logged a step; returns their process ids."""
    deadline = time.monotonic() + seconds
    while not all((found := steps(folder, number)) and found[-1][0] >= step for number in range(ranks)):
        assert time.monotonic() < deadline, (folder / "output").read_text() if (folder / "output").exists() else ""
        time.sleep(0.02)
    return [steps(folder, number)[-1][1] for number in range(ranks)]


def children(pid: int) -> list[int]:
    """List the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ends(pid: int, seconds: float) -> bool:
    """Wait for a process that is not ours to end; a zombie nobody has asked after has ended, too."""
    deadline, status = time.monotonic() + seconds, Path(f"/proc/{pid}/stat")
    while time.monotonic() < deadline:
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def end(processes: list[Any], seconds: float) -> list[int | None]:
    """Wait for processes to end by themselves; returns their exit statuses, None for one that had to be killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return statuses


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], json.loads(sys.argv[2])))
