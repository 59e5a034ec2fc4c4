"""Fully sharded training (FSDP2): every rank holds a part of each parameter, gradient and optimizer state."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from mmpretrain.layers import Block, CrossBlock
from mmpretrain.model import MultimodalModel


def shard(model: MultimodalModel, mesh: DeviceMesh) -> None:
    """Shard a model over `mesh`, block by block, so that one block's parameters at a time are whole.

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
