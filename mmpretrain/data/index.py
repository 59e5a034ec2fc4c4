"""Where each sample of a shard lies: the members of a tar file grouped by key, kept in a small file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mmpretrain.data.tar import BLOCK, Buffer, DamageError, Member, text_of, walk

_VERSION = 1
_NUMBERS = ("starts", "field", "offset", "size")


class Group(NamedTuple):
    """One sample: its key and, per field, (offset, size) of its bytes in the shard."""

    key: str
    fields: dict[str, tuple[int, int]]


class Index(NamedTuple):
    """The samples of one shard, in file order; the members of sample i are rows starts[i]:starts[i+1]."""

    keys: list[str]
    fields: list[str]  # the distinct field names
    starts: npt.NDArray[np.int64]  # (samples + 1,)
    field: npt.NDArray[np.int64]  # (members,) row of `fields`
    offset: npt.NDArray[np.int64]  # (members,) bytes from the beginning of the shard
    size: npt.NDArray[np.int64]  # (members,) bytes
    stamp: tuple[int, int]  # size in bytes and mtime in ns of the shard it was made from


def stamp_of(path: Path) -> tuple[int, int]:
    """Return size in bytes and modification time in ns: an index is valid for a shard with the same two."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def group(members: Iterator[Member], shard: str) -> Iterator[Group]:
    """Yield samples: neighbouring members of one key, the path up to the first dot of its base name.

    The rest of the base name, in lower case, is the field. Members without a field, and those in or called
    `__x__`, are skipped: the rules of the webdataset format. So are hidden files (`a/.DS_Store`), of
    which webdataset makes samples called `a/`. Raises `DamageError` for a field that a sample has twice.
    """
    current: Group | None = None
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        top = member.name.split("/", 1)[0]
        if not stem or not dot or (len(top) >= 4 and top.startswith("__") and top.endswith("__")):
            continue
        key, field = folder + slash + stem, extension.lower()
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = Group(key, {})
        if field in current.fields or field in ("__key__", "__url__"):
            raise DamageError(shard, member.offset - BLOCK, f"second member {member.name!r} of one sample; rename it")
        current.fields[field] = (member.offset, member.size)
    if current is not None:
        yield current


def build(data: Buffer, shard: str, stamp: tuple[int, int]) -> Index:
    """Make the index of a shard; raises `DamageError` as `walk` and `group` do."""
    keys: list[str] = []
    names: dict[str, int] = {}
    starts, rows = [0], []
    for key, fields in group(walk(data, shard), shard):
        keys.append(key)
        rows += [(names.setdefault(name, len(names)), *place) for name, place in fields.items()]
        starts.append(len(rows))
    field, offset, size = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
    return Index(keys, list(names), np.array(starts, dtype=np.int64), field, offset, size, stamp)


def save(index: Index, path: Path) -> None:
    """Write an index next to its final place and move it there, so that no reader meets half of one."""
    arrays: dict[str, Any] = {name: getattr(index, name) for name in _NUMBERS}
    arrays |= {name: np.frombuffer(_join(getattr(index, name)), dtype=np.uint8) for name in ("keys", "fields")}
    arrays |= {"version": np.int64(_VERSION), "stamp": np.array(index.stamp, dtype=np.int64)}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would hide it from the colleagues who share the shard
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path, stamp: tuple[int, int]) -> Index | None:
    """Read an index; None if there is none, it is unreadable, or it belongs to a shard with another stamp."""
    try:
        # Opened here because np.load leaves a file that is no zip open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if int(file["version"]) != _VERSION or tuple(file["stamp"].tolist()) != stamp:
                return None
            starts, field, offset, size = (np.asarray(file[name], dtype=np.int64) for name in _NUMBERS)
            index = Index(_split(file["keys"]), _split(file["fields"]), starts, field, offset, size, stamp)
            return index if _consistent(index) else None
    except Exception:  # whatever is wrong with it (numpy and zipfile raise a dozen types), it is made again
        return None


def _consistent(index: Index) -> bool:
    """Tell whether no entry points outside the shard or the tables: the file may be anybody's."""
    keys, fields, starts, field, offset, size, stamp = index
    members = len(field)
    return bool(
        starts.shape == (len(keys) + 1,)
        and field.shape == offset.shape == size.shape == (members,)
        and starts[0] == 0
        and starts[-1] == members
        and (np.diff(starts) > 0).all()
        and ((field >= 0) & (field < len(fields))).all()
        and ((offset >= 0) & (size >= 0) & (size <= stamp[0]) & (offset <= stamp[0] - size)).all()
    )


def _join(texts: list[str]) -> bytes:
    return b"".join(text.encode("utf-8", "surrogateescape") + b"\0" for text in texts)  # names hold no NUL


def _split(array: npt.NDArray[np.uint8]) -> list[str]:
    if array.dtype != np.uint8:
        raise ValueError(f"names are stored as {array.dtype}")
    return [text_of(text) for text in array.tobytes().split(b"\0")[:-1]]
