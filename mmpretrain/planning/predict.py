"""From costs and hardware to memory, time and the largest batch: arithmetic alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from mmpretrain.planning.hardware import Hardware
from mmpretrain.planning.loss_cost import LossCost, Place
from mmpretrain.planning.measure import ModelCost
from mmpretrain.planning.traffic import GRADIENTS, Message, Ranks, bookkeeping, ddp, fsdp
from mmpretrain.planning.weights import Weights

Parallel = Literal["none", "ddp", "fsdp"]
LARGEST = 2**20
"""Rows of one rank beyond which nobody asks."""


class Run(NamedTuple):
    """What is planned: `losses` gives their costs for a number of rows of one rank; `hardware` is one rank's share of
    it; `averaged` says that a moving average of the trained weights is kept."""

    model: ModelCost
    weights: Weights
    losses: Callable[[Place], dict[str, LossCost]]
    hardware: Hardware
    ranks: Ranks
    parallel: Parallel
    bucket_view: bool
    half: bool
    micro_batch_size: int | None
    averaged: bool = False

    def place(self, rows: int) -> Place:
        """Where a loss over `rows` of each rank is computed."""
        return Place(rows, self.ranks.all, torch.device("cuda" if self.hardware.kind == "gpu" else "cpu"))


class Input(NamedTuple):
    """What feeds a device: pictures one core decodes in a second, and bytes a sample has in its shard."""

    images_per_core: float
    bytes_per_sample: float


class Times(NamedTuple):
    """Seconds of one step. `communication` is what does not hide behind the backward pass. `input` runs beside all, but
    with `same_cores` (on a CPU) it takes its time from them."""

    model: float
    losses: float
    optimizer: float
    communication: float
    hidden: float
    input: float
    same_cores: bool = False

    @property
    def device(self) -> float:
        """A step that never waits for input."""
        return self.model + self.losses + self.optimizer + self.communication

    @property
    def step(self) -> float:
        """One step."""
        return self.device + self.input if self.same_cores else max(self.device, self.input)

    @property
    def bound(self) -> str:
        """What would have to get faster: input, communication, optimizer or compute."""
        if not self.same_cores and self.input > self.device:
            return "input"
        shares = {
            "compute": self.model + self.losses,
            "communication": self.communication,
            "optimizer": self.optimizer,
            "input": self.input if self.same_cores else 0.0,
        }
        return max(shares, key=lambda name: shares[name])


def memory(run: Run, rows: int) -> dict[str, float]:
    """Bytes on one device at `rows` of each rank, by part.

    The sum is an upper bound: gradients are counted in full although they grow only while activations go.
    """
    model = run.model
    at_once = min(rows, run.micro_batch_size or rows)
    kept = {
        "activations": model.kept * at_once,
        "backward pass": model.working * at_once,
        "micro-batch outputs": 2 * model.outputs * rows if at_once < rows else 0.0,
        "input": 2 * model.input * rows,  # this batch and the next
    }
    losses = {f"{name} loss": cost.held for name, cost in run.losses(run.place(rows)).items()}
    average = {"moving average": run.weights.trained} if run.averaged else {}
    return {**_of_weights(run), **average, **kept, **losses}


def _of_weights(run: Run) -> dict[str, float]:
    weights, model = run.weights, run.model
    if run.parallel != "fsdp":
        copied = run.parallel == "ddp" and not run.bucket_view
        return {
            "weights": weights.parameters + weights.buffers,
            "half-precision copies": model.copies,
            "gradients": weights.trained * (2 if copied else 1),
            "optimizer state": weights.state,
        }
    shards = run.ranks.per_node
    root = weights.parameters - weights.block_bytes
    travelling = 0.5 if run.half else 1.0
    return {
        "weights": weights.parameters / shards + weights.buffers,
        # Two blocks, this and the next, and what is not in a block are whole at a time; one block's gradients are.
        "whole blocks": 2 * weights.largest_block * travelling + root + weights.largest_block,
        "half-precision copies": max(0.0, model.copies - (weights.block_bytes / 2 if run.half else 0.0)),
        "gradients": weights.trained / shards,
        "optimizer state": weights.state / shards,
    }


def largest_batch(run: Run) -> int:
    """Most rows of one rank whose step fits, rounded down to a multiple of 8; 0 where not even one does."""

    def fits(rows: int) -> bool:
        return sum(memory(run, rows).values()) <= run.hardware.usable_bytes

    low, high = 0, LARGEST + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low - low % 8 if low >= 8 else low


def largest_micro_batch(run: Run, rows: int) -> int:
    """The largest power of two that `rows` can be cut into so that the step fits; 0 where none does."""
    size = 1 << (rows.bit_length() - 1)
    while size >= 1:
        cut = run._replace(micro_batch_size=size)
        if size < rows and sum(memory(cut, rows).values()) <= run.hardware.usable_bytes:
            return size
        size //= 2
    return 0


def messages(run: Run, rows: int) -> list[Message]:
    """Everything that ranks send in one step."""
    weights = run.weights
    parallel: list[Message] = []
    if run.parallel == "ddp":
        parallel = ddp(weights.trained, weights.buffers)
    elif run.parallel == "fsdp":
        travelling = 0.5 if run.half else 1.0
        root = weights.parameters - weights.block_bytes
        blocks = weights.block_bytes * travelling
        parallel = fsdp(blocks, weights.block_trained, root, weights.blocks, run.ranks.per_node)
    from_losses = [m for cost in run.losses(run.place(rows)).values() for m in cost.messages]
    return [*parallel, *from_losses, *bookkeeping(run.parallel == "fsdp")]


def times(run: Run, rows: int, feed: Input) -> Times:
    """Seconds of one step at `rows` of each rank."""
    hardware, model = run.hardware, run.model
    again = model.recomputed + (model.forward if rows > (run.micro_batch_size or rows) else 0.0)
    rate = hardware.matmul_flops(not run.half) * hardware.efficiency
    compute = (model.useful + again) * rows / rate
    losses = sum(
        (cost.useful + cost.recomputed) / hardware.matmul_flops(cost.float32)
        for cost in run.losses(run.place(rows)).values()
    )
    travel = messages(run, rows)
    early = sum(m.seconds(run.ranks, hardware) for m in travel if m.part == GRADIENTS)
    late = sum(m.seconds(run.ranks, hardware) for m in travel if m.part != GRADIENTS)
    # Gradients leave while earlier layers are still in their backward pass; the last tenth has nothing to hide behind.
    backward = compute * (model.useful - model.forward) / (model.useful + again)
    hidden = min(0.9 * early, 0.9 * backward)
    return Times(
        compute,
        losses,
        _optimizer(run),
        early - hidden + late,
        hidden,
        rows / (hardware.cores_per_device * feed.images_per_core),
        same_cores=hardware.kind == "cpu",
    )


def _optimizer(run: Run) -> float:
    """Read gradients three times (norm, clipping, step), read and write weights and state; add its products.

    A moving average reads weights and itself and is written.
    """
    weights, hardware = run.weights, run.hardware
    moved = 3 * weights.trained + 2 * weights.trained + 2 * weights.state + (3 * weights.trained if run.averaged else 0)
    shards = run.ranks.per_node if run.parallel == "fsdp" else 1
    products = weights.optimizer_flops / (hardware.matmul_flops() * hardware.efficiency)
    return moved / shards / (hardware.memory_gb_per_s * 1e9) + products
