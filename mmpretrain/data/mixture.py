"""Several data sets in one batch, by weight: a pure function of seed and step, without I/O."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mmpretrain.data.order import Indices, Order, Position, check_rows
from mmpretrain.errors import InputError


class Mixture:
    """Named parts in every global batch, each with a constant number of rows and an `Order` and epochs of its own.

    `parts`: name -> samples of each of its shards; a `Position`'s index counts the samples of all parts in a row.
    `weights`: name -> weight, by default each part's number of samples. The rows of a batch are shared out in
    proportion, the ones left over going to the largest remainders. The rows of a part are spread evenly over the
    batch, so that every rank's contiguous rows hold its share of each part, and the part's lanes stay with the rank
    but for those at its edges. Raises `InputError` where weights and parts do not fit together, or a part is too small.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[int]],
        weights: Mapping[str, float] | None,
        global_batch_size: int,
        seed: int,
        window: int = 16,
        lanes: int = 256,
    ) -> None:
        totals = {name: int(np.sum(sizes)) for name, sizes in parts.items()}
        self.counts = shares(totals if weights is None else weights, list(parts), global_batch_size)
        self.global_batch_size = global_batch_size
        self.orders: dict[str, Order] = {}
        for name, sizes in parts.items():
            # A part's own seed: parts of like sizes must not be walked in the same order.
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            try:
                order = Order(sizes, self.counts[name], int.from_bytes(digest, "little"), window=window, lanes=lanes)
            except InputError as error:
                raise InputError(f"part {name!r} of a mixture: {error}") from error
            self.orders[name] = order
        self._first_sample = np.cumsum([0, *totals.values()]).tolist()
        self._first_shard = np.cumsum([0, *(len(sizes) for sizes in parts.values())]).tolist()
        self._part_of_row = _spread(list(self.counts.values()))

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> list[Position]:
        """Return rows [start:stop] of the global batch of `step` (from 0); see `Order.batch`."""
        rows, ranges = self._ranges(step, start, stop)
        drawn = []
        for order, first, (low, high) in zip(self.orders.values(), self._first_sample, ranges):
            drawn.append(iter([Position(p.epoch, first + p.index) for p in order.batch(step, low, high)]))
        return [next(drawn[part]) for part in rows.tolist()]

    def shards(self, step: int, start: int = 0, stop: int | None = None) -> list[int]:
        """Return the indices of the shards, of all parts in a row, that rows [start:stop] of `step` lie in."""
        _, ranges = self._ranges(step, start, stop)
        parts = zip(self.orders.values(), self._first_shard, ranges)
        return [first + shard for order, first, (low, high) in parts for shard in order.shards(step, low, high)]

    def _ranges(self, step: int, start: int, stop: int | None) -> tuple[Indices, list[tuple[int, int]]]:
        """Return the part of each row [start:stop], and which rows of each part's own batch these are."""
        stop = self.global_batch_size if stop is None else stop
        check_rows(step, start, stop, self.global_batch_size)
        rows = self._part_of_row[start:stop]
        before = np.bincount(self._part_of_row[:start], minlength=len(self.orders))
        inside = np.bincount(rows, minlength=len(self.orders))
        return rows, list(zip(before.tolist(), (before + inside).tolist()))


def shares(weights: Mapping[str, float], parts: Sequence[str], global_batch_size: int) -> dict[str, int]:
    """Return how many rows of a batch each part has: its weight's share, rounded by largest remainder."""
    if not parts or set(weights) != set(parts):
        raise InputError(f"weights name {sorted(weights)}, the parts are {sorted(parts)}; give each part one weight")
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight > 0):
            raise InputError(f"the weight of {name!r} is {weight!r}; give a number above 0, or leave the part out")
    total = math.fsum(weights.values())
    exact = [global_batch_size * weights[name] / total for name in parts]
    counts = [math.floor(share) for share in exact]
    # Equal remainders go to the part named first: `sorted` is stable.
    largest = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
    for i in largest[: global_batch_size - sum(counts)]:
        counts[i] += 1
    for name, count in zip(parts, counts):
        if count == 0:
            raise InputError(
                f"part {name!r} of weight {weights[name]:g} (of {total:g}) gets no row of a global batch of "
                f"{global_batch_size}; raise its weight or the batch size, or leave the part out"
            )
    return dict(zip(parts, counts))


def _spread(counts: Sequence[int]) -> Indices:
    """Return the part of each row: row m of a part with c rows stands at (m + 1/2) / c of the batch."""
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    parts = np.repeat(np.arange(len(counts)), counts)
    return parts[np.argsort(places, kind="stable")]
