"""What a checkpoint costs: how long training stands still, and the processor time of the thread that writes.

`python -m benchmarks.checkpoint [--parameters 150] [--rounds 5] [--folder DIR]`
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mmpretrain.training.checkpoint import load, save
from mmpretrain.training.saving import SafeCheckpointIO


def state(parameters: int) -> dict[str, Any]:
    """Weights and AdamW state of `parameters` million parameters in float32, one million a tensor."""
    weights = {f"block.{index}.weight": torch.rand(1000, 1000) for index in range(parameters)}
    moments = {
        index: {"step": torch.tensor(1.0), "exp_avg": torch.rand(1000, 1000), "exp_avg_sq": torch.rand(1000, 1000)}
        for index in range(parameters)
    }
    return {"state_dict": weights, "optimizer_states": [{"state": moments, "param_groups": []}], "global_step": 0}


def median(name: str, values: list[float], size: float) -> None:
    middle = statistics.median(values)
    spread = f"{min(values):.2f} to {max(values):.2f}"
    print(f"{name:<52} {middle:8.2f} s   ({spread})   {size / middle / 1e9:5.2f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder")
    given = parser.parse_args()
    whole = state(given.parameters)
    size = 3 * given.parameters * 4e6
    print(f"{given.parameters} million parameters with AdamW state: {size / 1e9:.2f} GB, {given.rounds} rounds")
    stalls: dict[bool, list[float]] = {True: [], False: []}
    background: list[float] = []
    whole_time: list[float] = []

    def timed(*arguments: Any) -> object:
        before = time.thread_time()
        done = save(*arguments)
        background.append(time.thread_time() - before)
        return done

    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        folder = Path(place)
        for asynchronous in (False, True):
            io = SafeCheckpointIO(keep=1, asynchronous=asynchronous)
            io.writer = timed if asynchronous else save
            for step in range(given.rounds + asynchronous):  # the first asynchronous one also makes its memory
                whole["global_step"] = step + 100 * asynchronous
                before = time.perf_counter()
                io.save_checkpoint(whole, folder / "step")
                stalls[asynchronous].append(time.perf_counter() - before)
                io.wait()
                whole_time.append(time.perf_counter() - before)
            io.teardown()
        before = time.perf_counter()
        load(folder / f"step_{given.rounds + 100:08d}")
        loading = time.perf_counter() - before
    print(f"{'first asynchronous save (allocates the copy)':<52} {stalls[True].pop(0):8.2f} s")
    median("training stands still, synchronous", stalls[False], size)
    median("training stands still, asynchronous", stalls[True], size)
    median("asynchronous, until it is safe on the disk", whole_time[-given.rounds :], size)
    median("asynchronous, processor time of the thread", background[-given.rounds :], size)
    print(f"{'load, with every hash checked':<52} {loading:8.2f} s")


if __name__ == "__main__":
    main()
