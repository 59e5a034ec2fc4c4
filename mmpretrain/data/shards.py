"""Shards: tar files of samples, found by pattern, fetched when remote, and read in place by index."""

from __future__ import annotations

import functools
import glob
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmpretrain.data import index as tar_index
from mmpretrain.data.cache import REMOTE, cache_folder, fetch, local_path, scheme_of
from mmpretrain.data.tar import DamageError
from mmpretrain.errors import InputError


def expand(spec: str | Sequence[str]) -> list[str]:
    """Return the shards that a pattern, or each pattern of a list, stands for, in order.

    A pattern is a path or URL (file, http, https, s3) with `{0000..0012}` or `{a,b}` braces, a local glob
    (sorted), or a folder (its `*.tar`, sorted). Raises `InputError` if a pattern matches nothing, names a
    missing file or has another scheme; commands (`pipe:`) are never run.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    shards = [shard for pattern in patterns for shard in _expand_one(pattern)]
    if not shards:
        raise InputError(
            f"no shards: got {spec!r}; expected a path, a pattern like 'data/{{000..009}}.tar' or a folder"
        )
    return shards


def _expand_one(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    if not pattern:
        raise InputError("an empty shard name; expected a path, a URL or a pattern like 'data/{000..009}.tar'")
    if Path(pattern).is_file():  # a name may itself hold braces or brackets
        return [pattern]
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"shard pattern {pattern!r} has unbalanced braces; write e.g. {{000..009}}") from error
    return [shard for name in names for shard in _expand_name(name, pattern)]


def _expand_name(name: str, pattern: str) -> list[str]:
    scheme = scheme_of(name)
    if scheme in REMOTE:
        if scheme == "s3" and "*" in name:
            raise InputError(f"shard pattern {name!r} is a remote glob; list remote shards with braces: {{000..009}}")
        return [name]
    path = local_path(name)
    if path.is_dir():
        found = sorted(str(item) for item in path.glob("*.tar"))
        if not found:
            raise InputError(f"folder {name!r} holds no *.tar; expected shards, which `mmpretrain shards write` makes")
        return found
    if path.is_file():
        return [name]
    found = sorted(glob.glob(str(path))) if glob.has_magic(str(path)) else []  # noqa: PTH207 (takes absolute ones)
    if not found:
        raise InputError(f"shard {name!r} does not exist (from {pattern!r}); correct the path or the range in braces")
    return found


class Shard:
    """One shard with random access: `len(shard)` samples, `shard.read(i)` the bytes of sample i by field.

    A remote shard is fetched at construction. The index is kept as `<shard>.idx.npz` beside the shard, or in
    the cache folder if that place is read-only, and made again when the shard's size or time changed. Pickles
    as numbers and names; each process maps the file at its first read. Raises `InputError` for a missing
    shard, `DamageError` (an `InputError`) naming shard and offset for one that is no sound tar.
    """

    def __init__(self, path_or_url: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> None:
        self.name = os.fspath(path_or_url)
        self.path = fetch(path_or_url, cache_dir)
        self._index = _index_of(self.path, self.name, cache_folder(cache_dir))

    def __len__(self) -> int:
        return len(self._index.keys)

    @property
    def keys(self) -> Sequence[str]:
        """The samples' keys in file order."""
        return self._index.keys

    def fields(self, i: int) -> list[str]:
        """Return the fields of sample i in file order."""
        return list(self._members(i))

    def sizes(self, i: int) -> dict[str, int]:
        """Return the size in bytes of each field of sample i, without reading them."""
        return {field: size for field, (_, size) in self._members(i).items()}

    def read(self, i: int) -> dict[str, bytes]:
        """Return the bytes of each field of sample i."""
        data = _mapped(self.path, self._index.stamp)
        return {field: data[offset : offset + size] for field, (offset, size) in self._members(i).items()}

    def _members(self, i: int) -> dict[str, tuple[int, int]]:
        """Return field -> (offset, size) of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {self.name}, which has {len(self)}")
        rows = slice(int(self._index.starts[i]), int(self._index.starts[i + 1]))
        names = [self._index.fields[k] for k in self._index.field[rows].tolist()]
        return dict(zip(names, zip(self._index.offset[rows].tolist(), self._index.size[rows].tolist())))


def iter_shard(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the samples in file order: "__key__" (str) and raw bytes by field; raises as `Shard` does."""
    shard = Shard(path)
    for i, key in enumerate(shard.keys):
        yield {"__key__": key, **shard.read(i)}


def _map(path: Path, stamp: tuple[int, int]) -> mmap.mmap:
    """Map a shard that still is what its index was made from."""
    with path.open("rb") as file:
        if tar_index.stamp_of(path) != stamp:
            raise InputError(f"{path} changed since it was opened; leave shards alone while they are read")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


# Each map holds a file descriptor, of which a process has about a thousand; shards may be more.
_mapped = functools.lru_cache(maxsize=64)(_map)


def _index_of(path: Path, name: str, cache: Path) -> tar_index.Index:
    """Load the shard's index, or make and keep it."""
    stamp = tar_index.stamp_of(path)
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    places = (path.with_name(f"{path.name}.idx.npz"), cache / f"{digest}-{path.name}.idx.npz")
    for place in places:
        if (known := tar_index.load(place, stamp)) is not None:
            return known
    if stamp[0] == 0:
        raise DamageError(name, 0, "the file is empty; copy or write it again")
    made = tar_index.build(_map(path, stamp), name, stamp)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            tar_index.save(made, place)
        except OSError:  # read-only or full: an index is a convenience, the next run makes it again
            continue
        break
    return made
