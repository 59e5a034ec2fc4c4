"""What a checkpoint costs: how long training stands still, saved in the background against saved at once.

    python -m benchmarks.checkpoint [--parameters 150] [--rounds 5] [--folder DIR] [--json]

The peer is our own synchronous save. First both checkpoints are loaded and compared.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import _harness as harness
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


def difference(wanted: dict[str, Any], found: dict[str, Any]) -> float:
    """Return the largest difference of any weight."""
    pairs = [(tensor, found["state_dict"][name]) for name, tensor in wanted["state_dict"].items()]
    return max(float((a - b).abs().max()) for a, b in pairs)


def main() -> None:
    """Compare, measure, print."""
    made = harness.parser(__doc__)
    made.add_argument("--parameters", type=int, default=150, help="millions")
    made.add_argument("--folder", help="where checkpoints are written")
    given = made.parse_args()
    whole = state(given.parameters)
    size = 3 * given.parameters * 4e6
    background: list[float] = []
    written: list[float] = []

    def timed(*arguments: Any) -> object:
        before = time.thread_time()
        done = save(*arguments)
        background.append(time.thread_time() - before)
        return done

    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        folders = {"ours": Path(place) / "background", "peer": Path(place) / "at_once"}
        writers = {side: SafeCheckpointIO(keep=1, asynchronous=side == "ours") for side in folders}
        writers["ours"].writer = timed

        def stall(side: str) -> float:
            whole["global_step"] += 1
            before = time.perf_counter()
            writers[side].save_checkpoint(whole, folders[side] / "step")
            stalled = time.perf_counter() - before
            writers[side].wait()
            if side == "ours":
                written.append(time.perf_counter() - before)
            return stalled

        differences, loading = {}, 0.0
        for side, folder in folders.items():
            stall(side)  # the first one in the background also makes its memory
            before = time.perf_counter()
            differences[f"weights saved {folder.name}"] = (difference(whole, load(next(folder.glob("step_*")))), 0.0)
            loading = time.perf_counter() - before
        checked = harness.check(differences)
        found = harness.alternate({side: lambda side=side: stall(side) for side in folders}, given.rounds, 0)  # type: ignore[misc]
        for writer in writers.values():
            writer.teardown()
    rows = [harness.Row("training stands still", "s", found["ours"], found["peer"], "saved at once", False)]
    notes = [
        f"In the background: {statistics.median(written):.2f} s until it is safe on the disk, "
        f"{statistics.median(background):.2f} s of processor time. Loaded, with every hash checked, in {loading:.2f} s."
    ]
    settings = {"parameters": f"{given.parameters} million", "GB": round(size / 1e9, 2), "rounds": given.rounds}
    harness.finish(harness.Report("checkpoint", rows, checked, ["torch"], settings, notes), given.json)


if __name__ == "__main__":
    main()
