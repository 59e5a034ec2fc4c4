"""Objects of a store (s3, gs, hf), read block by block through fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

from mmpretrain.errors import InputError

BLOCK = 16 * 2**20
"""Bytes of one request: a cut connection loses at most this much."""
EXTRAS = {"s3": "s3", "gs": "gs", "hf": "hf"}
"""Scheme -> the extra that brings its package."""


class Reply(NamedTuple):
    """What a server sends. `start`: the offset of the first byte; `size`: bytes of the whole object."""

    start: int
    size: int
    version: str | None  # None: the server has no way to say whether the object changed
    modified: int | None  # nanoseconds since 1970
    chunks: Iterator[bytes]


@contextmanager
def open_object(url: str, scheme: str, start: int, version: str | None) -> Iterator[Reply]:
    """Read an object from byte `start`, or from its beginning if it no longer is the one of `version`.

    Raises `InputError` if the scheme's package is missing, and whatever the store's client raises.
    """
    import fsspec

    try:
        # The file system is chosen by our own scheme check: `fsspec.open` would also follow chained URLs
        # (`a::b`).
        store = fsspec.filesystem(scheme)
    except ImportError as error:
        extra = f"mmpretrain-contrastive[{EXTRAS[scheme]}]"
        raise InputError(f"{scheme}:// needs a package: {error}; pip install '{extra}'") from error
    info = store.info(url)
    if info["type"] != "file":
        raise FileNotFoundError("it is a folder, not a file")
    # What a store says of an object differs from store to store, but changes when the object does.
    now = repr(sorted(info.items()))
    modified = info.get("LastModified") or info.get("mtime")
    yield Reply(
        start=start if now == version else 0,
        size=int(info["size"]),
        version=now,
        modified=int(modified.timestamp() * 1e9) if isinstance(modified, datetime) else None,
        chunks=_blocks(store, url, start if now == version else 0, info),
    )


def _blocks(store: Any, url: str, start: int, info: dict[str, Any]) -> Iterator[bytes]:
    with store.open(url, "rb", cache_type="none", size=info["size"]) as file:  # no cache: it would read ahead
        file.seek(start)
        while file.tell() < info["size"] and (block := file.read(BLOCK)):
            yield block
    if store.info(url) != info:
        raise OSError("the object changed while it was fetched")
