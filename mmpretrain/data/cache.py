"""Remote shards: fetched whole into a local folder, from which they are read in place."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmpretrain.errors import InputError

REMOTE = ("http", "https", "s3")


def scheme_of(name: str) -> str:
    """Return the scheme of a shard's name ("" for a path); raises `InputError` for one that is not read."""
    scheme = name.split(":", 1)[0].lower() if "://" in name or name.lower().startswith(("pipe:", "file:")) else ""
    if scheme not in ("", "file", *REMOTE):
        raise InputError(f"shard {name!r} has the scheme {scheme!r}; expected a path, file:, http(s):// or s3://")
    return scheme


def local_path(name: str) -> Path:
    """Return the path that a local name, perhaps a file: URL, stands for."""
    if scheme_of(name) != "file":
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
    scheme = scheme_of(name)
    if scheme not in REMOTE:
        path = local_path(name)
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
