"""What the rows of an index stand for: a line of JSON each, found by its place without reading the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmpretrain.embedding.parts import Store, iter_rows
from mmpretrain.whole_file import replaced

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
    with replaced(store.folder / LINES) as temporary, temporary.open("wb") as file:
        for rows in iter_rows(store):
            for name in zip(rows.items, rows.keys, rows.paths, rows.texts, strict=True):
                places.append(places[-1] + file.write(json.dumps(name).encode() + b"\n"))
    with replaced(store.folder / PLACES) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(places[:-1], np.int64), allow_pickle=False)
