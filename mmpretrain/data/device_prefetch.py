"""The next step travels to the GPU while this one is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from mmpretrain.data.step import Step

T = TypeVar("T")


class Loader(Iterable[Step], Sized, Protocol):
    """Steps, and how many there are."""


class DevicePrefetch:
    """A loader whose steps are on `device` already: each is copied, on a stream of its own, one step ahead of its use.

    The loader should pin its memory. On a CPU the loader's steps pass through as they are. What a step holds and the
    order of steps stay, and a step that was copied but not used is as if it had not been read: which samples a step has
    follows from its number alone, and its trace is written down when it was trained on.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Step]:
        if self.device.type != "cuda":
            yield from self.loader
            return
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        for copied in one_ahead(begin(step, self.device, stream) for step in self.loader):
            yield finish(copied, torch.cuda.current_stream(self.device))


class Copied(NamedTuple):
    """A step whose tensors are on their way, and the event after which they have arrived."""

    step: Step
    arrived: torch.cuda.Event


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the same items in the same order, each after the one behind it has been drawn."""
    iterator = iter(items)
    waiting = [*islice(iterator, 1)]
    for following in iterator:
        yield waiting.pop()
        waiting.append(following)
    yield from waiting


def begin(step: Step, device: torch.device, stream: torch.cuda.Stream) -> Copied:
    """Start to copy a step on `stream`, without waiting."""
    with torch.cuda.stream(stream):
        moved = on_device(step, device)
        return Copied(moved, stream.record_event())


def finish(copied: Copied, stream: torch.cuda.Stream) -> Step:
    """Let `stream`, not the host, wait until the step has arrived; memory is kept until `stream` is done with it."""
    stream.wait_event(copied.arrived)
    for tensor in tensors(copied.step):
        tensor.record_stream(stream)
    return copied.step


def on_device(step: Step, device: torch.device) -> Step:
    """Copy a step's tensors to `device`, without waiting where their memory is pinned."""
    batches = {
        source: {modality: padded.to(device, non_blocking=True) for modality, padded in batch.items()}
        for source, batch in step.batches.items()
    }
    return step._replace(batches=batches)


def tensors(step: Step) -> Iterator[Tensor]:
    """Every tensor of a step."""
    for batch in step.batches.values():
        for padded in batch.values():
            yield from (part for part in padded if isinstance(part, Tensor))
