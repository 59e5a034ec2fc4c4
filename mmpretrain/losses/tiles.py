"""A matrix of similarities that never exists as a whole: its tiles, and the blocks of columns that a rank meets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mmpretrain.distributed import rank, rotate, world_size
from mmpretrain.errors import InputError

Exchange = Literal["gather", "ring"]
"""How a rank meets the columns of the others: all at once, or a block at a time as they travel around the ranks."""

CPU_TILE, GPU_TILE = 1024, 2048
"""Two float32 tiles fit the cache of a CPU; on a GPU larger ones hide what starting a kernel costs."""


def tile_size_for(device: torch.device, tile_size: int | None) -> int:
    """Choose the rows and columns of a tile: as asked, or the default of the device."""
    return tile_size or (CPU_TILE if device.type == "cpu" else GPU_TILE)


def check_tiles(tile_size: int | None, exchange: str) -> None:
    """Raise `InputError` for what no tile or exchange can be."""
    if tile_size is not None and tile_size < 1:
        raise InputError(f"tile_size is {tile_size}; give at least 1, or null to let the loss choose")
    if exchange not in get_args(Exchange):
        raise InputError(f'exchange is {exchange!r}; give "gather" or "ring"')


def check_rows(a: Tensor, b: Tensor, identities: Tensor | None, ring: bool) -> None:
    """Raise `InputError` where the rows of a (B,E) and b, all columns (G,E) or with `ring` (B,E), are no pairs."""
    everyone = len(a) * world_size()
    expected = len(a) if ring else everyone
    if len(b) != expected:
        raise InputError(
            f"loss has {len(a)} rows on each of {world_size()} ranks against {len(b)} columns, expected {expected}; "
            + ("give a and b row by row in pairs" if ring else "give the columns of all ranks, one for each row")
        )
    if identities is not None and len(identities) != everyone:
        raise InputError(f"loss has {len(identities)} identities for {everyone} rows; give those of all ranks")


def check_first_derivative(use: str) -> None:
    """Raise `InputError` in a backward pass that is itself to be differentiated; `use` says what can be.

    The gradients come out of operators that autograd does not see into: it would take them for constants.
    """
    if torch.is_grad_enabled():
        raise InputError(
            f"this loss has first derivatives only, and its gradient was asked for with create_graph=True; use {use}"
        )


class Tile(NamedTuple):
    """`rows` of a against `columns` of a block; the tile's row i has its own column at `diagonal + i`."""

    rows: slice
    columns: slice
    diagonal: int

    def view(self, buffer: Tensor) -> Tensor:
        """Shape the first part of a flat buffer as this tile, which is contiguous at the edges of the matrix too."""
        height, width = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return buffer[: height * width].view(height, width)

    def own(self, values: Tensor) -> tuple[slice, Tensor]:
        """Find the rows of a whose own column lies in the tile, and view those elements."""
        elements = values.diagonal(self.diagonal)
        first = self.rows.start + max(0, -self.diagonal)
        return slice(first, first + len(elements)), elements


def tiles(rows: int, columns: int, size: int, shift: int) -> Iterator[Tile]:
    """Cut (rows,columns) into tiles; row i's own column is `shift + i`, if there is one."""
    for i in range(0, rows, size):
        for j in range(0, columns, size):
            height, width = min(size, rows - i), min(size, columns - j)
            # Where the diagonal misses the tile, any place just outside it will do.
            diagonal = max(-height, min(width, shift + i - j))
            yield Tile(slice(i, i + height), slice(j, j + width), diagonal)


def buffers(a: Tensor, b: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Allocate two tiles, for `Tile.view`."""
    elements = min(size, len(a)) * min(size, len(b))
    return a.new_empty(elements), a.new_empty(elements)


def inner_product(x: Tensor, y: Tensor, size: int) -> Tensor:
    """Sum up the elementwise product of two (B,E) without holding it: `size` rows at a time."""
    parts = [torch.linalg.vecdot(*rows).sum() for rows in zip(torch.split(x, size), torch.split(y, size), strict=True)]
    return torch.stack(parts).sum()


class Blocks:
    """The blocks of columns this rank meets, in turn: one block of all, or each rank's as they travel the ring.

    `travelling` tensors go with the block they belong to, and are home again after the last one.
    """

    def __init__(self, ring: bool, *travelling: Tensor) -> None:
        self.ring, self.travelling = ring, list(travelling)

    def __iter__(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield where the block begins among all columns, and its tensors."""
        if not self.ring:
            yield 0, self.travelling
            return
        for hop in range(world_size()):
            yield (rank() - hop) % world_size() * len(self.travelling[0]), self.travelling
            self.travelling = rotate(*self.travelling)
