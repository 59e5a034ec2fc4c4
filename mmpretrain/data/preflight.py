"""What is said of a source at the start of training, from its indexes alone: no picture or caption is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mmpretrain.data.check_report import share_of
from mmpretrain.data.shards import Shard

SHARDS, ROWS = 64, 256
"""Fields are looked at in at most so many shards, and samples of each: a second, however large the set."""

Field = Callable[[Mapping[str, Any], torch.Generator], Any]


def summary(
    source: str,
    shards: Sequence[Shard],
    samples: int,
    fields: Mapping[str, Field],
    global_batch_size: int,
    ranks: int,
    workers: int,
) -> list[str]:
    """Return one line on a source of `samples` used samples, and one more for each thing that is odd about it."""
    share = share_of(samples, global_batch_size, ranks, workers)
    line = f"{source}: {samples} samples in {len(shards)} shards, {share.steps} steps an epoch"
    if ranks * max(1, workers) > 1:
        line += f", a worker's smallest share {share.batches} batches of {share.batch_size}"
    return [line, *_lost(source, shards), *_missing(source, shards, fields)]


def extensions(field: Field) -> tuple[str, ...]:
    """Return the extensions of which a field reads one; nothing for a field that does not say."""
    several, one = getattr(field, "extensions", None), getattr(field, "extension", None)
    return tuple(several) if several is not None else (() if one is None else (one,))


def _lost(source: str, shards: Sequence[Shard]) -> Iterator[str]:
    lost = sum(shard.lost for shard in shards)
    if lost:
        causes = sum((Counter(event.cause for event in shard.events) for shard in shards if shard.lost), Counter[str]())
        named = ", ".join(f"{cause} {count}" for cause, count in sorted(causes.items()))
        first = next(shard.name for shard in shards if shard.lost)
        yield f"{source}: {lost} samples are lost to damage ({named}), the first in {first}"


def _missing(source: str, shards: Sequence[Shard], fields: Mapping[str, Field]) -> Iterator[str]:
    """Say of each modality which samples looked at lack its field: training counts them as lost."""
    for field in fields.values():
        wanted = set(extensions(field))
        looked, lacking = 0, list[str]()
        for shard in _few(shards, SHARDS) if wanted else ():
            for row in _few(range(len(shard)), ROWS):
                looked += 1
                if wanted.isdisjoint(shard.fields(row)):
                    lacking.append(f"{shard.name}:{shard.keys[row]}")
        if lacking:
            names = " or ".join(extensions(field))
            yield f"{source}: {len(lacking)} of {looked} samples looked at have no {names}, the first is {lacking[0]}"


def _few(items: Sequence[Any], count: int) -> Sequence[Any]:
    """Return `count` items at equal distances, or all where there are no more."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]
