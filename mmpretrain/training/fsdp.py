"""Fully sharded training (FSDP2): every rank holds a part of each parameter, gradient and optimizer state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from mmpretrain.activation_checkpointing import repeated_blocks
from mmpretrain.model import MultimodalModel

EXACT = MixedPrecisionPolicy()
"""Everything in the dtype it has."""


def shard(model: MultimodalModel, mesh: DeviceMesh, half: bool = False) -> None:
    """Shard a model over `mesh`, block by block, so that one block's parameters at a time are whole.

    A mesh of two dimensions copies over the first (nodes) and shards over the second (ranks of a node).

    The repeated blocks are gathered on their own, the rest (tables, projections, heads, logit scale) together. `encode`
    and `embed` gather parameters too, not only `forward`. With `half`, for training under bfloat16 autocast, blocks'
    parameters travel in bfloat16, half the bytes, and so do activations between blocks; gradients are summed over ranks
    in float32, parameters and optimizer stay float32, and so do the logit scale and all else outside of blocks.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else EXACT
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # What a loss multiplies (an output embedding) must still be whole after the forward pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for method in ("encode", "encode_layers", "feature_maps", "embed"):
        register_fsdp_forward_method(model, method)


def full_state(model: nn.Module) -> dict[str, Any]:
    """Gather a model's whole state on the CPU of rank 0 (empty elsewhere); every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state
