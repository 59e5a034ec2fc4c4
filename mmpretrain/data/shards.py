"""Shards: tar files of samples, found by pattern, fetched when remote, and read in place by index."""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mmpretrain.data import index as tar_index
from mmpretrain.data.cache import REMOTE, cache_folder, cache_name, fetch, fetch_index, scheme_of
from mmpretrain.data.events import DataEvent
from mmpretrain.data.patterns import expand as expand
from mmpretrain.data.redact import redact
from mmpretrain.data.tar import DamageError
from mmpretrain.errors import InputError


class ChecksumError(InputError):
    """A sample whose bytes are not those that the index was made from, or cannot be read; `event` says which."""

    def __init__(self, event: DataEvent) -> None:
        super().__init__(f"{event.shard} at byte {event.offset}, sample {event.key!r}: {event.detail}")
        self.event = event

    def __reduce__(self) -> tuple[type[ChecksumError], tuple[DataEvent]]:
        return type(self), (self.event,)


class Shard:
    """One shard with random access: `len(shard)` samples, `shard.read(i)` the bytes of sample i by field.

    A remote shard is fetched at construction, or when first read if its index lies beside it (`<url>.idx.npz`); the
    `name` of one is its URL without secrets. The index of a local one is kept as `<shard>.idx.npz` beside it, or in
    the cache folder if that place is read-only, and made again when the shard's size or time changed. Damage costs
    the samples it touches: `events` lists them, `lost` counts them. Members of one key make one sample wherever they
    lie in the tar. Holds and pickles only names and counts; indexes are loaded when needed, and the most recently
    used stay in memory. Raises `InputError` for a missing shard and `DamageError` (an `InputError`) for one that is
    no tar, or of which no sample can be read.
    """

    def __init__(self, path_or_url: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> None:
        self._origin = _Origin.find(os.fspath(path_or_url), cache_dir)
        self.url, self.name, self.path = self._origin.url, self._origin.name, self._origin.path
        heads = (tar_index.load_head(place, self._origin.stamp) for place in self._origin.places())
        head = next((head for head in heads if head is not None), None)
        self._count, self.lost, self._losses, self.digest = _index_of(self._origin).head() if head is None else head

    def __len__(self) -> int:
        return self._count

    @property
    def index(self) -> tar_index.Index:
        """Where every sample lies; raises `InputError` if it has to be made anew and the shard changed since."""
        return _index_of(self._origin)

    @property
    def keys(self) -> Sequence[str]:
        """The keys of the samples, in file order."""
        return self.index.keys

    @property
    def events(self) -> list[DataEvent]:
        """What was found lost when the index was made."""
        return list(self.index.events) if self._losses else []  # most shards have none: their index can wait

    def fields(self, i: int) -> list[str]:
        """Return the fields of sample i in file order."""
        return list(self.sizes(i))

    def sizes(self, i: int) -> dict[str, int]:
        """Return the size in bytes of each field of sample i, without reading them."""
        index = self.index
        return {index.fields[field]: size for field, _, size, _ in self._rows(index, i)}

    def read(self, i: int) -> dict[str, bytes]:
        """Return the bytes of each field of sample i; raises `ChecksumError` where they are not as indexed."""
        index = self.index
        rows = self._rows(index, i)
        return _read(_opened(self._origin), index, index.keys[i], rows, {})

    def _rows(self, index: tar_index.Index, i: int) -> list[list[int]]:
        """Return [field, offset, size, checksum] of each member of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {self.name}, which has {len(self)}")
        rows: list[list[int]] = index.rows[index.starts[i] : index.starts[i + 1]].tolist()
        return rows


def iter_shard(path: str | os.PathLike[str], events: list[DataEvent] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the samples in file order: "__key__" (str) and raw bytes by field.

    A damaged sample is left out; each loss is appended to `events`. Raises as `Shard` does.
    """
    shard = Shard(path)
    losses = [] if events is None else events
    losses += shard.events
    index, file = shard.index, _opened(shard._origin)
    for begin in range(0, len(shard), _PART):
        starts = index.starts[begin : begin + _PART + 1].tolist()
        rows = index.rows[starts[0] : starts[-1]].tolist()
        first = starts[0]
        for key, start, end in zip(index.keys[begin : begin + _PART], starts, starts[1:]):
            try:
                yield _read(file, index, key, rows[start - first : end - first], {"__key__": key})
            except ChecksumError as error:
                losses.append(error.event)


_PART = 1024  # samples whose rows are plain numbers at one time


class _Origin(NamedTuple):
    """The file of a shard, and the state it was opened in; `name` is what may be shown of `url`."""

    url: str
    name: str
    path: Path
    cache: Path
    stamp: tuple[int, int]

    @classmethod
    def find(cls, url: str, cache_dir: str | os.PathLike[str] | None) -> _Origin:
        """Find the file; that of a remote shard need not have been fetched where its index is known."""
        folder, remote = cache_folder(cache_dir), scheme_of(url) in REMOTE
        beside = fetch_index(url, cache_dir) if remote else None
        stamp = None if beside is None else tar_index.stamp_in(beside)
        if stamp is not None:
            return cls(url, redact(url), folder / cache_name(url), folder, stamp)
        path = fetch(url, cache_dir)
        return cls(url, redact(url) if remote else url, path, folder, tar_index.stamp_of(path))

    def places(self) -> tuple[Path, Path]:
        """Return where the index may lie: beside the shard, or in the cache."""
        digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:16]
        return (
            self.path.with_name(f"{self.path.name}.idx.npz"),
            self.cache / f"{digest}-{self.path.name}.idx.npz",
        )

    def check(self, exact: bool = False) -> None:
        """Raise `InputError` if the file has another size than when it was opened; a remote one is fetched if gone.

        `exact`: also if a local one has another time. Who reads leaves that to the checksums: one sample is lost.
        """
        now = tar_index.stamp_of(fetch(self.url, self.cache))
        # What is fetched a second time may have another time; its bytes are compared with their checksums.
        remote = scheme_of(self.url) in REMOTE
        if remote and now[0] != self.stamp[0]:
            raise InputError(
                f"{self.name} has {now[0]} bytes, its index is of one of {self.stamp[0]}; put the index made of this "
                f"shard beside it (`mmpretrain shards index`), and give a changed shard a new name"
            )
        if not remote and (now != self.stamp if exact else now[0] != self.stamp[0]):
            raise InputError(f"{self.path} changed since it was opened; leave shards alone while they are read")


class _File:
    """An open shard, closed with its last user."""

    def __init__(self, origin: _Origin) -> None:
        origin.check()
        self.origin = origin
        self.handle = os.open(origin.path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


# Each open file takes a descriptor, of which a process has about a thousand; shards may be more.
_opened = functools.lru_cache(maxsize=64)(_File)


def _read(file: _File, index: tar_index.Index, key: str, rows: list[list[int]], into: dict[str, Any]) -> dict[str, Any]:
    """Add the bytes of each field to `into`. Read, not mapped: a file cut short meanwhile would kill the process."""
    for field, offset, size, checksum in rows:
        try:
            data = os.pread(file.handle, size, offset)
            if len(data) < size:
                data += _rest(file.handle, size - len(data), offset + len(data))
        except OSError as error:
            detail = f"{index.fields[field]} cannot be read: {error.strerror}"
            raise ChecksumError(DataEvent(file.origin.name, offset, key, "unreadable", detail)) from error
        if xxhash.xxh3_64_intdigest(data) != checksum:
            file.origin.check()
            detail = f"{index.fields[field]} has other bytes than the index knows; restore the shard"
            raise ChecksumError(DataEvent(file.origin.name, offset, key, "checksum", detail))
        into[index.fields[field]] = data
    return into


def _rest(handle: int, size: int, offset: int) -> bytes:
    """Read on where one call gave less than asked for: it gives 2 GB at most, and nothing behind the end."""
    parts = []
    while size and (part := os.pread(handle, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)


# An index takes about 100 bytes a member: some stay in memory, the others are read again when needed.
@functools.lru_cache(maxsize=64)
def _index_of(origin: _Origin) -> tar_index.Index:
    """Load the index of a shard, or make and keep it."""
    places = origin.places()
    for place in places:
        if (known := tar_index.load(place, origin.name, origin.stamp)) is not None:
            return known
    before = next((old for place in places if (old := tar_index.load(place, origin.name, None)) is not None), None)
    made = _build(origin, before)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            tar_index.save(made, place)
        except OSError:  # read-only or full: an index is a convenience, the next run makes it again
            continue
        break
    return made


def _build(origin: _Origin, before: tar_index.Index | None) -> tar_index.Index:
    origin.check(exact=True)
    try:
        made = _walk(origin, before)
    except DamageError:
        if scheme_of(origin.url) in REMOTE:
            origin.path.unlink(missing_ok=True)  # so that a repaired one is fetched
        raise
    origin.check(exact=True)
    return made


def _walk(origin: _Origin, before: tar_index.Index | None) -> tar_index.Index:
    name, stamp = origin.name, origin.stamp
    if stamp[0] == 0:
        raise DamageError(name, 0, "the file is empty; copy or write it again")
    with origin.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        data.madvise(mmap.MADV_SEQUENTIAL)
        made = tar_index.build(data, name, stamp, before)
    if not made.keys:
        at, why = 0, "files named key.field, such as 0001.jpg, are expected"
        if made.events:
            at, why = made.events[0].offset or 0, made.events[0].detail
        raise DamageError(name, at, f"no sample can be read: {why}")
    return made
