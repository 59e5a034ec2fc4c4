"""The manifest of a checkpoint: its files with size and SHA-256, and whether they still are what was written."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from mmpretrain.errors import InputError
from mmpretrain.training.state_json import dumps, loads

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_MAX_BYTES = 16 << 20
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class DamagedCheckpoint(InputError):
    """A checkpoint is not what was written; the message names the file."""


class Manifest(NamedTuple):
    """A checkpoint's step, how its tensors lie (`plain` or `sharded`), and its files: name -> (bytes, SHA-256)."""

    step: int
    layout: str
    files: dict[str, tuple[int, str]]


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into the folder `path`, durably."""
    write(path / MANIFEST, _bytes(manifest))


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint `path`; raises `DamagedCheckpoint`."""
    file = path / MANIFEST
    data = read(file, _MAX_BYTES)
    try:
        content = loads(data)
        version = content["format"]
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        manifest = Manifest(int(content["step"]), str(content["layout"]), files)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedCheckpoint(f"{file} is no manifest ({type(error).__name__}: {error!s:.200})") from error
    if version != FORMAT:
        raise DamagedCheckpoint(f"{file} has format {version!r:.40}, this version of mmpretrain reads {FORMAT}")
    if data != _bytes(manifest):  # the manifest's own hash, and that nothing was said in another way
        raise DamagedCheckpoint(f"{file} is damaged: it was changed after it was written")
    if STATE not in files or not all(_FILE.fullmatch(name) and name != MANIFEST for name in files):
        raise DamagedCheckpoint(f"{file} names files that a checkpoint cannot hold")
    return manifest


def verify(path: Path) -> Manifest:
    """Check every file of the checkpoint `path`; raises `DamagedCheckpoint` with the file's name."""
    manifest = listed(path)
    for name, (size, want) in manifest.files.items():
        file = path / name
        try:
            if file.stat().st_size != size or digest(file) != want:
                raise different(file)
        except OSError as error:
            raise DamagedCheckpoint(f"{file} cannot be read ({error.strerror})") from error
    return manifest


def listed(path: Path) -> Manifest:
    """Read the manifest and check that exactly its files are there; raises `DamagedCheckpoint`."""
    manifest = read_manifest(path)
    there, named = {entry.name for entry in path.iterdir()}, {*manifest.files, MANIFEST}
    for name in sorted(there ^ named):
        raise DamagedCheckpoint(f"{path / name} is {'missing' if name in named else 'no file of this checkpoint'}")
    for name in manifest.files:
        if (path / name).is_symlink() or not (path / name).is_file():
            raise DamagedCheckpoint(f"{path / name} is no file")
    return manifest


def checked(file: Path, size: int, want: str) -> bytes:
    """Read a whole file whose size and hash are known; raises `DamagedCheckpoint`."""
    data = read(file, size)
    if len(data) != size or hashlib.sha256(data).hexdigest() != want:
        raise different(file)
    return data


def different(file: Path) -> DamagedCheckpoint:
    """Build the error of a file that is not the one of the manifest."""
    return DamagedCheckpoint(f"{file} is damaged: it is not the file whose SHA-256 the manifest has")


def write(file: Path, data: bytes) -> tuple[int, str]:
    """Write a new file durably; returns its size and hash, taken from memory."""
    with file.open("xb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    return len(data), hashlib.sha256(data).hexdigest()


def read(file: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes (one more shows that it is longer); raises `DamagedCheckpoint`."""
    try:
        with file.open("rb") as handle:
            return handle.read(max(0, limit) + 1)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise DamagedCheckpoint(
            f"{file} {'is missing' if missing else f'cannot be read ({error.strerror})'}"
        ) from error


def digest(file: Path) -> str:
    """Hash a file with SHA-256, block by block."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def drop_cached(file: Path) -> None:
    """Ask the system to forget a file's pages, so that the next reader gets what the disk holds."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes(manifest: Manifest) -> bytes:
    content: dict[str, Any] = {"format": FORMAT, **manifest._asdict()}
    return dumps({**content, "sha256": hashlib.sha256(dumps(content)).hexdigest()})
