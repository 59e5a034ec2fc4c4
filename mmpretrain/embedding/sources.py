"""What can be embedded: a folder of pictures, shards, or a table, each as numbered samples read when needed."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from mmpretrain.data.shards import ChecksumError, Shard, expand
from mmpretrain.data.sources import PICTURES, TABLES, ParquetCell, find_pictures, read_picture, rows_of
from mmpretrain.errors import InputError

PICTURE, TEXT = "picture", "txt"
"""Fields under which folders and tables give their samples; shards have their own."""


class SourceLost(InputError):
    """The source cannot be read any more, which is no damage of one sample."""


class Source(Protocol):
    """Numbered samples. `digest` says what they are: it changes with their number, names or sizes."""

    digest: str

    def lost(self) -> list[dict[str, str]]:
        """List the samples that damage took, which have no number."""

    def __len__(self) -> int:
        """Count the samples."""

    def key(self, i: int) -> str:
        """Name of sample i."""

    def path(self, i: int) -> str:
        """Where sample i lies, for a person."""

    def read(self, i: int) -> dict[str, bytes]:
        """Bytes of sample i by field; raises OSError or ValueError where it, `SourceLost` where nothing can be read."""


class Folder:
    """The pictures below a folder, sorted by path; the key is the path inside the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, find_pictures(folder)
        for file in self.files:
            try:
                str(file).encode()
            except UnicodeEncodeError:
                raise InputError(f"{str(file)!a} has a name that is not UTF-8; rename it") from None
        self.digest = _digest([self.key(i), *_state(file)] for i, file in enumerate(self.files))

    def lost(self) -> list[dict[str, str]]:
        """Nothing: a picture that cannot be read has a number."""
        return []

    def __len__(self) -> int:
        return len(self.files)

    def key(self, i: int) -> str:
        """Path of the picture inside the folder."""
        return self.files[i].relative_to(self.folder).as_posix()

    def path(self, i: int) -> str:
        """Path of the picture."""
        return str(self.files[i])

    def read(self, i: int) -> dict[str, bytes]:
        """The picture's bytes."""
        return {PICTURE: self.files[i].read_bytes()}


class Shards:
    """The samples of tar files, in their order; fields are those of the shards."""

    def __init__(self, pattern: str) -> None:
        self.shards = [Shard(path) for path in expand(pattern)]
        self.ends = list(accumulate(len(shard) for shard in self.shards))
        self.digest = _digest([shard.name, len(shard), shard.digest] for shard in self.shards)

    def lost(self) -> list[dict[str, str]]:
        """What was found lost when the shards were indexed."""
        return [
            {"key": event.key or "", "path": event.shard, "reason": event.detail}
            for shard in self.shards
            for event in shard.events
        ]

    def __len__(self) -> int:
        return self.ends[-1]

    def _place(self, i: int) -> tuple[Shard, int]:
        number = bisect_right(self.ends, i)
        return self.shards[number], i - (self.ends[number - 1] if number else 0)

    def key(self, i: int) -> str:
        """The sample's key in its shard."""
        shard, place = self._place(i)
        return shard.keys[place]

    def path(self, i: int) -> str:
        """Name of the shard, and the number of the sample in it."""
        shard, place = self._place(i)
        return f"{shard.name}#{place}"

    def read(self, i: int) -> dict[str, bytes]:
        """The sample's bytes by field."""
        shard, place = self._place(i)
        try:
            return shard.read(place)
        except ChecksumError:  # of this sample
            raise
        except (OSError, ValueError) as error:  # the shard is gone, or cannot be fetched
            raise SourceLost(f"{error}; run the same command again once it can be read") from error


class Table:
    """One column of a CSV, TSV, JSONL or parquet table: paths of pictures (beside the table), their bytes, or texts."""

    def __init__(self, table: Path, column: str, is_text: bool, key_column: str | None = None) -> None:
        self.table, self.is_text = table, is_text
        rows = list(rows_of(table, [column, *([key_column] if key_column else [])]))
        self.cells = [row[column] for row in rows]
        self.keys = [str(row[key_column]) if key_column else f"{i:09}" for i, row in enumerate(rows)]
        if not rows:
            raise InputError(f"{table} has no rows; expected one sample a row")
        files = [
            [] if is_text or isinstance(cell, ParquetCell) else _state(Path(self.path(i)))
            for i, cell in enumerate(self.cells)
        ]
        self.digest = _digest([self.keys[i], str(cell), *files[i]] for i, cell in enumerate(self.cells))

    def lost(self) -> list[dict[str, str]]:
        """Nothing: a row that cannot be read has a number."""
        return []

    def __len__(self) -> int:
        return len(self.cells)

    def key(self, i: int) -> str:
        """The row's key, or its number."""
        return self.keys[i]

    def path(self, i: int) -> str:
        """Path of the picture, or the row of the table."""
        cell = self.cells[i]
        if self.is_text or isinstance(cell, ParquetCell):
            return f"{self.table}#{i}"
        return str(self.table.parent / str(cell or ""))

    def read(self, i: int) -> dict[str, bytes]:
        """The row's text, or the bytes of its picture."""
        cell = self.cells[i]
        if self.is_text:
            return {TEXT: str("" if cell is None else cell).encode()}
        return {PICTURE: read_picture(cell if isinstance(cell, ParquetCell) else Path(self.path(i)))}


def open_source(source: str, is_text: bool, column: str | None = None, key_column: str | None = None) -> Source:
    """Open a folder of pictures, a table, or shards (a path, a pattern, a URL or a folder of `*.tar`).

    `column` of a table: default `caption` for text, `image` for pictures. Raises `InputError` for what is none of
    them, for text from a folder of pictures, and for a folder of pictures and shards.
    """
    path = Path(source)
    if path.suffix.lower() in TABLES and not path.is_dir():
        return Table(path, column or ("caption" if is_text else "image"), is_text, key_column)
    if column or key_column:
        raise InputError(f"{source} is no table ({', '.join(TABLES)}); --column and --key-column need one")
    has_shards = path.is_dir() and any(path.glob("*.tar"))
    if has_shards and any(file.suffix.lower() in PICTURES for file in path.rglob("*")):
        raise InputError(
            f"{source} holds pictures and shards; give '{source}/*.tar' for the shards, or move them apart"
        )
    if path.is_dir() and not has_shards:
        if is_text:
            raise InputError(f"{source} is a folder of pictures; text comes from a table or from shards")
        return Folder(path)
    return Shards(source)


def _state(file: Path) -> list[object]:
    """Size and time of a file, nothing where there is none."""
    try:
        found = file.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _digest(rows: Iterable[list[object]]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row).encode() + b"\n")
    return found.hexdigest()
