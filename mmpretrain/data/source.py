"""A source: shards of one kind, or a weighted mixture of them, and the fields that decode their samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mmpretrain.data.examples import Field
from mmpretrain.data.mixture import Mixture
from mmpretrain.data.order import Order, Ordering
from mmpretrain.data.redact import redact, redact_text
from mmpretrain.data.shards import Shard, expand
from mmpretrain.errors import InputError

Pattern = str | Sequence[str]
"""Paths with braces, folders or URLs."""


class Source:
    """One kind of data: its shards, the fields that decode a sample, and how its order is mixed.

    `shards`: a pattern, or name -> pattern for a mixture, whose parts share every batch by `weights` (name -> weight;
    default: by their numbers of samples). `fields`: modality -> field. `window`: shards mixed at a time. `lanes`: see
    `Order`. Raises `InputError` for weights without parts of the same names.
    """

    def __init__(
        self,
        shards: Pattern | Mapping[str, Pattern],
        fields: Mapping[str, Field],
        window: int = 16,
        weights: Mapping[str, float] | None = None,
        lanes: int = 256,
    ) -> None:
        self.parts: dict[str, Pattern] = dict(shards) if isinstance(shards, Mapping) else {"": shards}
        if weights is not None and set(weights) != set(self.parts):
            raise InputError(
                f"data.weights names {sorted(weights)}, data.train {sorted(name for name in self.parts if name)}; "
                "give each named part of data.train one weight"
            )
        self.shards, self.fields, self.weights = shards, dict(fields), None if weights is None else dict(weights)
        self.window, self.lanes = window, lanes


class Opened:
    """A source's shards, opened: those of all parts in a row, and how many samples of each are used.

    `limit`: only the first so many samples of each part. Raises `InputError` for missing shards, shards without
    samples, and more than `max_bad_fraction` of the samples known to be lost.
    """

    def __init__(self, name: str, source: Source, limit: int | None, max_bad_fraction: float) -> None:
        self.source = source
        self.shards: list[Shard] = []
        self.parts: dict[str, list[int]] = {}  # part -> samples used of each of its shards
        for part, pattern in source.parts.items():
            shards = [Shard(path) for path in expand(pattern)]
            sizes = np.array([len(shard) for shard in shards])
            if not sizes.any():
                raise InputError(
                    f"the {len(sizes)} shards of {redact_text(repr(pattern))} hold no sample; give shards with samples"
                )
            if limit is not None:
                sizes = np.clip(limit - (np.cumsum(sizes) - sizes), 0, sizes)
            self.parts[part] = sizes.tolist()
            self.shards += shards
        self.sizes = [size for sizes in self.parts.values() for size in sizes]
        self._check_lost(name, max_bad_fraction)

    def order(self, global_batch_size: int, seed: int) -> Ordering:
        """Return the order of the source's samples; raises `InputError`, with the shards' names, as `Order` does."""
        source = self.source
        try:
            if isinstance(source.shards, Mapping):
                return Mixture(self.parts, source.weights, global_batch_size, seed, source.window, source.lanes)
            return Order(self.sizes, global_batch_size, seed, window=source.window, lanes=source.lanes)
        except InputError as error:
            raise InputError(f"{redact_text(str(source.shards))}: {error}") from error

    def probes(self, count: int) -> list[list[int]]:
        """Return for each part the indices of up to `count` samples, evenly spread over it."""
        found, first = [], 0
        for sizes in self.parts.values():
            total = sum(sizes)
            few = min(count, total)
            found.append([first + i * total // few for i in range(few)])
            first += total
        return found

    def _check_lost(self, name: str, max_bad_fraction: float) -> None:
        lost = sum(shard.lost for shard in self.shards)
        samples = sum(map(len, self.shards))
        if lost <= max_bad_fraction * (samples + lost):
            return
        worst = max(self.shards, key=lambda shard: shard.lost / (len(shard) + shard.lost))
        causes = Counter(event.cause for shard in self.shards if shard.lost for event in shard.events)
        named = ", ".join(f"{cause} {count}" for cause, count in sorted(causes.items()))
        raise InputError(
            f"{name}: {lost} of {samples + lost} samples are lost to damage ({named}), more than "
            f"data.max_bad_fraction={max_bad_fraction:g}; worst is {redact(worst.name)} with {worst.lost} of "
            f"{len(worst) + worst.lost}: write it again, or raise data.max_bad_fraction"
        )
