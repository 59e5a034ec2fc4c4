"""Steps are drawn one ahead, in their order, and only their tensors move."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mmpretrain.data.device_prefetch import DevicePrefetch, on_device, one_ahead, tensors
from mmpretrain.data.step import Step, Trace
from tests import models


def steps(count: int) -> list[Step]:
    traces = [Trace({"a": [f"shard:{number}"]}, {"a": []}) for number in range(count)]
    return [Step({"a": models.batch(3, number)}, trace) for number, trace in enumerate(traces)]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_one_is_drawn_ahead_of_its_use(count):
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for item in range(count):
            drawn.append(item)
            yield item

    for item in one_ahead(items()):
        assert len(drawn) == min(item + 2, count)
    assert drawn == [*range(count)]


def test_a_cpu_gets_the_loaders_own_steps():
    loader = steps(3)
    prefetch = DevicePrefetch(loader, torch.device("cpu"))
    assert len(prefetch) == 3
    assert all(got is want for got, want in zip(prefetch, loader, strict=True))
    assert len([*prefetch]) == 3  # and again


def test_all_tensors_move_and_nothing_else():
    (step,) = steps(1)
    moved = on_device(step, torch.device("meta"))
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"} and len([*tensors(moved)]) == 3
    assert moved.trace is step.trace and moved.batches["a"]["text"].lengths is step.batches["a"]["text"].lengths


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_steps_without_waiting():
    device, want = torch.device("cuda", 0), steps(6)
    loader = torch.utils.data.DataLoader(want, batch_size=None, pin_memory=True)
    got = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in DevicePrefetch(loader, device):
            # Work long enough that the next copy would overtake it, were its memory given away too early.
            busy = torch.randn(2048, 2048, device=device)
            for _ in range(20):
                busy = busy @ busy / 2048
            got.append([tensor.clone() for tensor in tensors(step)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, step in zip(got, want, strict=True):
        for one, other in zip(mine, tensors(step), strict=True):
            assert one.is_cuda and torch.equal(one.cpu(), other)
