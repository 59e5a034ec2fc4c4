"""From positions to examples: read, decode and augment one sample; a damaged one gives its row to the next."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mmpretrain.data.board import ReadingBoard
from mmpretrain.data.events import DataEvent
from mmpretrain.data.fields import DecodeError
from mmpretrain.data.order import Position
from mmpretrain.data.redact import redact
from mmpretrain.data.shards import ChecksumError, Shard
from mmpretrain.data.step import Drawn, Example
from mmpretrain.errors import InputError

Field = Callable[[Mapping[str, Any], torch.Generator], Any]
"""The bytes of a sample -> one modality of an example: a tensor, or a text to be tokenized with its batch."""

ROWS_TRIED, SHARDS_TRIED = 16, 8
"""How far a row looks for a sample that can be read: so many rows of its shard, then of the shards after it."""


class ShardExamples(Dataset[Drawn]):
    """Examples of several sources by (source, position); all randomness comes from (seed, source, epoch, index).

    So an example is the same whichever worker or rank decodes it. A sample that cannot be read, decoded or that lacks
    a field is one `DataEvent`, and its row holds the next sample of the shard instead (after the last comes the first,
    after some tries the next shard): which one depends on nothing but the position, so batches keep their size and
    runs stay repeatable.

    `sizes`: source -> how many samples of each of its shards are used. `board`: where the sample being read is noted.
    Raises `InputError` where all samples tried for a row are bad.
    """

    def __init__(
        self,
        fields: Mapping[str, Mapping[str, Field]],
        shards: Mapping[str, Sequence[Shard]],
        sizes: Mapping[str, Sequence[int]],
        seed: int,
        board: ReadingBoard,
    ) -> None:
        self.fields = {name: dict(found) for name, found in fields.items()}
        self.shards, self.seed, self.board = {name: list(found) for name, found in shards.items()}, seed, board
        self.sizes = {name: np.asarray(found, dtype=np.int64) for name, found in sizes.items()}
        self.ends = {name: np.cumsum(found) for name, found in self.sizes.items()}
        self.names = {name: short_names([redact(shard.name) for shard in found]) for name, found in self.shards.items()}

    def __getitem__(self, reference: tuple[str, Position]) -> Drawn:
        """Read, decode and augment the sample of a position, or the nearest after it that can be."""
        source, (epoch, index) = reference
        lost: DataEvent | None = None
        for shard, row in self._candidates(source, index):
            found = self.read(source, shard, row, torch.Generator().manual_seed(self._seed(source, epoch, index)))
            if not isinstance(found, DataEvent):
                key = self.shards[source][shard].keys[row]
                return Drawn(source, f"{self.names[source][shard]}:{key}", found, lost)
            lost = found if lost is None else lost
        assert lost is not None  # there is at least one candidate
        raise InputError(
            f"{redact(lost.shard)}: sample {lost.key!r} and all tried in its place are lost, the first for this: "
            f"{lost.cause}: {lost.detail}; run `mmpretrain shards check` on these shards"
        )

    def read(self, source: str, shard: int, row: int, generator: torch.Generator) -> Example | DataEvent:
        """Return the example of one sample, or why it is lost."""
        self.board.begin(list(self.fields).index(source), shard, row)
        try:
            return self._decode(self.fields[source], self.shards[source][shard], row, generator)
        finally:
            self.board.end()

    def place(self, source: str, index: int) -> tuple[int, int]:
        """Return shard and row of a sample index."""
        shard = int(np.searchsorted(self.ends[source], index, side="right"))
        return shard, index - int(self.ends[source][shard] - self.sizes[source][shard])

    def _decode(
        self, fields: Mapping[str, Field], shard: Shard, row: int, generator: torch.Generator
    ) -> Example | DataEvent:
        key = shard.keys[row]
        try:
            sample: dict[str, Any] = {"__key__": key, **shard.read(row)}
            example: Example = {}
            for modality, field in fields.items():
                example[modality] = field(sample, generator)
                if isinstance(example[modality], str) and not example[modality].strip():
                    extension = getattr(field, "extension", None)
                    raise DecodeError(f"sample {key!r} has an empty {modality}", "missing", extension)
        except ChecksumError as error:
            return error.event
        except DecodeError as error:
            # PIL names objects by their address, which is another one in every run.
            detail = re.sub(r" at 0x[0-9a-f]+", "", str(error))
            return DataEvent(redact(shard.name), _offset(shard, row, error.field), key, error.cause, detail)
        except OSError as error:
            return DataEvent(redact(shard.name), None, key, "unreadable", str(error))
        return example

    def _candidates(self, source: str, index: int) -> Iterator[tuple[int, int]]:
        """Yield the (shard, row) to try for a sample index, itself first."""
        first, row = self.place(source, index)
        yield first, row  # nearly always all that is asked for
        sizes = self.sizes[source]
        filled = (np.flatnonzero(np.roll(sizes, -first)) + first) % len(sizes)  # from `first` on, around the end
        for shard in filled[:SHARDS_TRIED].tolist():
            for step in range(1 if shard == first else 0, min(ROWS_TRIED, int(sizes[shard]))):
                yield shard, (row + step) % int(sizes[shard])

    def _seed(self, source: str, epoch: int, index: int) -> int:
        text = f"{self.seed}/{source}/{epoch}/{index}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _offset(shard: Shard, row: int, field: str | None) -> int:
    """Return where the bytes of a sample's field begin, or those of the whole sample."""
    index = shard.index
    members = index.rows[index.starts[row] : index.starts[row + 1]].tolist()
    offsets = {index.fields[number]: int(offset) for number, offset, *_ in members}
    return min(offsets.values()) if field is None else offsets.get(field, min(offsets.values()))


def short_names(names: Sequence[str]) -> list[str]:
    """Return shard names relative to the folder that all are in, so that they are the same on every machine."""
    parents = [name.split("/")[:-1] for name in names]
    shared = 0
    for level in zip(*parents):
        if len(set(level)) > 1:
            break
        shared += 1
    return ["/".join(name.split("/")[shared:]) for name in names]
