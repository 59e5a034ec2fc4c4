"""Remote shards: fetched whole into a local folder of bounded size, from which they are read in place."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmpretrain.data.download import Cancelled, Refused, Retry, download
from mmpretrain.data.redact import redact
from mmpretrain.data.room import Part, claimed, finish, reserve, touch
from mmpretrain.errors import InputError
from mmpretrain.folders import cache_root

RETRY = Retry()
MOST_INDEX = 2**28
"""Bytes of an index: about 2.5 million members."""
REMOTE = ("http", "https", "s3", "gs", "hf")


def scheme_of(name: str) -> str:
    """Return the scheme of a shard's name ("" for a path); raises `InputError` for one that is not read."""
    scheme = name.split(":", 1)[0].lower() if "://" in name or name.lower().startswith(("pipe:", "file:")) else ""
    if scheme not in ("", "file", *REMOTE):
        raise InputError(
            f"shard {redact(name)!r} has the scheme {scheme!r}; expected a path, file:, or one of "
            + ", ".join(f"{known}://" for known in REMOTE)
        )
    return scheme


def local_path(name: str) -> Path:
    """Return the path that a local name, perhaps a file: URL, stands for."""
    if scheme_of(name) != "file":
        return Path(name)
    parts = urlsplit(name)
    if parts.netloc not in ("", "localhost"):
        raise InputError(f"shard {redact(name)!r} names the host {parts.hostname!r}; write file:///absolute/path.tar")
    return Path(unquote(parts.path))


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return `cache_dir`, else $MMPRETRAIN_CACHE/shards, else ~/.cache/mmpretrain/shards."""
    if cache_dir is not None:
        return Path(cache_dir)
    return cache_root() / "shards"


def fetch(
    url: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    cancelled: threading.Event | None = None,
) -> Path:
    """Return a local file of the shard: a local path as it is, a remote one downloaded once into the cache.

    A download appears under its final name only when complete, and any number of processes may ask for one URL:
    one fetches, the others wait. The file has the server's modification time, where it tells one. It stays until
    shards used later need the room (see `room.limit`): call `fetch` again before opening a shard that was not
    used for a while. What is in the cache is trusted: give a changed shard a new name. Raises `InputError` if the
    shard is missing (`Refused` for a remote one) or stays unreachable, `Cancelled` once `cancelled` is set.
    """
    name = os.fspath(url)
    scheme = scheme_of(name)
    if scheme not in REMOTE:
        path = local_path(name)
        if not path.is_file():
            raise InputError(f"shard {name!r} does not exist; correct the path")
        return path
    target = cache_folder(cache_dir) / cache_name(name)
    while not touch(target):
        _fetch_into(target, name, cancelled or threading.Event())
    return target


def fetch_index(url: str, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Return a local file of `<url>.idx.npz`, the index that may lie beside a remote shard; None without one.

    It is found beside the place that `fetch` gives the shard, and stays when the shard makes room for others. A URL
    with a query has none: a signature holds for one path. It is a stranger's claim until it was checked.
    """
    if scheme_of(url) not in REMOTE:
        raise InputError(f"{url!r} is no remote shard; its index lies beside it")
    target = cache_folder(cache_dir) / f"{cache_name(url)}.idx.npz"
    while not touch(target):
        if "?" in url or "#" in url:
            return None
        try:
            _fetch_into(target, f"{url}.idx.npz", threading.Event(), most=MOST_INDEX)
        except InputError:  # there is none, which some servers call forbidden; or the shard cannot be fetched either
            return None
    return target


def cache_name(url: str) -> str:
    """Return the name that a remote shard has in the cache folder; it tells the URL to nobody."""
    base = re.sub(r"[^\w.-]", "_", Path(urlsplit(url).path).name, flags=re.ASCII)[-100:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{base}"


def _fetch_into(target: Path, url: str, cancelled: threading.Event, most: int | None = None) -> None:
    """Download to `target`, at most `most` bytes, or wait until another process did."""
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(target, cancelled) as part:
            if part is not None:
                _fill(part, url, cancelled, most)
                finish(part, target)
    except InputError as error:
        # Not chained: the cause's own words may hold what was redacted here.
        kind = Refused if isinstance(error, Refused) else InputError
        raise kind(f"cannot fetch {redact(url)}: {error}") from None
    except OSError as error:
        raise InputError(f"cannot write to the cache {folder} ({error}); set MMPRETRAIN_CACHE") from error
    if part is None and cancelled.is_set():
        raise Cancelled


def _fill(part: Part, url: str, cancelled: threading.Event, most: int | None) -> None:
    def room(size: int) -> None:
        if most is not None and size > most:
            raise InputError(f"{size} bytes are more than the {most} allowed")
        reserve(part, size, cancelled)

    modified = download(url, scheme_of(url), part.file, room, RETRY, cancelled)
    now = time.time_ns()
    os.utime(part.path, ns=(now, now if modified is None else modified))
