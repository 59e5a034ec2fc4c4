"""What a model's parameters cost: their bytes, gradients, the optimizer's state and step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmpretrain.activation_checkpointing import repeated_blocks
from mmpretrain.planning.measure import materialise


class Weights(NamedTuple):
    """Bytes, for the whole model: `parameters`, `trained` (those with gradients), `buffers`, and the optimizer's
    `state`; `optimizer_flops` of its matrix products in one step. `blocks` repeated parts hold `block_bytes` in all,
    `block_trained` of them with gradients, the largest `largest_block`."""

    parameters: float
    trained: float
    buffers: float
    state: float
    optimizer_flops: float
    blocks: int
    block_bytes: float
    block_trained: float
    largest_block: float


def weigh(
    model: nn.Module,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    groups: Callable[[nn.Module, float], list[dict[str, Any]]],
) -> Weights:
    """Weigh a model on the meta device, and let the optimizer make one step on tensors without memory."""
    blocks = [_bytes(block.parameters()) for block in repeated_blocks(model)]
    block_trained = sum(_bytes(_trained(block)) for block in repeated_blocks(model))
    parameters, trained, buffers = _bytes(model.parameters()), _bytes(_trained(model)), _bytes(model.buffers())
    counter = FlopCounterMode(display=False)
    with FakeTensorMode():
        materialise(model)
        made = optimizer(groups(model, 0.1))
        for parameter in _trained(model):
            parameter.grad = torch.empty_like(parameter)
        with counter, _Ones():  # type: ignore[no-untyped-call]
            made.step()
        state = _bytes(t for t in tree_leaves(list(made.state.values())) if isinstance(t, Tensor))
    return Weights(
        parameters,
        trained,
        buffers,
        state,
        float(counter.get_total_flops()),
        len(blocks),
        sum(blocks),
        block_trained,
        max(blocks, default=0),
    )


class _Ones(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers 1 where the host asks for a number of a tensor without memory: some optimizers read their step count."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run everything else."""
        return 1.0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _bytes(tensors: Any) -> float:
    return float(sum(tensor.nbytes for tensor in tensors))
