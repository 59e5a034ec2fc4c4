"""Fully sharded training (FSDP2): every rank holds a part of each parameter, gradient and optimizer state."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from mmpretrain.layers import Block, CrossBlock
from mmpretrain.model import MultimodalModel


def shard(model: MultimodalModel, mesh: DeviceMesh) -> None:
    """Shard a model over `mesh`, block by block, so that one block's parameters at a time are whole.

    A mesh of two dimensions copies over the first (nodes) and shards over the second (ranks of a node).

    Our blocks and the children of a timm backbone's `blocks` or `stages` are gathered on their own, the rest (tables,
    projections, heads, logit scale) together. `encode` and `embed` gather parameters too, not only `forward`.
    """
    for module in [*model.modules()]:
        if isinstance(module, (Block, CrossBlock)):
            fully_shard(module, mesh=mesh)
        for name in ("blocks", "stages"):
            parts = getattr(module, name, None)
            if isinstance(parts, nn.Sequential):
                for part in parts:
                    fully_shard(part, mesh=mesh)
    # What a loss multiplies (an output embedding) must still be whole after the forward pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for method in ("encode", "embed"):
        register_fsdp_forward_method(model, method)


def full_state(model: nn.Module) -> dict[str, Any]:
    """Gather a model's whole state on the CPU of rank 0 (empty elsewhere); every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state
