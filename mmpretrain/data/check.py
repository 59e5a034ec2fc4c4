"""Look through a set of shards before training on it: what is lost, missing, unreadable, empty or there twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from PIL import Image as PILImage

from mmpretrain.data.decode import Image, JsonCaption, TextCaption
from mmpretrain.data.shards import ChecksumError, Shard
from mmpretrain.errors import InputError

Hashes = npt.NDArray[np.uint64]
Caption = TextCaption | JsonCaption

PICTURES = ("jpg", "jpeg", "png", "webp", "gif")
CAPTIONS: tuple[Caption, ...] = (TextCaption("txt"), JsonCaption("json", "caption"))
SHOWN = 5
"""Examples kept of each kind of finding."""


class Wanted(NamedTuple):
    """What a sample should have: one of the picture fields, and one of the captions (empty: none wanted)."""

    images: tuple[str, ...] = PICTURES
    captions: tuple[Caption, ...] = CAPTIONS

    def fields(self) -> dict[str, tuple[str, ...]]:
        """Return modality -> the fields of which a sample needs one."""
        wanted = {"image": self.images, "text": tuple(caption.extension for caption in self.captions)}
        return {modality: fields for modality, fields in wanted.items() if fields}


WANTED = Wanted()


class Finding(NamedTuple):
    """One example: the shard, the sample's key (None: the whole shard) and what is wrong in one line."""

    shard: str
    key: str | None
    reason: str


class Tally(NamedTuple):
    """How many of `of` samples (or shards) have a fault, with the first few."""

    faults: int
    of: int
    examples: list[Finding]


class ShardCheck(NamedTuple):
    """What was found in one shard; `lengths` and `words` count captions by the bits of their length."""

    shard: str
    problem: str | None  # why nothing of it can be read
    samples: int
    bytes: int
    lost: int
    causes: Counter[str]  # events of the index and of reading, by cause
    examples: list[Finding]
    fields: Counter[str]
    missing: dict[str, Tally]
    undecodable: dict[str, Tally]
    empty: Tally
    lengths: Counter[int]
    words: Counter[int]
    keys: Hashes  # (samples,)
    contents: Hashes  # (samples,) of the picture, or of the largest field where there is none


def check_shard(name: str, wanted: Wanted = WANTED, decode: int | None = None) -> ShardCheck:
    """Check one shard: everything its index tells, and `decode` samples spread over it (None: all) read and decoded.

    Never raises for damage: a shard that cannot be opened is a check with a `problem`.
    """
    try:
        shard = Shard(name)
    except (InputError, OSError) as error:
        return _unreadable(name, str(error))
    found = _Indexed(shard, wanted)
    examples = [Finding(name, event.key, f"{event.cause}: {event.detail}") for event in shard.events[:SHOWN]]
    read = _Reader(shard, wanted, examples)
    for row in _spread(len(shard), decode):
        read(row)
    return ShardCheck(
        shard=name,
        problem=None,
        samples=len(shard),
        bytes=found.bytes,
        lost=shard.lost + read.causes.total(),
        causes=Counter(event.cause for event in shard.events) + read.causes,
        examples=examples[:SHOWN],
        fields=found.fields,
        missing=found.missing.found,
        undecodable=read.undecodable.found,
        empty=read.empty.found.get("text", Tally(0, 0, [])),
        lengths=read.lengths,
        words=read.words,
        keys=np.array([_hash(key.encode("utf-8", "surrogateescape")) for key in shard.keys], dtype=np.uint64),
        contents=np.array(found.contents, dtype=np.uint64),
    )


def _unreadable(name: str, problem: str) -> ShardCheck:
    none, empty = np.zeros(0, dtype=np.uint64), Tally(0, 0, [])
    of_causes, of_lengths = Counter[str](), Counter[int]()
    return ShardCheck(
        name, problem, 0, 0, 0, of_causes, [], of_causes, {}, {}, empty, of_lengths, of_lengths, none, none
    )


class _Tallies:
    """Counts samples and faults for each modality of one shard."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.found: dict[str, Tally] = {}

    def add(self, modality: str, key: str, fault: str | None) -> None:
        count, of, examples = self.found.get(modality, Tally(0, 0, []))
        if fault is not None and count < SHOWN:
            examples.append(Finding(self.shard, key, fault))
        self.found[modality] = Tally(count + (fault is not None), of + 1, examples)


class _Indexed:
    """What the index of a shard tells of its samples."""

    def __init__(self, shard: Shard, wanted: Wanted) -> None:
        self.bytes, self.fields, self.missing = 0, Counter[str](), _Tallies(shard.name)
        self.contents: list[int] = []
        index = shard.index
        for i, key in enumerate(index.keys):
            rows = index.rows[index.starts[i] : index.starts[i + 1]].tolist()
            members = {index.fields[field]: (size, checksum) for field, _, size, checksum in rows}
            self.bytes += sum(size for size, _ in members.values())
            self.fields.update(members.keys())
            for modality, names in wanted.fields().items():
                absent = not any(field in members for field in names)
                fault = f"has no {' or '.join(names)}, only {', '.join(members)}" if absent else None
                self.missing.add(modality, key, fault)
            largest = max(members.values())
            self.contents.append(next((members[f] for f in wanted.images if f in members), largest)[1])


class _Reader:
    """Reads samples of a shard and keeps what they say; a damaged one is noted in `examples`."""

    def __init__(self, shard: Shard, wanted: Wanted, examples: list[Finding]) -> None:
        self.shard, self.wanted, self.examples = shard, wanted, examples
        self.image = Image(_untouched, wanted.images) if wanted.images else None
        self.undecodable, self.empty = _Tallies(shard.name), _Tallies(shard.name)
        self.lengths, self.words = Counter[int](), Counter[int]()
        self.causes = Counter[str]()

    def __call__(self, row: int) -> None:
        """Read and decode sample `row`."""
        key = self.shard.keys[row]
        try:
            sample = self.shard.read(row)
        except ChecksumError as error:
            self.causes[error.event.cause] += 1
            self.examples.append(Finding(self.shard.name, key, f"{error.event.cause}: {error.event.detail}"))
            return
        picture = next((field for field in self.wanted.images if field in sample), None)
        if self.image is not None and picture is not None:
            self.undecodable.add("image", key, _fault(self.image, sample))
        caption = next((c for c in self.wanted.captions if c.extension in sample), None)
        if caption is not None:
            self._caption(key, caption, sample)

    def _caption(self, key: str, caption: Caption, sample: Mapping[str, bytes]) -> None:
        try:
            texts = caption.captions(sample)
        except InputError as error:
            self.undecodable.add("text", key, _short(error))
            return
        self.undecodable.add("text", key, None)
        empty = any(not text.strip() for text in texts)
        self.empty.add("text", key, f"an empty caption in {caption.extension}" if empty else None)
        self.lengths.update(len(text).bit_length() for text in texts)
        self.words.update(len(text.split()).bit_length() for text in texts)


def _fault(image: Image, sample: Mapping[str, Any]) -> str | None:
    try:
        image.open(sample).close()
    except InputError as error:
        return _short(error)
    return None


def _short(error: Exception) -> str:
    return " ".join(str(error).removeprefix("a sample, ").split())


def _untouched(image: PILImage.Image, generator: torch.Generator) -> torch.Tensor:
    raise NotImplementedError  # only `open` is used


def _hash(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _spread(total: int, count: int | None) -> Sequence[int]:
    """Return `count` of `total` positions at equal distances; all of them for None."""
    if count is None or count >= total:
        return range(total)
    return [i * total // count for i in range(count)]
