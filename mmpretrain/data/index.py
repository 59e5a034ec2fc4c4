"""Where each sample of a shard lies, a checksum per member, and what was lost: kept in a small file."""

from __future__ import annotations

import hashlib
import json
import mmap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from mmpretrain.data.events import CAUSES, DataEvent
from mmpretrain.data.grouping import Content, group
from mmpretrain.data.headers import text_of
from mmpretrain.data.tar import Damage, Member, walk
from mmpretrain.whole_file import replaced

_VERSION = 4
_CHUNK = 1 << 26  # bytes after which pages that were read are given back
_DELIVERED = {"keys": np.uint8, "fields": np.uint8, "starts": np.int64, "rows": np.uint64}
_ARRAYS = {**_DELIVERED, "losses": np.uint8}


class Head(NamedTuple):
    """What is known of a shard without its index: samples to deliver, samples lost, losses listed, a content hash."""

    samples: int
    lost: int
    events: int
    digest: str


class Index(NamedTuple):
    """The samples of one shard in file order; the members of sample i are rows starts[i]:starts[i+1]."""

    keys: list[str]
    fields: list[str]  # the distinct field names
    starts: npt.NDArray[np.int64]  # (samples + 1,)
    rows: npt.NDArray[np.uint64]  # (members, 4): number of the field, offset, size, xxh3_64 of the bytes
    events: list[DataEvent]
    lost: Content  # what an earlier index knew of samples that are lost now
    nameless: int  # events without a key at which a sample may be lost
    stamp: tuple[int, int]  # size in bytes and mtime in ns of the shard it was made from

    def head(self) -> Head:
        """Return the counts, and the SHA-256 of what is delivered: not of how the index came to know it."""
        digest = hashlib.sha256()
        arrays = self._arrays()
        for array in (arrays[name] for name in _DELIVERED):
            digest.update(len(array).to_bytes(8, "little") + array.tobytes())
        keys = {event.key for event in self.events if event.cause != "duplicate" and event.key is not None}
        keys -= set(self.keys) if keys else set()
        # Where an earlier index names the lost, a damaged place without a key is one of them.
        nameless = 0 if self.lost else self.nameless
        return Head(len(self.keys), len(keys) + nameless, len(self.events), digest.hexdigest())

    def content(self) -> Content:
        """Return (size, checksum) by key and field, lost samples included."""
        content: Content = dict(self.lost)
        rows, starts = self.rows.tolist(), self.starts.tolist()
        for i, key in enumerate(self.keys):
            content[key] = {self.fields[row[0]]: (row[2], row[3]) for row in rows[starts[i] : starts[i + 1]]}
        return content

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        events = [event[1:] for event in self.events]
        losses = json.dumps({"events": events, "lost": self.lost, "nameless": self.nameless}).encode()
        return {
            "keys": np.frombuffer(_join(self.keys), np.uint8),
            "fields": np.frombuffer(_join(self.fields), np.uint8),
            "starts": self.starts,
            "rows": self.rows,
            "losses": np.frombuffer(losses, np.uint8),
        }


def stamp_of(path: Path) -> tuple[int, int]:
    """Return size in bytes and modification time in ns: an index is valid for a shard with the same two."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def build(data: bytes | mmap.mmap, shard: str, stamp: tuple[int, int], before: Index | None = None) -> Index:
    """Make the index of a shard in one pass; raises `DamageError` as `walk` does.

    `before` is an older index of the same file: what it knew and the shard no longer holds is a loss.
    """
    grouped = group(_summed(data, shard), shard, None if before is None else before.content())
    names: dict[str, int] = {}
    starts, rows = [0], []
    for fields in grouped.samples.values():
        rows += [(names.setdefault(name, len(names)), *place) for name, place in fields.items()]
        starts.append(len(rows))
    table = np.array(rows, dtype=np.uint64).reshape(-1, 4)
    keys, places = list(grouped.samples), np.array(starts, dtype=np.int64)
    return Index(keys, list(names), places, table, grouped.events, grouped.lost, grouped.nameless, stamp)


def _summed(data: bytes | mmap.mmap, shard: str) -> Iterator[tuple[Member, int] | Damage]:
    """Walk and add each member's checksum; pages of a map are given back on the way."""
    done = 0
    with memoryview(data) as view:
        for item in walk(data, shard):
            if isinstance(item, Damage):
                yield item
                continue
            with view[item.offset : item.offset + item.size] as part:
                yield item, xxhash.xxh3_64_intdigest(part)
            if isinstance(data, mmap.mmap) and item.offset - done > _CHUNK:
                data.madvise(mmap.MADV_DONTNEED, done, _CHUNK)
                done += _CHUNK


def save(index: Index, path: Path) -> None:
    """Write an index next to its final place and move it there, so that no reader meets half of one."""
    head = json.dumps({"version": _VERSION, "stamp": index.stamp, **index.head()._asdict()}).encode()
    arrays = {"head": np.frombuffer(head, np.uint8), **index._arrays()}
    with replaced(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_head(path: Path, stamp: tuple[int, int]) -> Head | None:
    """Read only the counts of an index; None where `load` gives None."""
    try:
        with path.open("rb") as raw, _opened(raw) as file:
            head, found = _head(file)
            return head if found == stamp else None
    except Exception:  # see `load`
        return None


def stamp_in(path: Path) -> tuple[int, int] | None:
    """Read which state of a shard an index is of; None where `load` gives None."""
    try:
        with path.open("rb") as raw, _opened(raw) as file:
            return _head(file)[1]
    except Exception:  # see `load`
        return None


def load(path: Path, shard: str, stamp: tuple[int, int] | None) -> Index | None:
    """Read an index; None if there is none, it is damaged, or it belongs to a shard with another stamp.

    `shard` names the events. `stamp` None accepts the index of any version of the shard.
    """
    try:
        # Opened here because np.load leaves a file that is no zip open.
        with path.open("rb") as raw, _opened(raw) as file:
            head, found = _head(file)
            if stamp is not None and found != stamp:
                return None
            arrays = {name: file[name] for name in _ARRAYS}
        if any(arrays[name].dtype != kind for name, kind in _ARRAYS.items()):
            return None
        keys, fields, losses = _split(arrays["keys"]), _split(arrays["fields"]), json.loads(arrays["losses"].tobytes())
        events = [_event(shard, *entry) for entry in losses["events"]]
        lost = {
            str(key): {str(field): (int(size), int(checksum)) for field, (size, checksum) in members.items()}
            for key, members in losses["lost"].items()
        }
        if not 0 <= (nameless := int(losses["nameless"])) <= len(events):
            return None
        index = Index(keys, fields, arrays["starts"], arrays["rows"], events, lost, nameless, found)
        return index if _consistent(index) and index.head() == head else None
    except Exception:  # whatever is wrong with it (numpy, zipfile and json raise a dozen types), it is made again
        return None


def _opened(raw: Any) -> Any:
    file = np.load(raw, allow_pickle=False)
    if any(part.compress_type != zipfile.ZIP_STORED for part in file.zip.infolist()):
        raise ValueError("compressed: it may unpack to any size")
    return file


def _head(file: Any) -> tuple[Head, tuple[int, int]]:
    about = json.loads(file["head"].tobytes())
    if about["version"] != _VERSION:
        raise ValueError(f"version {about['version']}")
    size, time = about["stamp"]
    samples, lost, events = (int(about[name]) for name in ("samples", "lost", "events"))
    return Head(samples, lost, events, str(about["digest"])), (int(size), int(time))


def _event(shard: str, offset: int | None, key: str | None, cause: Any, detail: str) -> DataEvent:
    if cause not in CAUSES or not isinstance(offset, int | None) or not isinstance(key, str | None):
        raise ValueError("no event")
    return DataEvent(shard, offset, key, cause, str(detail))


def _consistent(index: Index) -> bool:
    """Tell whether no entry points outside the shard or the tables: the file may be anybody's."""
    starts, rows = index.starts, index.rows
    if starts.shape != (len(index.keys) + 1,) or rows.ndim != 2 or rows.shape[1] != 4 or not index.keys:
        return False
    field, offset, size, _ = rows.T
    length = np.uint64(index.stamp[0])
    return bool(
        starts[0] == 0
        and starts[-1] == len(rows)
        and (np.diff(starts) > 0).all()
        and (field < len(index.fields)).all()
        and ((size <= length) & (offset <= length - np.minimum(size, length))).all()
    )


def _join(texts: list[str]) -> bytes:
    return b"".join(text.encode("utf-8", "surrogateescape") + b"\0" for text in texts)  # names hold no NUL


def _split(array: npt.NDArray[np.uint8]) -> list[str]:
    return [text_of(text) for text in array.tobytes().split(b"\0")[:-1]]
