"""Shards: tar files of samples, found by pattern, fetched when remote, and read in place by index."""

from __future__ import annotations

import functools
import glob
import hashlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mmpretrain.data import index as tar_index
from mmpretrain.data.tar import DamageError
from mmpretrain.errors import InputError

REMOTE = ("http", "https", "s3")


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
    scheme = _scheme(name)
    if scheme in REMOTE:
        if scheme == "s3" and "*" in name:
            raise InputError(f"shard pattern {name!r} is a remote glob; list remote shards with braces: {{000..009}}")
        return [name]
    path = _local(name)
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


def _scheme(name: str) -> str:
    """Return the scheme of a shard's name ("" for a path); raises `InputError` for one that is not read."""
    scheme = name.split(":", 1)[0].lower() if "://" in name or name.lower().startswith(("pipe:", "file:")) else ""
    if scheme not in ("", "file", *REMOTE):
        raise InputError(f"shard {name!r} has the scheme {scheme!r}; expected a path, file:, http(s):// or s3://")
    return scheme


def _local(name: str) -> Path:
    if _scheme(name) != "file":
        return Path(name)
    parts = urlsplit(name)
    if parts.netloc not in ("", "localhost"):
        raise InputError(f"shard {name!r} names the host {parts.netloc!r}; write file:///absolute/path.tar")
    return Path(unquote(parts.path))


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return `cache_dir`, else $MMPRETRAIN_CACHE/shards, else ~/.cache/mmpretrain/shards."""
    if cache_dir is not None:
        return Path(cache_dir)
    root = os.environ.get("MMPRETRAIN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "mmpretrain") / "shards"


def fetch(url: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a local file of the shard: a local path as it is, a remote one downloaded once into the cache.

    A download appears under its final name only when complete, so any number of processes may fetch one URL.
    What is in the cache is trusted: give a changed shard a new name. Raises `InputError` if the shard is
    missing or unreachable.
    """
    name = os.fspath(url)
    scheme = _scheme(name)
    if scheme not in REMOTE:
        path = _local(name)
        if not path.is_file():
            raise InputError(f"shard {name!r} does not exist; correct the path")
        return path
    base = Path(urlsplit(name).path).name
    target = cache_folder(cache_dir) / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{base}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(name, scheme, target)
    return target


def _download(url: str, scheme: str, target: Path) -> None:
    import fsspec

    try:
        # The file system is chosen by our own scheme check: `fsspec.open` would also follow chained URLs
        # (`a::b`).
        remote = fsspec.filesystem(scheme)
    except ImportError as error:
        raise InputError(f"{url} needs a package: {error}; pip install 'mmpretrain-contrastive[s3]'") from error
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        expected = remote.info(url).get("size")
        remote.get_file(url, temporary)
        got = Path(temporary).stat().st_size
        if expected is not None and got != expected:
            raise OSError(f"{got} of {expected} bytes arrived")
        Path(temporary).replace(target)
    except Exception as error:  # each file system has errors of its own: aiohttp's, botocore's, OSError
        raise InputError(
            f"cannot fetch {url}: {type(error).__name__}: {error}; check address, credentials and disk"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


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
