"""Which samples make up the global batch of a step: a pure function of seed and step, without I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mmpretrain.errors import InputError

Indices = npt.NDArray[np.int64]


class Position(NamedTuple):
    """One sample of a run: `epoch` counts passes over the data, `index` the samples of all shards in a
    row."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls


class _Epoch(NamedTuple):
    """The shards of one epoch in reading order, and where its windows end in the epoch's stream of
    samples."""

    number: int
    shards: Indices
    window_ends: Indices


class Order:
    """The order of training: shards are shuffled, then samples inside windows of several shards.

    Every epoch visits each sample at most once; the `total % global_batch_size` samples at the end of its
    stream are left out (other ones each epoch when shuffled). Nothing but `seed` and the step decides, so a
    run can be continued at any step with any number of ranks and workers. Memory is O(shards + samples of one
    window).

    `shard_sizes`: samples of each shard. `window`: shards whose samples are mixed, hence also how many a
    reader needs open at a time. `shuffle=False`: the samples one after the other. Raises `InputError` if
    there are fewer samples than `global_batch_size`, or if a number is out of range.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        global_batch_size: int,
        seed: int,
        shuffle: bool = True,
        window: int = 16,
    ) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64).reshape(-1)
        total = int(sizes.sum())
        for name, value, least in (
            ("global_batch_size", global_batch_size, 1),
            ("window", window, 1),
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
        self.steps_per_epoch = total // global_batch_size
        self._sizes = sizes
        self._starts: Indices = np.cumsum(sizes) - sizes
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._window = window
        # The last epoch and window asked for. Steps are mostly asked for in order, so one of each is enough.
        self._epoch: _Epoch | None = None
        self._samples: tuple[int, int, Indices] | None = None

    def batch(self, step: int) -> list[Position]:
        """Return the global batch of `step` (from 0); rank r, of b samples each, takes [r*b:(r+1)*b]."""
        if step < 0:
            raise InputError(f"step is {step}; expected at least 0")
        number, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self._global_batch_size
        stop = start + self._global_batch_size
        epoch = self._epoch_of(number)
        window = int(np.searchsorted(epoch.window_ends, start, side="right"))
        positions: list[Position] = []
        while start < stop:
            samples = self._samples_of(epoch, window)
            window_end = int(epoch.window_ends[window])
            offset = len(samples) - window_end  # from a place in the epoch's stream to a place in this window
            end = min(stop, window_end)
            positions += [Position(number, index) for index in samples[start + offset : end + offset].tolist()]
            start, window = end, window + 1
        return positions

    def _epoch_of(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != number:
            count = len(self._sizes)
            shards = self._permutation(count, number, 0) if self._shuffle else np.arange(count)
            last_of_window = np.minimum(np.arange(self._window, count + self._window, self._window), count) - 1
            self._epoch = _Epoch(number, shards, np.cumsum(self._sizes[shards])[last_of_window])
        return self._epoch

    def _samples_of(self, epoch: _Epoch, window: int) -> Indices:
        """Return the sample indices of one window in the order they are trained on."""
        cached = self._samples
        if cached is not None and cached[:2] == (epoch.number, window):
            return cached[2]
        shards = epoch.shards[window * self._window : (window + 1) * self._window]
        samples = np.concatenate([np.arange(self._starts[s], self._starts[s] + self._sizes[s]) for s in shards])
        if self._shuffle:
            samples = samples[self._permutation(len(samples), epoch.number, window + 1)]
        self._samples = (epoch.number, window, samples)
        return samples

    def _permutation(self, count: int, epoch: int, stream: int) -> Indices:
        """Return a permutation of `count` that depends on seed, epoch and stream only.

        Raw Philox words are sorted because NumPy keeps those the same in every version, and
        `Generator.permutation` not.
        """
        entropy = np.random.SeedSequence(self._seed, spawn_key=(epoch, stream))
        words = np.random.Philox(entropy).random_raw(count)
        return np.argsort(words, kind="stable").astype(np.int64, copy=False)
