"""Symmetric InfoNCE of a similarity matrix that never exists: two sweeps over square tiles of it.

The forward sweep multiplies each tile once and reads from it the log-sum-exp of its rows *and* of its columns. The
backward sweep multiplies it again, turns it into the gradient of the logits, and multiplies that into both gradients:
four products in all, where two separate directions take six. Memory is two tiles and a few numbers a row.

With several ranks a rank sweeps its own rows a (B,E) against all columns (G,E), gathered or passed around the ring a
block at a time, and the ranks join the log-sum-exps of the columns. Each sweep is one operator to torch.compile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpretrain.distributed import exponentials_over_ranks
from mmpretrain.losses.tiles import Blocks, Tile, buffers, check_first_derivative, inner_product, tiles


class _Sums(NamedTuple):
    """Log-sum-exps as two numbers: the largest logit (N,), and the sum of exponentials relative to it (N,).

    Added up they would round to the logits' precision, and a probability near 1 be off by as much; apart they keep it.
    """

    largest: Tensor
    total: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> _Sums:
        return cls(like.new_full((len(like),), -torch.inf), like.new_zeros(len(like)))

    def add(self, where: slice, logits: Tensor, dim: int, spare: Tensor) -> None:
        largest, total = self.largest[where], self.total[where]
        now = torch.maximum(largest, logits.amax(dim))
        total.mul_(largest.sub_(now).exp_())
        total.add_(torch.sub(logits, now.unsqueeze(dim), out=spare).exp_().sum(dim))
        largest.copy_(now)

    def excess(self, over: Tensor) -> Tensor:
        """By how much the log-sum-exps exceed some logits (N,)."""
        return (self.largest - over).add_(self.total.log())


class _Same(NamedTuple):
    """Which pairs are positives, where it is not the diagonal: those whose `ids` (G,) are equal."""

    ids: Tensor
    share: Tensor  # (G,): one over the number of positives of a row or column

    @classmethod
    def of(cls, ids: Tensor, dtype: torch.dtype) -> _Same:
        ordered = ids.sort().values
        count = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
        return cls(ids, count.to(dtype).reciprocal())

    def target(self, tile: Tile, row: int, column: int, dtype: torch.dtype) -> Tensor:
        """Return the probability each positive of the tile should have; rows begin at `row` of all, columns too."""
        rows = slice(row + tile.rows.start, row + tile.rows.stop)
        columns = slice(column + tile.columns.start, column + tile.columns.stop)
        return (self.ids[rows, None] == self.ids[columns]).to(dtype).mul_(self.share[rows, None])


@torch.library.custom_op("mmpretrain::contrastive", mutates_args=())
def contrastive_sweep(
    a: Tensor, b: Tensor, logit_scale: Tensor, identities: Tensor | None, offset: int, tile_size: int, ring: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum up this rank's share of the loss: a (B,E) against b, all columns (G,E) or with `ring` this rank's (B,E).

    `identities` (G,) make pairs of equal ones positives; None: row i's only positive is column `offset + i` of all.
    Returns the loss, and the two numbers of `_Sums` for the rows (B,) and for the columns of b.
    """
    with torch.autocast(a.device.type, enabled=False):
        same = None if identities is None else _Same.of(identities, a.dtype)
        rows, wanted = _Sums.empty(a), a.new_zeros(len(a))
        blocks = Blocks(ring, b, *_Sums.empty(b))
        buffer, spare = buffers(a, b, tile_size)
        for begin, (block, *statistics) in blocks:
            columns = _Sums(*statistics)
            for tile in tiles(len(a), len(block), tile_size, offset - begin):
                logits, other = tile.view(buffer), tile.view(spare)
                torch.mm(a[tile.rows] * logit_scale, block[tile.columns].T, out=logits)
                if same is not None:
                    wanted[tile.rows] += same.target(tile, offset, begin, a.dtype).mul_(logits).sum(1)
                else:
                    own, elements = tile.own(logits)
                    wanted[own] = elements
                rows.add(tile.rows, logits, 1, other)
                columns.add(tile.columns, logits, 0, other)
        columns = _Sums(*blocks.travelling[1:])
        if not ring:
            columns = _Sums(*exponentials_over_ranks(*columns))
        mine = columns if ring else _Sums(*(x[offset : offset + len(a)] for x in columns))
        loss = (rows.excess(wanted) + mine.excess(wanted)).mean() / 2
        return loss, rows.largest, rows.total, columns.largest, columns.total


@contrastive_sweep.register_fake
def _(
    a: Tensor, b: Tensor, logit_scale: Tensor, identities: Tensor | None, offset: int, tile_size: int, ring: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, column = a.new_empty(len(a)), a.new_empty(len(b))
    return a.new_empty(()), row, torch.empty_like(row), column, torch.empty_like(column)


@torch.library.custom_op("mmpretrain::contrastive_backward", mutates_args=())
def contrastive_backward_sweep(
    gradient: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    identities: Tensor | None,
    row_largest: Tensor,
    row_total: Tensor,
    column_largest: Tensor,
    column_total: Tensor,
    offset: int,
    tile_size: int,
    ring: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, of b and of logit_scale, from the sums of `contrastive_sweep`, whose arguments the others are.

    The loss of each row and column has the gradient softmax - target, so both directions share the tile and the target
    counts twice.
    """
    with torch.autocast(a.device.type, enabled=False):
        same = None if identities is None else _Same.of(identities, a.dtype)
        grad_a = torch.zeros_like(a)
        row_share = row_total.reciprocal()
        blocks = Blocks(ring, b, column_largest, column_total.reciprocal(), torch.zeros_like(b))
        buffer, spare = buffers(a, b, tile_size)
        for begin, (block, largest, share, grad_block) in blocks:
            for tile in tiles(len(a), len(block), tile_size, offset - begin):
                logits, slope = tile.view(buffer), tile.view(spare)
                scaled, columns = a[tile.rows] * logit_scale, block[tile.columns]
                torch.mm(scaled, columns.T, out=logits)
                torch.sub(logits, row_largest[tile.rows, None], out=slope).exp_().mul_(row_share[tile.rows, None])
                slope.addcmul_(logits.sub_(largest[tile.columns]).exp_(), share[tile.columns])
                if same is not None:
                    slope.sub_(same.target(tile, offset, begin, a.dtype), alpha=2)
                else:
                    tile.own(slope)[1].sub_(2)
                grad_a[tile.rows].addmm_(slope, columns)
                grad_block[tile.columns].addmm_(slope.T, scaled)
        grad_b = blocks.travelling[3]
        factor = gradient / (2 * len(a))
        # Sum over the tiles of slope times similarity, without one more pass over them.
        grad_scale = inner_product(a, grad_a, tile_size) * factor
        return grad_a.mul_(logit_scale * factor), grad_b.mul_(factor), grad_scale.expand_as(logit_scale).clone()


@contrastive_backward_sweep.register_fake
def _(
    gradient: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    identities: Tensor | None,
    row_largest: Tensor,
    row_total: Tensor,
    column_largest: Tensor,
    column_total: Tensor,
    offset: int,
    tile_size: int,
    ring: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b), torch.empty_like(logit_scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.offset, ctx.tile_size, ctx.ring = inputs
    sums = output[1:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*sums)
    ctx.save_for_backward(*tensors, *sums)


def _backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    check_first_derivative("contrastive_loss or multi_positive_contrastive_loss")
    gradients = contrastive_backward_sweep(gradient, *ctx.saved_tensors, ctx.offset, ctx.tile_size, ctx.ring)
    return *gradients, None, None, None, None


contrastive_sweep.register_autograd(_backward, setup_context=_save)
