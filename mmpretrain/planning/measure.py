"""What one sample costs a model: counted from the operations of the real model on tensors without memory or data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmpretrain.model import MultimodalModel
from mmpretrain.types import Batch, Outputs, Padded

SIZES = (128, 256)
"""Batches whose memory is compared: large enough that activations, not gradients, make the peak. They cost nothing."""


class PartCost(NamedTuple):
    """One part of a model for one sample: FLOPs of matrix products, and bytes kept for the backward pass."""

    forward: float
    backward: float
    kept: float

    @property
    def flops(self) -> float:
        """Both passes."""
        return self.forward + self.backward


class Asked(NamedTuple):
    """What a head predicts for one sample: positions, width of their hidden states, size of the vocabulary."""

    positions: float
    width: int
    vocabulary: int


class ModelCost(NamedTuple):
    """A model for one sample: `parts` in the order of the forward pass.

    `recomputed`: FLOPs done a second time because of checkpointing. `working`: bytes that the backward pass needs for a
    moment beside what was kept. `outputs`: bytes of what a micro-batch keeps (embeddings, hidden states of heads).
    `input`: bytes of a batch's row as it arrives. `copies`: bytes kept once for all samples, mostly weights in half
    precision. `embed_dim` E, `predictions` by head.
    """

    parts: dict[str, PartCost]
    recomputed: float
    working: float
    outputs: float
    input: float
    copies: float
    embed_dim: int
    predictions: dict[str, Asked]

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass."""
        return sum(part.forward for part in self.parts.values())

    @property
    def useful(self) -> float:
        """FLOPs of forward and backward pass, nothing counted twice."""
        return sum(part.flops for part in self.parts.values())

    @property
    def kept(self) -> float:
        """Bytes kept for the backward pass."""
        return sum(part.kept for part in self.parts.values())


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made while it is on and still referenced: `now`, and `peak` at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._held[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._held.pop(key)


def rows(shapes: Mapping[str, tuple[int, ...]], size: int) -> Batch:
    """A batch of `size` rows: ids for a shape of one dimension, uint8 pixels for an image, float32 for others."""
    batch: Batch = {}
    for modality, shape in shapes.items():
        dtype = torch.int64 if len(shape) == 1 else torch.uint8 if len(shape) == 3 and shape[0] == 3 else torch.float32
        batch[modality] = Padded(torch.zeros(size, *shape, dtype=dtype))
    return batch


def measure(
    build: Callable[[], MultimodalModel],
    shapes: Mapping[str, tuple[int, ...]],
    autocast: torch.dtype | None,
    fused_attention: bool,
    checkpointing: Callable[[nn.Module], None] | None = None,
) -> ModelCost:
    """Count what a sample of `shapes` (modality -> shape of one row) costs the model that `build` makes.

    FLOPs come from plain attention on the meta device, so that what a fused kernel computes twice is not called useful;
    memory from fake CPU tensors under autocast, with fused attention where the device has it. `checkpointing` changes
    the model whose memory is measured; what it computes twice is `recomputed`.
    """
    with torch.device("meta"):
        model, changed = build(), build()
    forward, backward = flops(model, shapes)
    recomputed = 0.0
    if checkpointing is not None:
        checkpointing(changed)
        recomputed = _total_flops(changed, shapes) - sum(forward.values()) - sum(backward.values())
    set_attention(changed, fused_attention)
    (small, asked), (large, _) = (_memory(changed, shapes, size, autocast) for size in SIZES)
    more = SIZES[1] - SIZES[0]
    kept = {name: (large.kept[name] - small.kept[name]) / more for name in forward}
    slope = (large.total - small.total) / more
    return ModelCost(
        {name: PartCost(forward[name], backward[name], kept[name]) for name in forward},
        recomputed=recomputed,
        working=(large.peak - small.peak) / more - slope,
        outputs=large.outputs / SIZES[1],
        input=sum(padded.values.nbytes for padded in _on_meta(shapes).values()),
        copies=small.total - slope * SIZES[0],
        embed_dim=model.embed_dim,
        predictions=asked,
    )


def set_attention(model: nn.Module, fused: bool) -> None:
    """Choose fused or plain attention in every part that has the switch."""
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            setattr(part, "fused_attn", fused)  # noqa: B010 (the type of a module's attributes is not known)


def _parts(model: MultimodalModel) -> Iterator[tuple[str, nn.Module]]:
    for modality, encoder in model.encoders.items():
        yield f"{modality} encoder", encoder
    for modality, projection in model.projections.items():
        yield f"{modality} projection", projection
    if model.fusion is not None:
        yield "fusion", model.fusion
    for name, head in model.heads.items():
        yield f"{name} head", head


@contextmanager
def _by_part(model: MultimodalModel, read: Callable[[], float], found: dict[str, float]) -> Iterator[None]:
    """Add to `found` how far `read()` moves while each part runs its forward pass."""
    handles = []
    for name, part in _parts(model):
        found.setdefault(name, 0.0)
        before: list[float] = []

        def enter(*_: Any, before: list[float] = before) -> None:
            before.append(read())

        def leave(*_: Any, name: str = name, before: list[float] = before) -> None:
            found[name] += read() - before.pop()

        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def flops(model: MultimodalModel, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, float], dict[str, float]]:
    """Count a sample's FLOPs by part, (forward, backward), with plain attention."""
    set_attention(model, False)
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    counter = FlopCounterMode(display=False)
    with counter, _by_part(model, counter.get_total_flops, forward), _attributed(model, counter, backward):
        _scalar(model(_on_meta(shapes))).backward()  # type: ignore[no-untyped-call]
    return forward, backward


@contextmanager
def _attributed(model: MultimodalModel, counter: FlopCounterMode, found: dict[str, float]) -> Iterator[None]:
    """Add to `found` the FLOPs of each part's backward pass: of the nodes of the graph that its forward pass made."""
    seen: set[Any] = set()

    def follow(name: str, outputs: Any) -> None:
        waiting = [t.grad_fn for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                node.register_prehook(partial(_count, found, name, counter, -1))
                node.register_hook(partial(_count, found, name, counter, 1))
                waiting += [following for following, _ in node.next_functions if following is not None]

    handles = []
    for name, part in _parts(model):
        found.setdefault(name, 0.0)
        handles.append(part.register_forward_hook(lambda _, __, outputs, name=name: follow(name, outputs)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _count(found: dict[str, float], name: str, counter: FlopCounterMode, sign: int, *_: Any) -> None:
    found[name] += sign * counter.get_total_flops()


def _total_flops(model: MultimodalModel, shapes: Mapping[str, tuple[int, ...]]) -> float:
    set_attention(model, False)
    counter = FlopCounterMode(display=False)
    with counter:
        _scalar(model(_on_meta(shapes))).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())


def _scalar(outputs: Outputs) -> Tensor:
    """What depends on all that a loss sees, without a matrix product."""
    asked = [prediction.hidden.float().sum() for prediction in outputs.predictions.values()]
    return torch.stack([embeddings.sum() for embeddings in outputs.embeddings.values()] + asked).sum()


class _Memory(NamedTuple):
    """Bytes after the forward pass of a batch, by part, and the peak of both passes without parameters' gradients."""

    kept: dict[str, float]
    total: float
    peak: float
    outputs: float


def _memory(
    model: MultimodalModel, shapes: Mapping[str, tuple[int, ...]], size: int, autocast: torch.dtype | None
) -> tuple[_Memory, dict[str, Asked]]:
    """Run both passes of a batch on fake CPU tensors."""
    kept: dict[str, float] = {}
    live = LiveBytes()
    precision = nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
    with FakeTensorMode():
        materialise(model)
        batch = rows(shapes, size)
        with live, precision, _by_part(model, lambda: live.now, kept):
            outputs = model(batch)
            total = live.now
            scalar = _scalar(outputs)
        with live:
            scalar.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
    held = sum(t.nbytes for t in [*outputs.embeddings.values(), *(p.hidden for p in outputs.predictions.values())])
    asked = {
        name: Asked(p.labels.numel() / size, p.weight.shape[1], p.weight.shape[0])
        for name, p in outputs.predictions.items()
    }
    return _Memory(kept, total, live.peak, held), asked


def materialise(model: nn.Module) -> None:
    """Replace meta tensors by ones on the device of the mode that is on: fake tensors cannot be moved to."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _on_meta(shapes: Mapping[str, tuple[int, ...]]) -> Batch:
    with torch.device("meta"):
        return rows(shapes, 1)
