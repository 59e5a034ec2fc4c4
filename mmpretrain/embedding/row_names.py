"""What the rows of an index stand for: a line of JSON each, found by its place without reading the others."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmpretrain.embedding.parts import Store, iter_rows

LINES, PLACES = "index.names.jsonl", "index.places.npy"


class RowName(NamedTuple):
    """The sample of a row: its number in the source, key, path, and text (empty for pictures)."""

    item: int
    key: str
    path: str
    text: str


class RowNames:
    """The names in a folder that `write` wrote."""

    def __init__(self, folder: Path) -> None:
        self.lines = folder / LINES
        self.places = np.load(folder / PLACES, mmap_mode="r", allow_pickle=False)

    def read(self, rows: list[int]) -> list[RowName]:
        """Return the names of some rows."""
        with self.lines.open("rb") as file:
            found = []
            for row in rows:
                file.seek(int(self.places[row]))
                found.append(RowName(*json.loads(file.readline())))
        return found


def write(store: Store) -> None:
    """Write the names of all rows of a folder of embeddings, beside them."""
    places = [0]

    def lines(path: Path) -> None:
        with path.open("wb") as file:
            for rows in iter_rows(store):
                for name in zip(rows.items, rows.keys, rows.paths, rows.texts, strict=True):
                    places.append(places[-1] + file.write(json.dumps(name).encode() + b"\n"))

    def numbers(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, np.array(places[:-1], np.int64), allow_pickle=False)

    write_whole(store.folder / LINES, lines)
    write_whole(store.folder / PLACES, numbers)


def write_whole(target: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `target` that then takes its place."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
