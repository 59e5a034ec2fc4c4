"""What `mmpretrain plan` predicts against what a real step does, on this CPU: products, memory, bytes sent, seconds.

    python -m benchmarks.plan_check [--ranks 2 4] [--rounds 5] [--threads N] [--json]

Products: a FlopCounterMode around a real step. Memory: the growth of the process's peak (VmHWM) over a real step in a
process of its own. Bytes: what the kernel counts at the TCP sockets of each rank of a real `mmpretrain train`. Seconds:
the median of real steps, against a plan given this machine's own rate of matrix products; `efficiency` is what the step
reached of that, to be given as `hardware.efficiency`.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_module
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._harness import machine, note, parser, versions
from mmpretrain.composition import register_resolvers
from mmpretrain.config import instantiate
from mmpretrain.planning.measure import rows, set_attention
from mmpretrain.planning.plan import Plan, plan
from mmpretrain.types import Padded

MODELS = {
    "clip_vit_b32": ["experiment=image_text_clip", "model=clip_vit_b32"],
    "coca_vit_b32": ["experiment=image_text_coca", "model=coca_vit_b32"],
}
BATCH = 16
FIRST, LAST = 2, 6
"""Steps between which the sockets are read."""


class Line(NamedTuple):
    """One prediction and what was found."""

    what: str
    unit: str
    predicted: float
    found: float

    @property
    def ratio(self) -> float:
        """Found over predicted."""
        return self.found / self.predicted


def planned(overrides: list[str]) -> tuple[Any, Plan]:
    """Compose and plan on the CPU."""
    register_resolvers()
    os.environ.setdefault("MMPRETRAIN_RUN_ID", "plan_check")
    with initialize_config_module("mmpretrain.configs", version_base="1.3"):
        config = compose("plan", overrides=["hardware=cpu", *overrides])
    return config, plan(config)


class Step:
    """A real training step of a config: forward, losses, backward, optimizer, on random pictures and ids."""

    def __init__(self, config: Any, made: Plan, size: int) -> None:
        torch.manual_seed(0)
        self.model = instantiate(config.model)
        set_attention(self.model, False)
        described = instantiate(config.losses)
        self.losses, self.weights = described["losses"], described["weights"]
        optimizer = instantiate(config.optimizer)
        self.optimizer = optimizer["optimizer"](optimizer["groups"](self.model, optimizer["weight_decay"]))
        side = config.data.image_size
        shapes = {"image": (3, side, side), "text": (made.caption_tokens,)}
        batch = rows(shapes, size)
        batch["image"].values.random_(0, 256)
        batch["text"].values.random_(1, 49406)
        batch["text"].values[:, -1] = 49407
        self.batch = {m: Padded(p.values) for m, p in batch.items()}

    def __call__(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = self.model(self.batch)
            total = sum(self.weights.get(name, 1.0) * loss(outputs) for name, loss in self.losses.items())
        total.backward()
        self.optimizer.step()


def products(name: str) -> list[Line]:
    """Products of a real step."""
    config, made = planned([*MODELS[name], f"data.global_batch_size={BATCH}"])
    step = Step(config, made, BATCH)
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    model = made.run.model.useful * BATCH
    # The losses of the library are operators of their own, into which the counter does not look; small ones are plain.
    plain = [c for c in made.run.losses(made.run.place(BATCH)).values() if c.float32]
    predicted = model + sum(c.useful + c.recomputed for c in plain)
    return [Line(f"{name}: products of a step", "GFLOP", predicted / 1e9, counter.get_total_flops() / 1e9)]


def _peak(name: str, size: int, send: Any) -> None:
    torch.set_num_threads(1)
    config, made = planned([*MODELS[name], f"data.global_batch_size={size}"])
    step = Step(config, made, size)
    before = _status("VmRSS") - sum(p.nbytes for p in step.model.parameters()) - made.run.weights.buffers
    step()
    step()
    predicted = sum(value for part, value in made.memory.items() if part != "input") + made.run.model.input * size
    send.send((predicted, _status("VmHWM") - before))


def _status(key: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) * 1024


def peaks(name: str, sizes: tuple[int, int]) -> list[Line]:
    """Peak memory of real steps, each in a process of its own; the difference leaves out what a process has anyway."""
    found = []
    for size in sizes:
        receive, send = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_peak, args=(name, size, send))
        process.start()
        found.append(receive.recv())
        process.join()
    lines = [
        Line(f"{name}: memory at batch {size}", "MiB", p / 2**20, f / 2**20)
        for size, (p, f) in zip(sizes, found, strict=True)
    ]
    (small, large), more = found, sizes[1] - sizes[0]
    each = ((large[0] - small[0]) / more / 2**20, (large[1] - small[1]) / more / 2**20)
    return [*lines, Line(f"{name}: memory of one more sample", "MiB", *each)]


def sent(ranks: int, experiment: str, batch: int) -> list[Line]:
    """Bytes that each rank of a real training sends in a step."""
    shared = [
        f"experiment={experiment}",
        "trainer=ddp_cpu",
        f"trainer.devices={ranks}",
        f"data.global_batch_size={batch}",
    ]
    _, made = planned(shared)
    with tempfile.TemporaryDirectory() as folder:
        counter = f"{{_target_: benchmarks._sockets.CountSent, folder: '{folder}', first: {FIRST}, last: {LAST}}}"
        command = [sys.executable, "-m", "mmpretrain", "train", *shared, f"trainer.max_steps={LAST}"]
        command += [f"callbacks.extra=[{counter}]", "allow_targets=[benchmarks]", f"run_dir={folder}/run"]
        command += ["report=false", "evaluators=none", "scheduler.warmup_steps=1", "data.num_workers=0"]
        command += ["callbacks.log_every_n_steps=1000"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        environment.pop("MMPRETRAIN_RUN_ID", None)
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    predicted = sum(message.sent(made.run.ranks) for message in made.messages)
    return [Line(f"{experiment}: a step of {ranks} ranks", "MB a rank", predicted / 1e6, statistics.mean(found) / 1e6)]


def seconds(name: str, rounds: int, rate: float) -> tuple[list[Line], float]:
    """The step's time and the efficiency it reached, against a plan with this machine's rate of products."""
    config, made = planned([*MODELS[name], f"data.global_batch_size={BATCH}", f"hardware.peak_tflops={rate / 0.8e12}"])
    step = Step(config, made, BATCH)
    times = []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        step()
        times += [time.perf_counter() - start] if turn else []
    found, took = statistics.median(times), made.times
    rest = found - took.losses - took.optimizer
    efficiency = took.model * made.run.hardware.efficiency / rest
    return [Line(f"{name}: a step of {BATCH}", "s", took.device, found)], efficiency


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of large bfloat16 products here, the best of five."""
    a = torch.randn(size, size, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    """Check and print."""
    made = parser(__doc__)
    made.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="numbers of gloo ranks to train with")
    given = made.parse_args()
    torch.set_num_threads(given.threads)
    lines: list[Line] = []
    for name in MODELS:
        note(f"products of {name}")
        lines += products(name)
    for ranks in given.ranks:
        for experiment in ("openmoji_clip", "openmoji_siglip", "openmoji_coca"):
            note(f"bytes of {ranks} ranks, {experiment}")
            lines += sent(ranks, experiment, 1024 if experiment == "openmoji_clip" else 256)
    for name in MODELS:
        note(f"memory of {name}")
        lines += peaks(name, (16, 48))
    rate = matmul_rate()
    reached = {}
    for name in MODELS:
        note(f"seconds of {name}")
        more, reached[name] = seconds(name, given.rounds, rate)
        lines += more
    finish(lines, rate, reached, given.json)


def finish(lines: list[Line], rate: float, reached: dict[str, float], as_json: bool) -> None:
    """Print the table, or one JSON object."""
    found = {
        "benchmark": "plan_check",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(["torch", "timm", "lightning"]),
        "matmul_gflops": rate / 1e9,
        "efficiency": reached,
        "rows": [{**line._asdict(), "ratio": line.ratio} for line in lines],
    }
    if as_json:
        print(json.dumps(found))
        return
    print("| | predicted | found | found / predicted |\n| --- | --- | --- | --- |")
    for line in lines:
        print(f"| {line.what} | {line.predicted:,.4g} {line.unit} | {line.found:,.4g} {line.unit} | {line.ratio:.4f} |")
    here = found["machine"]
    shares = ", ".join(f"{name} {share:.2f}" for name, share in reached.items())
    print(f"\nLarge bfloat16 products: {rate / 1e9:,.0f} GFLOP/s; efficiency reached: {shares}.")
    print(f"{found['date']}, {here['device']}, {here['cores']} cores, {here['threads']} threads, {found['versions']}.")


if __name__ == "__main__":
    main()
