"""Which samples make up the global batch of a step: a pure function of seed and step, without I/O.

docs/data-order.md has the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mmpretrain.errors import InputError

Indices = npt.NDArray[np.int64]

ROWS_PER_LANE = 16
"""A batch takes at least so many rows of a lane: going from shard to shard for fewer costs more than reading them."""


class Position(NamedTuple):
    """One sample of a run: `epoch` counts passes over the data, `index` the samples of all shards in a row."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls


class Ordering(Protocol):
    """What decides the samples of every step: `Order`, or `Mixture` of several."""

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> list[Position]:
        """Return rows [start:stop] of the global batch of `step`, both counted from 0."""

    def shards(self, step: int, start: int = 0, stop: int | None = None) -> list[int]:
        """Return the indices of the shards that rows [start:stop] of `step` lie in, ascending."""


class _Epoch(NamedTuple):
    """The shards of one epoch in reading order, and the row of samples that they make."""

    number: int
    shards: Indices
    ends: Indices  # where each of these shards ends in the row
    first: Indices  # lane -> place in `shards` of the lane's first shard


class _Window(NamedTuple):
    """Places [low:high] of an epoch's row, which one lane gives in the order low + permutation."""

    epoch: int
    low: int
    high: int
    permutation: npt.NDArray[np.uint32]


class Order:
    """The order of training: shards are shuffled and dealt to lanes, then samples inside windows of shards.

    Every epoch lays its shuffled shards in a row and cuts the row into equal lanes; each batch takes the same number
    of samples from every lane, lane after lane, so a rank that owns rows of the batch owns lanes and their shards.
    There are as many lanes as divide the batch, up to `lanes`, as long as each has `window` shards and 16 rows of a
    batch; small data has one. An epoch gives each sample at most once; fewer than `global_batch_size` are left out
    (other ones each epoch). Nothing but `seed` and the step decides, so a run can go on at any step with any number of
    ranks and workers. Memory is O(shards + samples of the windows of the lanes asked for).

    `shard_sizes`: samples of each shard. `window`: shards whose samples are mixed, over all lanes (at least one each).
    `shuffle=False`: the samples one after the other. Raises `InputError` if there are fewer samples than
    `global_batch_size`, or if a number is out of range.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        global_batch_size: int,
        seed: int,
        shuffle: bool = True,
        window: int = 16,
        lanes: int = 256,
    ) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64).reshape(-1)
        total = int(sizes.sum())
        for name, value, least in (
            ("global_batch_size", global_batch_size, 1),
            ("window", window, 1),
            ("lanes", lanes, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise InputError(f"{name} is {value}; expected at least {least}")
        if len(sizes) and int(sizes.min()) < 0:
            raise InputError(f"shard_sizes holds {int(sizes.min())}; expected sample counts of at least 0")
        if total < global_batch_size:
            raise InputError(
                f"{total} samples in {len(sizes)} shards cannot fill a global batch of {global_batch_size}; "
                "give more shards or lower the batch size"
            )
        most = min(lanes, int(np.count_nonzero(sizes)) // window, global_batch_size // ROWS_PER_LANE) if shuffle else 1
        self.lanes = max(n for n in range(1, max(1, most) + 1) if global_batch_size % n == 0)
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = total // global_batch_size
        self._sizes, self._ends = sizes, np.cumsum(sizes)
        self._bounds: Indices = np.arange(self.lanes + 1) * total // self.lanes  # of the lanes in every epoch's row
        self._seed, self._shuffle = seed, shuffle
        self._window = max(1, window // self.lanes)  # shards of one lane's window
        # The last epoch asked for, and of each lane the last window. Steps are mostly asked for in order.
        self._epoch: _Epoch | None = None
        self._windows: dict[int, _Window] = {}

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> list[Position]:
        """Return rows [start:stop] of the global batch of `step` (from 0); rank r, of b rows each, takes [r*b:(r+1)*b].

        Costs O(rows + their lanes). Raises `InputError` for a negative step or rows that the batch does not have.
        """
        epoch, indices = self._rows(step, start, stop)
        return [Position(epoch, index) for index in indices.tolist()]

    def shards(self, step: int, start: int = 0, stop: int | None = None) -> list[int]:
        """Return the indices of the shards that rows [start:stop] of `step` lie in, ascending."""
        _, indices = self._rows(step, start, stop)
        found: list[int] = np.unique(np.searchsorted(self._ends, indices, side="right")).tolist()
        return found

    def _rows(self, step: int, start: int, stop: int | None) -> tuple[int, Indices]:
        """Return the epoch of `step` and the sample indices of its rows [start:stop]."""
        stop = self.global_batch_size if stop is None else stop
        check_rows(step, start, stop, self.global_batch_size)
        number, step_in_epoch = divmod(step, self.steps_per_epoch)
        epoch = self._epoch_of(number)
        per_lane = self.global_batch_size // self.lanes
        places = [np.zeros(0, dtype=np.int64)]
        while start < stop:
            lane, row = divmod(start, per_lane)
            count = min(per_lane - row, stop - start)
            places += self._places(epoch, lane, step_in_epoch * per_lane + row, count)
            start += count
        # From places in the epoch's row to samples: the shard that a place lies in, and how far from its end.
        row_places = np.concatenate(places)
        which = np.searchsorted(epoch.ends, row_places, side="right")
        return number, self._ends[epoch.shards[which]] - epoch.ends[which] + row_places

    def _places(self, epoch: _Epoch, lane: int, begin: int, count: int) -> list[Indices]:
        """Return the places in the epoch's row of samples [begin:begin + count] of a lane's stream, in pieces."""
        place = int(self._bounds[lane]) + begin
        end = place + count
        pieces = []
        while place < end:
            window = self._window_at(epoch, lane, place)
            upto = min(end, window.high)
            drawn = window.permutation[place - window.low : upto - window.low]
            pieces.append(drawn.astype(np.int64) + window.low)
            place = upto
        return pieces

    def _window_at(self, epoch: _Epoch, lane: int, place: int) -> _Window:
        """Return the window of a lane that covers a place of the epoch's row."""
        cached = self._windows.get(lane)
        if cached is not None and cached.epoch == epoch.number and cached.low <= place < cached.high:
            return cached
        first = int(epoch.first[lane])
        number = (int(np.searchsorted(epoch.ends, place, side="right")) - first) // self._window
        begin = first + number * self._window
        last = min(begin + self._window, len(epoch.shards)) - 1
        low = max(int(self._bounds[lane]), int(epoch.ends[begin] - self._sizes[epoch.shards[begin]]))
        high = min(int(self._bounds[lane + 1]), int(epoch.ends[last]))
        # Lane 0 adds no number of its own: with one lane the streams are those of the order before there were lanes.
        stream = (number + 1, lane) if lane else (number + 1,)
        permutation = self._permutation(high - low, epoch.number, *stream) if self._shuffle else np.arange(high - low)
        self._windows[lane] = _Window(epoch.number, low, high, permutation.astype(np.uint32))
        return self._windows[lane]

    def _epoch_of(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != number:
            count = len(self._sizes)
            shards = self._permutation(count, number, 0) if self._shuffle else np.arange(count)
            ends = np.cumsum(self._sizes[shards])
            first = np.searchsorted(ends, self._bounds[:-1], side="right")
            first[0] = 0  # even where that shard is empty: windows are counted from it
            self._epoch = _Epoch(number, shards, ends, first)
        return self._epoch

    def _permutation(self, count: int, epoch: int, *stream: int) -> Indices:
        """Return a permutation of `count` that depends on seed, epoch and stream only.

        Raw Philox words are sorted because NumPy keeps those the same in every version, and `Generator.permutation`
        not.
        """
        entropy = np.random.SeedSequence(self._seed, spawn_key=(epoch, *stream))
        words = np.random.Philox(entropy).random_raw(count)
        return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def check_rows(step: int, start: int, stop: int, global_batch_size: int) -> None:
    """Raise `InputError` for a step or for rows [start:stop] that no batch has."""
    if step < 0:
        raise InputError(f"step is {step}; expected at least 0")
    if not 0 <= start <= stop <= global_batch_size:
        raise InputError(f"rows {start} to {stop} asked of a global batch of {global_batch_size}")
