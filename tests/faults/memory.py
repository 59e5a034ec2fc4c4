"""Read damaged shards for a long time: memory stays flat, and every lost sample is counted once.

`python -m tests.faults.memory [--trials 2] [--seed 0] [--samples 200000]`
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from mmpretrain.training.data_log import DataLog
from tests.data.pictures import data_module, write_shards

SHARDS, SIZE, BATCH = 20, 1000, 50
WARM = 0.2  # of the samples: caches fill and the allocator finds its size
ALLOWED = 0.05


class Result(NamedTuple):
    """What one reading took: memory in MiB of all its processes, when warm and at most after that."""

    workers: int
    read: int
    spoiled: int
    counted: int
    warm: float
    most: float

    @property
    def growth(self) -> float:
        """Share by which memory grew after it was warm."""
        return self.most / self.warm - 1

    @property
    def holds(self) -> bool:
        """Whether memory stayed flat and every loss was counted."""
        return self.growth <= ALLOWED and self.spoiled == self.counted


def spoil(folder: Path, seed: int) -> set[str]:
    """Write shards in which 3 % of the samples are damaged in one of four ways; return their keys."""
    keys = [f"{number:04}" for number in range(SHARDS * SIZE)]
    chosen = random.Random(seed).sample(keys, len(keys) * 3 // 100)
    quarter = len(chosen) // 4
    undecodable, silent, bare, flipped = (chosen[i * quarter : (i + 1) * quarter] for i in range(4))
    write_shards(folder, SHARDS, SIZE, undecodable, silent, bare)
    data_module(folder, batch=BATCH).setup()  # the indexes, with the checksums of sound bytes
    for shard in folder.glob("*.tar"):
        stat = shard.stat()
        with tarfile.open(shard) as tar:
            offsets = {member.name: member.offset_data for member in tar}
        with shard.open("r+b") as file:
            for key in flipped:
                if (offset := offsets.get(f"{key}.png")) is not None:
                    file.seek(offset + 20)
                    byte = file.read(1)[0]
                    file.seek(offset + 20)
                    file.write(bytes([byte ^ 1]))
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return {*undecodable, *silent, *bare, *flipped}


def resident() -> float:
    """Return the memory in MiB of this process and its workers, pages that they share counted once.

    Without libraries and files in memory, whose share depends on what else runs on the machine.
    """
    total = 0
    for pid in ("self", *(str(child.pid) for child in multiprocessing.active_children())):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss_Anon:"))
    return total / 1024


def read(folder: Path, out: Path, spoiled: set[str], samples: int, workers: int) -> Result:
    """Read so many samples as training does, with the data log, and watch the memory."""
    data = data_module(folder, batch=BATCH, num_workers=workers, max_bad_fraction=0.1)
    steps = samples // BATCH
    log = DataLog(out, sample_log=True)
    trainer: Any = SimpleNamespace(global_step=0, max_steps=steps, is_global_zero=True, datamodule=data)
    module: Any = None
    loader = data.loader(0, 1, 0, steps)
    log.on_train_start(trainer, module)
    seen = []
    for index, step in enumerate(loader):
        trainer.global_step += 1
        log.on_train_batch_end(trainer, module, None, step, index)
        if index % max(1, steps // 50) == 0 and index + workers < steps:
            seen.append(resident())
    warm = int(len(seen) * WARM)
    return Result(workers, steps * BATCH, len(spoiled), int(log.totals()["data/lost/total"]), seen[warm], max(seen))


def run(samples: int, workers: Sequence[int], seed: int) -> list[Result]:
    """Write, spoil and read shards with each number of workers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        spoiled = spoil(folder, seed)
        results = []
        for count in workers:
            out = Path(name) / str(count)
            out.mkdir()
            results.append(read(folder, out, spoiled, samples, count))
        return results


def main(argv: Sequence[str]) -> int:
    """Print a table; 1 if memory grew by more than 5 % or a loss was not counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=200_000)
    arguments = parser.parse_args(argv)
    print("workers  samples  spoiled  counted  MiB warm  MiB most  growth")
    good = True
    for trial in range(arguments.trials):
        for result in run(arguments.samples, (0, 2), arguments.seed + trial):
            print("{:7}  {:7}  {:7}  {:7}  {:8.1f}  {:8.1f}".format(*result), f"{result.growth:6.1%}", flush=True)
            good &= result.holds
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
