"""Pairwise sigmoid loss (SigLIP), in tiles; the columns of all ranks are gathered or travel around the ring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.distributed import gather, rank
from mmpretrain.errors import InputError
from mmpretrain.losses.contrastive import embedding_pair
from mmpretrain.losses.tiles import (
    Blocks,
    Exchange,
    buffers,
    check_first_derivative,
    check_rows,
    check_tiles,
    inner_product,
    tile_size_for,
    tiles,
)
from mmpretrain.types import Outputs


def sigmoid_loss(a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Sum over all pairs of -log sigmoid(±(scale a·b + bias)), divided by the batch size, not its square.

    a, b (B,E) unit vectors; + on the diagonal (Zhai et al. 2023, algorithm 1).
    """
    with torch.autocast(a.device.type, enabled=False):
        logits = logit_scale * a @ b.T + logit_bias
        sign = 2 * torch.eye(len(a), dtype=logits.dtype, device=logits.device) - 1
        return -F.logsigmoid(sign * logits).sum() / len(a)


@torch.library.custom_op("mmpretrain::sigmoid", mutates_args=())
def sigmoid_sweep(
    a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, tile_size: int, ring: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum up this rank's share of the loss, and its gradients of a, b, scale and bias in the same sweep.

    a (B,E) against b, all columns (G,E) or with `ring` this rank's (B,E); row i belongs to column `offset + i` of all.
    A pair's gradient needs nothing but its own logit, so each tile is multiplied once.
    """
    with torch.autocast(a.device.type, enabled=False):
        loss, grad_bias = a.new_zeros(()), a.new_zeros(())
        grad_a = torch.zeros_like(a)
        blocks = Blocks(ring, b, torch.zeros_like(b))
        buffer, spare = buffers(a, b, tile_size)
        for begin, (block, grad_block) in blocks:
            for tile in tiles(len(a), len(block), tile_size, offset - begin):
                logits, slope = tile.view(buffer), tile.view(spare)
                scaled, columns = a[tile.rows] * logit_scale, block[tile.columns]
                torch.addmm(logit_bias, scaled, columns.T, out=logits)
                tile.own(logits)[1].neg_()
                torch.sigmoid(logits, out=slope)
                # Every pair now asks for a small logit: -log sigmoid(-logit).
                loss -= F.logsigmoid(logits.neg_()).sum()
                tile.own(slope)[1].neg_()
                grad_bias += slope.sum()
                grad_a[tile.rows].addmm_(slope, columns)
                grad_block[tile.columns].addmm_(slope.T, scaled)
        grad_b, factor = blocks.travelling[1], 1 / len(a)
        # Sum over the tiles of slope times similarity, without one more pass over them.
        grad_scale = inner_product(a, grad_a, tile_size).mul_(factor)
        return (
            loss * factor,
            grad_a.mul_(logit_scale * factor),
            grad_b.mul_(factor),
            grad_scale.expand_as(logit_scale).clone(),
            grad_bias.mul_(factor).expand_as(logit_bias).clone(),
        )


@sigmoid_sweep.register_fake
def _(
    a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, tile_size: int, ring: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = [torch.empty_like(x) for x in (a, b, logit_scale, logit_bias)]
    return a.new_empty(()), gradients[0], gradients[1], gradients[2], gradients[3]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    gradients = output[1:]
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)


def _backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    check_first_derivative("sigmoid_loss")
    return *(gradient * saved for saved in ctx.saved_tensors), None, None, None


sigmoid_sweep.register_autograd(_backward, setup_context=_save)


def tiled_sigmoid_loss(
    a: Tensor,
    all_b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int = 0,
    tile_size: int | None = None,
) -> Tensor:
    """`sigmoid_loss` of local rows a (B,E) against all_b (G,E), row i's own column being `offset + i`, in tiles.

    Memory is two tiles of (tile_size,tile_size) and the gradients; None takes a size that suits the device. Averaging
    over ranks gives the loss of the global batch. First derivatives only.
    """
    return _swept(a, all_b, logit_scale, logit_bias, offset, tile_size, ring=False)


def ring_sigmoid_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor, tile_size: int | None = None
) -> Tensor:
    """`sigmoid_loss` over the global batch without ever holding G columns: blocks of b (B,E) travel around the ranks.

    Every rank must pass the same B, and the weight that multiplies the returned loss must be the same on every rank,
    since its gradient reaches other ranks' rows. Averaging over ranks gives the loss of the global batch.
    """
    return _swept(a, b, logit_scale, logit_bias, rank() * len(a), tile_size, ring=True)


def _swept(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, offset: int, tile_size: int | None, ring: bool) -> Tensor:
    check_rows(a, b, None, ring)
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(a.dtype, torch.float32)
        inputs = a.to(dtype), b.to(dtype), scale.to(dtype), bias.to(dtype)
        loss: Tensor = sigmoid_sweep(*inputs, offset, tile_size_for(a.device, tile_size), ring)[0]
        return loss


class SigmoidLoss:
    """Pairwise sigmoid loss between two modalities over the global batch; needs a model with `logit_bias`.

    `tile_size`: rows and columns of similarities held at once; None takes a size that suits the device. `exchange`:
    "ring" passes the embeddings of one modality around the ranks, "gather" holds those of all ranks.
    """

    def __init__(
        self, a: str = "image", b: str = "text", tile_size: int | None = None, exchange: Exchange = "ring"
    ) -> None:
        check_tiles(tile_size, exchange)
        self.a, self.b, self.tile_size, self.exchange = a, b, tile_size, exchange

    def __call__(self, outputs: Outputs) -> Tensor:
        """Compute this rank's share, whose mean over ranks is the loss of the global batch."""
        a, b = embedding_pair(outputs, self.a, self.b)
        scale, bias = outputs.logit_scale, outputs.logit_bias
        if bias is None:
            raise InputError("the sigmoid loss needs a bias, and the model has none; set model.logit_bias=-10")
        if self.exchange == "ring":
            return ring_sigmoid_loss(a, b, scale, bias, self.tile_size)
        return tiled_sigmoid_loss(a, gather(b), scale, bias, rank() * len(a), self.tile_size)
