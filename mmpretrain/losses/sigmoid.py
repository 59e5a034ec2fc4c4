"""Pairwise sigmoid loss (SigLIP), as blocks that travel around the ring of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmpretrain.distributed import rotate, world_size
from mmpretrain.errors import InputError
from mmpretrain.losses.contrastive import embedding_pair
from mmpretrain.types import Outputs


def sigmoid_loss(a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Sum over all pairs of -log sigmoid(±(scale a·b + bias)), divided by the batch size, not its square.

    a, b (B,E) unit vectors; + on the diagonal (Zhai et al. 2023, algorithm 1).
    """
    with torch.autocast(a.device.type, enabled=False):
        logits = logit_scale * a @ b.T + logit_bias
        sign = 2 * torch.eye(len(a), dtype=logits.dtype, device=logits.device) - 1
        return -F.logsigmoid(sign * logits).sum() / len(a)


class _Ring(torch.autograd.Function):
    """Visits every rank's block once; gradients are made in the forward pass and travel with the blocks."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor, chunk_size: int) -> Tensor:
        grad_a = torch.zeros_like(a)
        grad_scale, grad_bias = torch.zeros_like(logit_scale), torch.zeros_like(logit_bias)
        total = a.new_zeros(())
        block, grad_block = b, torch.zeros_like(b)
        for hop in range(world_size()):
            for start in range(0, len(a), chunk_size):
                rows = slice(start, start + chunk_size)
                similarity = a[rows] @ block.T
                sign = torch.full_like(similarity, -1)
                if hop == 0:
                    sign.diagonal(start).fill_(1)
                signed = sign * (logit_scale * similarity + logit_bias)
                total -= F.logsigmoid(signed).sum()
                slope = -sign * torch.sigmoid(-signed)  # d loss / d logits
                grad_scale += (slope * similarity).sum()
                grad_bias += slope.sum()
                slope *= logit_scale
                grad_a[rows] += slope @ block
                grad_block += slope.T @ a[rows]
            if world_size() > 1:
                block, grad_block = rotate(block, grad_block)
        # Every rank's mean over its own rows; other ranks' rows reached this rank's b with the same division.
        ctx.save_for_backward(*(gradient / len(a) for gradient in (grad_a, grad_block, grad_scale, grad_bias)))
        return total / len(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grad * gradient for gradient in ctx.saved_tensors), None)


def ring_sigmoid_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor, chunk_size: int | None = None
) -> Tensor:
    """`sigmoid_loss` over the global batch without ever holding G columns: blocks of b (B,E) travel around the ranks.

    Peak memory is one (chunk_size,B) block, all of B by default. Every rank must pass the same B, and the weight that
    multiplies the returned loss must be the same on every rank, since its gradient reaches other ranks' rows.
    Averaging over ranks gives the loss of the global batch.
    """
    with torch.autocast(a.device.type, enabled=False):
        loss: Tensor = _Ring.apply(a, b, logit_scale, logit_bias, chunk_size or len(a))
        return loss


class SigmoidLoss:
    """Pairwise sigmoid loss between two modalities over the global batch; needs a model with `logit_bias`.

    `chunk_size` bounds the rows of similarities held at once; None holds all of this rank's rows.
    """

    def __init__(self, a: str = "image", b: str = "text", chunk_size: int | None = None) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise InputError(f"chunk_size is {chunk_size}; give at least 1, or null to hold all rows at once")
        self.a, self.b, self.chunk_size = a, b, chunk_size

    def __call__(self, outputs: Outputs) -> Tensor:
        """Compute this rank's share, whose mean over ranks is the loss of the global batch."""
        a, b = embedding_pair(outputs, self.a, self.b)
        if outputs.logit_bias is None:
            raise InputError("the sigmoid loss needs a bias, and the model has none; set model.logit_bias=-10")
        return ring_sigmoid_loss(a, b, outputs.logit_scale, outputs.logit_bias, self.chunk_size)
