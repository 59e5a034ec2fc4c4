"""What decides the order of samples, in short: saved with a checkpoint, and compared over ranks and on resuming."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from mmpretrain.data.datamodule import DataModule
from mmpretrain.data.examples import short_names
from mmpretrain.distributed import gather_objects
from mmpretrain.errors import InputError


def fingerprint(data: DataModule) -> dict[str, Any]:
    """Return seed, global batch size, and of each source its mixing and its shards with the samples used of each."""
    return {
        "global_batch_size": data.global_batch_size,
        "seed": data.seed,
        "sources": {
            name: {
                "window": source.window,
                "lanes": source.lanes,
                "weights": source.weights,
                "parts": list(source.parts),
                "shards": [
                    [shard, int(used)]
                    for shard, used in zip(short_names([s.name for s in data.shards[name]]), data.used[name])
                ],
            }
            for name, source in data.sources.items()
        },
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Say what differs between two fingerprints, the first shard of each source that does among it."""
    for name in ("global_batch_size", "seed"):
        if saved[name] != now[name]:
            yield f"{name} was {saved[name]} and is {now[name]}"
    if list(saved["sources"]) != list(now["sources"]):
        yield f"the sources were {list(saved['sources'])} and are {list(now['sources'])}"
        return
    for source, before in saved["sources"].items():
        after = now["sources"][source]
        for name in ("window", "lanes", "weights", "parts"):
            if before[name] != after[name]:
                yield f"{name} of {source} was {before[name]} and is {after[name]}"
        if len(before["shards"]) != len(after["shards"]):
            yield f"{source} had {len(before['shards'])} shards and has {len(after['shards'])}"
            continue
        for (old, had), (new, has) in zip(before["shards"], after["shards"]):
            if (old, had) != (new, has):
                yield f"{source} had {had} samples in {old} and has {has} in {new}"
                break


def check_order(saved: Mapping[str, Any] | None, data: DataModule, allowed: bool) -> None:
    """Raise `InputError` where a run would go on in another order than the one it began in, unless `allowed`."""
    found = [] if saved is None else list(differences(saved, fingerprint(data)))
    if found and not allowed:
        raise InputError(
            f"resume: the order of the samples would be another: {'; '.join(found)}; some would repeat and "
            "others be left out. Give the settings and shards of before, or set allow_new_order=true"
        )


def check_ranks(data: DataModule) -> None:
    """Raise `InputError` on every rank where ranks see different shards; every rank must call it."""
    text = json.dumps(fingerprint(data))
    digests = gather_objects(hashlib.sha256(text.encode()).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise InputError(
            f"rank {other} sees other shards, or other samples in them, than rank 0; give every rank the same shards "
            "(`mmpretrain shards list` on each machine says what it sees)"
        )
