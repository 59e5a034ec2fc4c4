"""The cache's folder: one writer for each file, and a limit on the bytes of all.

A file that is being fetched is called `.<name>.part` and is locked (flock) by who fetches it, so one file is lock
and download at once: the kernel frees it when its process dies, and nothing called so is ever taken for a shard.
Its final size is reserved before the first byte arrives. Where the file system has no locks, each process fetches
into a file of its own and the last rename wins.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mmpretrain.errors import InputError

GRACE = 10.0
"""Seconds after its last use in which a shard is removed only if nothing else makes room in that time."""
STALE = 150.0
"""Seconds without a byte after which another process's download is not waited for any more."""
ABANDONED = 86400.0
"""Seconds after which a part that nobody can lock belongs to nobody."""
_SHARD = re.compile(r"[0-9a-f]{16}-.*(?<!\.idx\.npz)", re.S)


class Part(NamedTuple):
    """A file that is being fetched, open and locked by us."""

    file: BinaryIO
    path: Path


class _Held(NamedTuple):
    """A shard or part in the folder. `used`: seconds since 1970; `size`: bytes; `taken`: bytes of the disk."""

    used: float
    size: int
    taken: int
    path: Path


def limit(folder: Path) -> int:
    """Return how many bytes of shards the folder may hold: $MMPRETRAIN_CACHE_BYTES, else half of what it can get.

    What it can get is what is free on its disk and what it holds now; more is never used, whatever is given. Raises
    `InputError` for a value that is no number of bytes.
    """
    most = shutil.disk_usage(folder).free + sum(held.taken for held in _held(folder))
    given = os.environ.get("MMPRETRAIN_CACHE_BYTES")
    if not given:
        return most // 2
    if not (given.isascii() and given.isdigit()):
        raise InputError(f"MMPRETRAIN_CACHE_BYTES is {given!r}; expected a number of bytes, such as 200000000000")
    return min(int(given), most)


def touch(target: Path) -> bool:
    """Return whether a shard is there, and mark it as used now."""
    try:
        known = target.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    with contextlib.suppress(OSError):  # another user's file: it counts as used when it was fetched
        os.utime(target, ns=(time.time_ns(), known.st_mtime_ns))  # the index holds for the modification time
    return True


@contextlib.contextmanager
def claimed(target: Path, cancelled: threading.Event) -> Iterator[Part | None]:
    """Lend the part of `target`, to be filled and renamed; None once `target` is there, fetched by another process.

    What was not renamed when an exception ends it is removed. Also None once `cancelled` is set.
    """
    part = _claim(target, cancelled)
    if part is None:
        yield None
        return
    try:
        yield part
    except BaseException:
        part.path.unlink(missing_ok=True)
        raise
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(part.file, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has it too
        part.file.close()


def _claim(target: Path, cancelled: threading.Event) -> Part | None:
    path = target.with_name(f".{target.name}.part")
    while not target.exists() and not cancelled.is_set():
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):  # else its last holder renamed or removed it just now
                if not target.exists():
                    return Part(file, path)
                path.unlink()  # made after the last holder's had become the target
        except BlockingIOError:
            if time.time() - os.fstat(file.fileno()).st_mtime > STALE:
                file.close()
                return _own(target)
            cancelled.wait(0.05)
        except OSError:  # no locks here: the part is nobody's
            file.close()
            path.unlink(missing_ok=True)
            return _own(target)
        file.close()
    return None


def _own(target: Path) -> Part:
    """Return a part that no other process can know."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        part = Part(os.fdopen(handle, "r+b", buffering=0), Path(name))
        with contextlib.suppress(OSError):
            fcntl.flock(part.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(part.file, part.path):  # else swept before it was locked
            return part
        part.file.close()


def reserve(part: Part, size: int, cancelled: threading.Event) -> None:
    """Make room for `size` bytes and give them to the part: shards that were not used for longest go first.

    Raises `InputError` if the shard is larger than the limit, or downloads of others fill the folder.
    """
    folder = part.path.parent
    until = time.monotonic() + GRACE
    while os.fstat(part.file.fileno()).st_size != size and not cancelled.is_set():
        most = limit(folder)
        if size > most:
            raise InputError(f"{size} bytes are more than the cache may hold ({most}); see MMPRETRAIN_CACHE_BYTES")
        with _locked(folder):
            os.ftruncate(part.file.fileno(), 0)
            if _evict(folder, most - size, time.monotonic() >= until):
                os.ftruncate(part.file.fileno(), size)
                return
        if time.monotonic() > until + STALE:
            raise InputError(f"the cache {folder} is full of unfinished downloads; raise MMPRETRAIN_CACHE_BYTES")
        cancelled.wait(0.1)


def finish(part: Part, target: Path) -> None:
    """Give a part that is whole its final name, not while another process counts: it would see both names or none."""
    with _locked(target.parent):
        part.path.replace(target)


def _evict(folder: Path, most: int, young_too: bool) -> bool:
    """Remove shards until `most` bytes are left; returns whether it was enough."""
    sweep(folder)
    everything = sorted(_held(folder))
    total = sum(held.size for held in everything)
    for held in everything:
        if total <= most:
            break
        if held.path.name.startswith(".") or (time.time() - held.used < GRACE and not young_too):
            continue
        held.path.unlink(missing_ok=True)  # who has it mapped reads on
        total -= held.size
    return total <= most


def sweep(folder: Path) -> None:
    """Remove the parts that killed processes left."""
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError), part.open("r+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError:
                if time.time() - part.stat().st_mtime < ABANDONED:
                    continue
            if _is_at(file, part):
                part.unlink()


def _held(folder: Path) -> list[_Held]:
    found = []
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name) or (path.name.startswith(".") and path.suffix == ".part"):
            with contextlib.suppress(OSError):  # gone meanwhile
                known = path.stat()
                found.append(_Held(known.st_atime, known.st_size, known.st_blocks * 512, path))
    return found


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make room; without locks two may each make room for the other's bytes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile has the handle too
        os.close(handle)
