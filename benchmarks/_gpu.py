"""What the GPU set shares: timing with events, peak memory, sides in processes of their own, and what is missing."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import re
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import torch

PEAK_TFLOPS = 790.0
"""Dense bf16 matrix products of one H100 SXM, as measured (its data sheet says 989)."""

DISTRIBUTIONS = {
    "open_clip": "open_clip_torch",
    "inf_cl": "inf-cl",
    "siglip_kernel": "siglip-kernel",
    "sklearn": "scikit-learn",
}
"""Import name -> name on the package index, where they differ."""


class OutOfTime(Exception):
    """A part did not end within its time."""


class Clock:
    """How much time is left of a budget in seconds."""

    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget

    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.end - time.monotonic())


def missing(modules: Iterable[str]) -> list[str]:
    """Name the distributions of those modules that cannot be imported."""
    return [DISTRIBUTIONS.get(name, name) for name in modules if importlib.util.find_spec(name) is None]


def slug(name: str) -> str:
    """Turn a device's name into part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give memory that nothing uses back, so that the other side's process can have it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(work: Callable[[int], object], repeat: int, device: torch.device) -> float:
    """Seconds for each of `repeat` calls `work(i)`: events on the device, which is waited for at both ends alone."""
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(repeat):
            work(i)
        return (time.perf_counter() - start) / repeat
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for i in range(repeat):
        work(i)
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000 / repeat


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call needs at its peak beyond what is held before it; on a CPU, where only code is tried, of all."""
    if device.type != "cuda":
        work()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


Handler = Callable[[Mapping[str, Any]], Any]


class Asked(Protocol):
    """Something that is sent a request and later gives its answer."""

    def send(self, **request: Any) -> None:
        """Send a request; raises nothing yet."""

    def receive(self, limit: float) -> Any:
        """Return the answer; raises `OutOfTime` where it takes longer than `limit` seconds."""

    def close(self) -> None:
        """End it."""


class Side:
    """A handler in a fresh process. `make()` is called there and returns what answers requests."""

    def __init__(self, make: Callable[[], Handler]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # Not a daemon: daemons may have no workers of their own, which data loading needs.
        self.process = context.Process(target=_serve, args=(theirs, make), daemon=False)
        self.process.start()
        theirs.close()

    def send(self, **request: Any) -> None:
        """Send a request."""
        self.pipe.send(request)

    def receive(self, limit: float) -> Any:
        """Return the answer; raises `OutOfTime`, or `SystemExit` with what went wrong over there."""
        if not self.pipe.poll(limit):
            raise OutOfTime
        try:
            failed, answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise SystemExit(f"a side's process ended with {self.process.exitcode}") from None
        if failed:
            raise SystemExit(f"a side failed:\n{answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Local:
    """The same in this process, for trying the code out."""

    def __init__(self, make: Callable[[], Handler]) -> None:
        self.handler = make()
        self.answers: list[Any] = []

    def send(self, **request: Any) -> None:
        """Answer at once, and keep the answer."""
        self.answers.append(self.handler(request))

    def receive(self, limit: float) -> Any:
        """Return the oldest answer."""
        return self.answers.pop(0)

    def close(self) -> None:
        """Nothing to end."""


class Sides(NamedTuple):
    """Both sides of one comparison."""

    ours: Asked
    peer: Asked

    def ask(self, who: str, limit: float, **request: Any) -> Any:
        """Ask one side, `ours` or `peer`, and wait."""
        asked: Asked = getattr(self, who)
        asked.send(**request)
        return asked.receive(limit)


class Keeper:
    """Both sides, started when they are first needed and kept for further models, until one has failed."""

    def __init__(self, kind: Callable[[Callable[[], Handler]], Asked], make: Callable[[], Handler]) -> None:
        self.kind, self.make = kind, make
        self.held: Sides | None = None

    def sides(self) -> Sides:
        """Return both sides."""
        if self.held is None:
            self.held = Sides(self.kind(self.make), self.kind(self.make))
        return self.held

    def close(self) -> None:
        """End both; the next that are asked for are new."""
        for side in self.held or ():
            side.close()
        self.held = None


def _serve(pipe: Connection, make: Callable[[], Handler]) -> None:
    handler: Handler | None = None
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            handler = handler or make()
            answer = False, handler(request)
        except BaseException:
            answer = True, traceback.format_exc()
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return
