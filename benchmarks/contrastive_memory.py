"""Peak memory and time of the symmetric contrastive loss, forward and backward: ours against open_clip's ClipLoss.

    python -m benchmarks.contrastive_memory [--sizes 4096 8192 16384] [--width 512] [--rounds 5] [--json]

N pairs of float32 unit vectors on the CPU, logit scale 100, one rank. Each side computes in a process of its own, so
that the high-water mark of that process is its peak; before it, the process has run a small batch, and the inputs lie
in memory. Two peaks are given: all that is held beyond the inputs, and without the two gradients, which every way to
compute them must give. Compared first: both sides' loss and gradients against float64 at a small size; then,
with what the first round gave, against each other at every size.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _harness as harness
from benchmarks._peer import Worker, environment

SIDES = ("ours", "open_clip")
SMALL = 512
SCALE = 100.0
TARGETS = {16384: 40.0}


def inputs(n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Pairs that resemble each other as a trained model's do (cosine 0.3 on average), and the scale."""
    generator = torch.Generator().manual_seed(n)
    a, b = (torch.randn(n, d, generator=generator) for _ in "ab")
    # In place, so that making them is not the peak of the process.
    a /= torch.linalg.vector_norm(a, dim=1, keepdim=True)
    b /= torch.linalg.vector_norm(b, dim=1, keepdim=True)
    b.add_(a, alpha=0.3).div_(torch.linalg.vector_norm(b, dim=1, keepdim=True))
    return [x.to(dtype).requires_grad_() for x in (a, b, torch.tensor([SCALE]))]


def loss(side: str, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Compute one side's loss; what this process does not use is not imported."""
    if side == "open_clip":
        from open_clip.loss import ClipLoss

        return ClipLoss()(a, b, scale)  # type: ignore[no-any-return]
    from mmpretrain import ContrastiveLoss, Outputs

    return ContrastiveLoss()(Outputs({"image": a, "text": b}, scale, None, {}, {}))


def run(side: str, leaves: list[Tensor]) -> list[Tensor]:
    """Compute the loss and fresh gradients."""
    for leaf in leaves:
        leaf.grad = None
    value = loss(side, *leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def serve(side: str, n: int, d: int, threads: int) -> None:
    """Answer each line on stdin with the seconds of a run, and the peak of this process beyond the inputs in bytes."""
    torch.set_num_threads(threads)
    run(side, inputs(SMALL, d))
    leaves, found = inputs(n, d), []
    for line in sys.stdin:
        for leaf in leaves:
            leaf.grad = None
        before = resident()
        forget_peak()
        start = time.perf_counter()
        found = run(side, leaves)
        seconds = time.perf_counter() - start
        peak = high_water() - before
        if (where := json.loads(line)["save"]) is not None:
            torch.save(found, where)
        found.clear()
        print(json.dumps({"seconds": seconds, "bytes": peak}), flush=True)


def resident() -> int:
    """Count the bytes this process holds now, without what it freed and the allocator kept for later."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def forget_peak() -> None:
    """Let the high-water mark of this process begin anew; Linux alone can."""
    Path("/proc/self/clear_refs").write_text("5")


def high_water() -> int:
    """Read the most bytes this process has held since; `ru_maxrss` would count what its parent held before the fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def difference(found: list[Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    """Return the difference of the losses, and the largest of the gradients', relative to the wanted one's norm."""
    gradients = [float((x - y).norm() / y.norm()) for x, y in zip(found[1:], wanted[1:], strict=True)]
    return float((found[0] - wanted[0]).abs()), max(gradients)


def against_float64(d: int) -> dict[str, tuple[float, float]]:
    """Compare both sides in float32 with float64 at a small size."""
    checked = {}
    wanted = run("open_clip", inputs(1500, d, torch.float64))
    for side in SIDES:
        value, gradient = difference(run(side, inputs(1500, d)), wanted)
        checked[f"loss of {side} against float64 at 1,500"] = (value, 1e-5)
        checked[f"gradients of {side} against float64 at 1,500"] = (gradient, 5e-4)
    return checked


def measure_size(n: int, args: Any) -> tuple[list[harness.Row], dict[str, tuple[float, float]]]:
    """Time both sides in turn, and read their processes' peaks."""
    harness.note(f"{n} pairs")
    command = ["-m", "benchmarks.contrastive_memory", "--width", str(args.width), "--threads", str(args.threads)]
    workers = {
        side: Worker([*command, "--sizes", str(n), "--serve", side], environment(peer=False, threads=args.threads))
        for side in SIDES
    }
    with tempfile.TemporaryDirectory() as folder:
        first = {side: worker.ask(save=f"{folder}/{side}") for side, worker in workers.items()}
        results = {side: torch.load(f"{folder}/{side}") for side in SIDES}
    peaks = {side: [float(answer["bytes"])] for side, answer in first.items()}

    def turn(side: str) -> float:
        answer = workers[side].ask(save=None)
        peaks[side].append(float(answer["bytes"]))
        return float(answer["seconds"])

    turns = {side: partial(turn, side) for side in SIDES}
    rest = harness.alternate(turns, args.rounds - 1, warm_up=0)
    for worker in workers.values():
        worker.close()
    times = {side: [float(first[side]["seconds"]), *rest[side]] for side in SIDES}
    gradients = 2 * 4 * n * args.width
    if min(peaks["ours"]) <= gradients:
        raise SystemExit(f"a peak of {min(peaks['ours']):,.0f} bytes does not even hold the gradients; measure again")
    net = {side: [peak - gradients for peak in found] for side, found in peaks.items()}
    value, gradient = difference(results["ours"], results["open_clip"])
    kinds = [("time", "s", times, 1.0), ("peak beyond inputs", "bytes", peaks, TARGETS.get(n))]
    kinds += [("peak beyond inputs and gradients", "bytes", net, TARGETS.get(n))]
    rows = [
        harness.Row(f"N = {n:,}, {what}", unit, found["ours"], found["open_clip"], "open_clip", False, target)
        for what, unit, found, target in kinds
    ]
    return rows, {f"losses at {n:,}": (value, 1e-4), f"gradients at {n:,}": (gradient, 1e-3)}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384], help="pairs")
    parser.add_argument("--width", type=int, default=512, help="dimensions of a pair's vectors")
    parser.add_argument("--serve", choices=SIDES, help="be the process of one side")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.sizes[0], args.width, args.threads)
        return
    torch.set_num_threads(args.threads)
    checked, rows = against_float64(args.width), []
    harness.check(checked)
    for n in args.sizes:
        found, compared = measure_size(n, args)
        harness.check(compared)
        checked |= compared
        rows += found
    settings = {"D": args.width, "scale": SCALE, "rounds": args.rounds}
    notes = ["A time is that of forward and backward, a peak the high-water mark of a process during one of them."]
    report = harness.Report(
        "contrastive_memory", rows, harness.check(checked), ["torch", "open_clip_torch"], settings, notes
    )
    harness.finish(report, args.json)


if __name__ == "__main__":
    main()
