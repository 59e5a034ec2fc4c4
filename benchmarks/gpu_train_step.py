"""One training step on a GPU: ours against open_clip, eager and compiled, with captions of real lengths.

Part of `python -m benchmarks.gpu`. Each side has a process of its own, which stands still and gives its memory back
while the other is measured.

Both: bf16 autocast, float32 weights, fused AdamW, TF32 allowed elsewhere, no gradient clipping, data on the device.
Ours: uint8 pixels, packed text. open_clip: float pixels, text of 77 ids, its `--precision amp_bf16` with and without
`--torchcompile`. AdamW is fused on its side too, though it does not do that by default.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _flops, _gpu
from benchmarks import _harness as harness
from benchmarks._gpu_inputs import compare, inputs, text_lengths

BATCH = {"ViT-B-32": 1024, "ViT-B-16": 512, "ViT-L-14": 160, "coca_ViT-B-32": 320, "coca_ViT-L-14": 96}
"""Model -> samples of a step: what fits open_clip's eager step into 80 GB, with room to spare."""

TARGETS = {
    ("ViT-B-32", "eager"): 1.5,
    ("ViT-B-32", "compiled"): 1.2,
    ("coca_ViT-B-32", "eager"): 1.8,
    ("coca_ViT-B-32", "compiled"): 1.8,
}
MFU_TARGETS = {"ViT-B-16": 0.40, "ViT-L-14": 0.40}
SETTINGS = ("eager", "compiled")
TURN = 0.4
"""Seconds that a side is measured in a turn, about."""


class Trainee:
    """What runs in a side's process: builds a model, prepares a setting, measures steps."""

    def __init__(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.model: Any = None

    def __call__(self, request: Mapping[str, Any]) -> Any:
        """Answer a request."""
        arguments = {key: value for key, value in request.items() if key != "do"}
        answer: Callable[..., Any] = {
            "build": self.build,
            "prepare": self.prepare,
            "measure": self.measure,
            "compare": compare,
            "drop": self.drop,
            "end_to_end": self.end_to_end,
        }[request["do"]]
        return answer(**arguments)

    def build(self, side: str, name: str, batch: int, texts: int, device: str, backend: str, by_block: bool) -> None:
        """Build the side's model, and inputs with so many batches of texts: packed text comes in several sizes."""
        from benchmarks import _models

        self.drop()
        self.side, self.device, self.backend, self.by_block = side, torch.device(device), backend, by_block
        self.config = _models.configuration(name)
        build = _models.build_ours if side == "ours" else _models.build_peer
        self.model = build(self.config, device=self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.2, fused=True)
        self.lengths = list(text_lengths(self.config, batch, texts))
        self.batches = list(inputs(side, self.config, self.lengths, self.device))
        self.compiled = False

    def drop(self) -> None:
        """Forget the model and free the memory."""
        self.model = self.optimizer = self.batches = None
        torch.compiler.reset()
        _gpu.release(getattr(self, "device", torch.device("cpu")))

    def compile(self) -> None:
        """Compile the model in place: ours as `trainer.compile=default` does, open_clip's as its `--torchcompile`."""
        from mmpretrain.training.compilation import compile_model

        if self.side == "ours":
            compile_model(self.model, "default" if self.backend == "inductor" else self.backend, self.by_block)
        else:
            self.model.compile(backend=self.backend)
        self.compiled = True

    def step(self, setting: str, batch: Any) -> Tensor:
        """Take one step; nothing in it waits for the device."""
        from benchmarks import _models

        self.optimizer.zero_grad(set_to_none=True)
        if setting == "compiled" and not self.compiled:
            self.compile()
        # A compiled model runs as it was written where the setting is eager.
        stance = torch.compiler.set_stance("force_eager" if setting == "eager" else "default")
        with stance, torch.autocast(self.device.type, torch.bfloat16):
            loss = _models.our_loss(self.model, batch) if self.side == "ours" else _models.peer_loss(self.model, *batch)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        return loss

    def prepare(self, setting: str, patience: float) -> dict[str, Any]:
        """Go through every batch twice, which compiles; says how long a step takes, or that memory does not suffice.

        While the other side compiles too, its first step can take the memory: then this one is tried again.
        """
        start = time.monotonic()
        while True:
            try:
                for batch in self.batches:
                    self.step(setting, batch)
                seconds = _gpu.timed(lambda i: self.step(setting, self.batches[i]), len(self.batches), self.device)
            except torch.cuda.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                _gpu.release(self.device)
                if setting == "eager" or time.monotonic() - start > patience:
                    return {"fits": False}
                time.sleep(random.uniform(0.5, 2.0))
                continue
            self.optimizer.zero_grad(set_to_none=True)
            _gpu.release(self.device)
            return {"fits": True, "seconds": seconds, "took": time.monotonic() - start}

    def measure(self, setting: str, repeat: int) -> dict[str, float]:
        """Time `repeat` steps after one that is not timed; also the peak memory."""
        found: dict[str, float] = {}

        def turn() -> None:
            self.step(setting, self.batches[0])
            take = lambda i: self.step(setting, self.batches[i % len(self.batches)])  # noqa: E731
            found["seconds"] = _gpu.timed(take, repeat, self.device)

        found["bytes"] = _gpu.peak(turn, self.device) + _state_bytes(self.model, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        _gpu.release(self.device)
        return found

    def end_to_end(self, **request: Any) -> Any:
        """Train from shards; see `gpu_end_to_end`."""
        from benchmarks import gpu_end_to_end

        return gpu_end_to_end.measure(self, **request)


def _state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in (*tensors, *states))


def measured(sides: _gpu.Sides, name: str, given: Any, clock: _gpu.Clock) -> harness.Report:
    """Compare, then measure one model; raises `OutOfTime` where not even the eager steps end in time."""
    checked = harness.check(
        sides.ask("ours", clock.left(), do="compare", name=name, batch=given.compared, device=given.device)
    )
    batch, seconds = _eager(sides, name, given, clock)
    notes: list[str] = []
    seconds |= _compile(sides, name, given, clock, notes)
    found: dict[str, list[dict[str, float]]] = {key: [] for key in seconds}

    def turn(key: str) -> Callable[[], float]:
        side, setting = key.split()
        repeat = max(given.least_steps, min(32, round(given.turn / seconds[key])))

        def run() -> float:
            answer = sides.ask(side, clock.left() + 30, do="measure", setting=setting, repeat=repeat)
            found[key].append(answer)
            return batch / float(answer["seconds"])

        return run

    rates = harness.alternate({key: turn(key) for key in seconds}, given.rounds)
    return _report(name, batch, given, rates, found, checked, notes)


def _eager(sides: _gpu.Sides, name: str, given: Any, clock: _gpu.Clock) -> tuple[int, dict[str, float]]:
    """Find the largest batch, halving, that both sides' eager steps have memory for."""
    batch = given.batch or BATCH.get(name, 8)
    while batch:
        answers = {}
        for side in ("ours", "peer"):
            build = {"name": name, "batch": batch, "device": given.device, "backend": given.backend}
            sides.ask(side, clock.left(), do="build", side=side, texts=given.texts, by_block=given.by_block, **build)
            answers[side] = sides.ask(side, clock.left(), do="prepare", setting="eager", patience=0)
        if all(answer["fits"] for answer in answers.values()):
            return batch, {f"{side} eager": answer["seconds"] for side, answer in answers.items()}
        harness.note(f"train_step {name}: a batch of {batch} does not fit; half of it is tried")
        batch //= 2
    raise SystemExit(f"{name} does not fit this device")


def _compile(sides: _gpu.Sides, name: str, given: Any, clock: _gpu.Clock, notes: list[str]) -> dict[str, float]:
    """Compile both sides at once; raises `OutOfTime`, and so ends this model's part, where one is not ready in time."""
    limit = min(given.compile_limit, clock.left())
    end = time.monotonic() + limit
    for side in sides:
        side.send(do="prepare", setting="compiled", patience=limit)
    found: dict[str, float] = {}
    for label, side in zip(("ours", "peer"), sides, strict=True):
        answer = side.receive(max(1.0, end - time.monotonic()) + 30)
        if answer["fits"]:
            found[f"{label} compiled"] = answer["seconds"]
            harness.note(f"train_step {name}: {label} compiled in {answer['took']:.0f} s")
        else:
            notes.append(f"{name}: {label} compiled has no memory at this batch and is left out.")
    return found


def _report(
    name: str,
    batch: int,
    given: Any,
    rates: Mapping[str, list[float]],
    found: Mapping[str, list[dict[str, float]]],
    checked: Mapping[str, float],
    notes: list[str],
) -> harness.Report:
    """Make the rows: ours compiled against each of open_clip's settings, and eager against eager."""
    from benchmarks import _models

    best = "ours compiled" if "ours compiled" in rates else "ours eager"
    rows = []
    for setting in SETTINGS:
        if f"peer {setting}" in rates:
            target, peer = TARGETS.get((name, setting)), f"open_clip {setting}"
            pair = rates[best], rates[f"peer {setting}"]
            rows.append(harness.Row(f"{name}, {best} against {setting}", "samples/s", *pair, peer, target=target))
    if best != "ours eager":
        pair = rates["ours eager"], rates["peer eager"]
        rows.append(harness.Row(f"{name}, ours eager against eager", "samples/s", *pair, "open_clip eager"))
    gib = {key: [answer["bytes"] / 2**30 for answer in answers][-given.rounds :] for key, answers in found.items()}
    peer = "peer compiled" if "peer compiled" in gib else "peer eager"
    pair = gib[best], gib[peer]
    rows.append(harness.Row(f"{name}, peak memory", "GiB", *pair, peer.replace("peer", "open_clip"), False))
    config = _models.configuration(name)
    lengths = list(text_lengths(config, batch, given.texts))
    flops = statistics.mean(_flops.useful(config, row) for row in lengths) / batch
    mfu = {key: statistics.median(values) * flops / (given.peak_tflops * 1e12) for key, values in rates.items()}
    target = MFU_TARGETS.get(name)
    notes.append(
        f"MFU of {name} on useful FLOPs ({flops / 1e9:.1f} GFLOP a sample, {given.peak_tflops:g} TFLOP/s): "
        + ", ".join(f"{key.replace('peer', 'open_clip')} {100 * value:.1f} %" for key, value in mfu.items())
        + ("." if target is None else f"; must reach {100 * target:.0f} %{'' if mfu[best] >= target else ' (missed)'}.")
    )
    settings = {
        "batch": batch,
        "precision": "bf16 autocast",
        "text": f"{statistics.mean(map(statistics.mean, lengths)):.1f} ids on average",
        "optimizer": "fused AdamW",
        "rounds": given.rounds,
    }
    return harness.Report(
        f"GPU train_step {name}", rows, dict(checked), ["torch", "open_clip_torch", "timm"], settings, notes
    )
