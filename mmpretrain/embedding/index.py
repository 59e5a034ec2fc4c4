"""Nearest neighbours among the embeddings of a folder, by faiss: exact up to 50,000 of them, an inverted file above."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmpretrain.embedding import row_names
from mmpretrain.embedding.parts import MANIFEST, Rows, Store, iter_rows
from mmpretrain.embedding.row_names import LINES, PLACES, RowNames
from mmpretrain.errors import InputError
from mmpretrain.whole_file import replaced

INDEX, ABOUT = "index.faiss", "index.json"
EXACT_UP_TO = 50_000
TRAINED_ON = 50  # vectors for each list of an inverted file
QUERIES = 100  # vectors by which the number of lists to read is chosen
WANTED = 0.99  # share of the true ten nearest that has to be found


class About(NamedTuple):
    """What an index is: `lists` of which `probes` are read for a query, and the share of the ten nearest found so.

    `digest`: of the manifest it was made from. An exact index has one list.
    """

    digest: str
    embeddings: int
    lists: int
    probes: int
    recall: float


class Hit(NamedTuple):
    """One answer: cosine similarity, and the sample's number, key, path and text."""

    score: float
    item: int
    key: str
    path: str
    text: str


class VectorIndex:
    """An index over a folder of embeddings; `build` makes it, `open` reads it."""

    def __init__(self, store: Store, index: Any, about: About) -> None:
        self.store, self.index, self.about = store, index, about
        self.names = RowNames(store.folder)

    @classmethod
    def open(cls, folder: Path) -> VectorIndex:
        """Read the index of a folder, or build it where there is none or the embeddings are others by now."""
        store = Store.open(folder)
        if store.missing:
            next(iter_rows(store))  # says what is missing
        try:
            about = About(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls.build(folder)
        if about.digest != _digest(store) or not all((folder / name).is_file() for name in (INDEX, LINES, PLACES)):
            return cls.build(folder)
        faiss = _faiss()
        flags = 0 if about.lists == 1 else faiss.IO_FLAG_MMAP  # what no query asks for stays on the disk
        try:
            index = faiss.read_index(str(folder / INDEX), flags)
        except RuntimeError:  # damaged
            return cls.build(folder)
        if about.lists > 1:
            index.nprobe = about.probes
        return cls(store, index, about)

    @classmethod
    def build(cls, folder: Path) -> VectorIndex:
        """Build the index of a folder and write it there; raises `InputError` where embeddings are missing."""
        faiss, store = _faiss(), Store.open(folder)
        width, count = store.manifest.embed_dim, sum(len(rows.items) for rows in iter_rows(store))
        if count == 0:
            raise InputError(f"{folder} holds no embedding")
        lists = 1 if count <= EXACT_UP_TO else round(4 * math.sqrt(count))
        flat = faiss.IndexFlatIP(width)
        index = flat if lists == 1 else faiss.IndexIVFFlat(flat, width, lists, faiss.METRIC_INNER_PRODUCT)
        if lists > 1:
            index.cp.seed, index.cp.niter = 0, 10
            index.train(_sample(store, min(count, TRAINED_ON * lists), count))
        for rows in iter_rows(store):
            index.add(_float32(rows.embeddings))
        probes, recall = (1, 1.0) if lists == 1 else _choose_probes(store, index, count, lists)
        about = About(_digest(store), count, lists, probes, recall)
        _write(store, faiss, index, about)
        return cls(store, index, about)

    def search(self, query: NDArray[np.float32], k: int) -> list[Hit]:
        """Return the k nearest to a unit vector (E,), the nearest first."""
        if query.shape != (self.store.manifest.embed_dim,):
            raise InputError(f"the query has shape {query.shape}; expected ({self.store.manifest.embed_dim},)")
        scores, numbers = self.index.search(_float32(query[None]), min(k, self.about.embeddings))
        found = [(float(s), int(n)) for s, n in zip(scores[0], numbers[0], strict=True) if n >= 0]
        names = self.names.read([number for _, number in found])
        return [Hit(score, *name) for (score, _), name in zip(found, names, strict=True)]


def _sample(store: Store, wanted: int, count: int) -> NDArray[np.float32]:
    """Take every n-th vector."""
    step, found, seen = max(1, count // wanted), [], 0
    for rows in iter_rows(store):
        found.append(_float32(rows.embeddings[-seen % step :: step]))
        seen += len(rows.items)
    return np.concatenate(found)


def _choose_probes(store: Store, index: Any, count: int, lists: int) -> tuple[int, float]:
    """Return the smallest power of two of lists by which the ten nearest of `QUERIES` are found, and how many are.

    A query lies between two vectors that have nothing to do with each other: further from all of them than they are
    from their own kind, as a text is from pictures.
    """
    vectors = _sample(store, 2 * QUERIES, count)[: 2 * QUERIES]
    queries = vectors[: len(vectors) // 2] + vectors[len(vectors) // 2 : len(vectors) // 2 * 2]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    truth = _exact(store, queries, 10)
    probes, recall = 4, 0.0
    while recall < WANTED and probes < lists:
        probes = min(2 * probes, lists)
        index.nprobe = probes
        found = index.search(queries, 10)[1]
        hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]
        recall = sum(hits) / truth.size
    return probes, recall


def _exact(store: Store, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the numbers (Q,k) of the nearest, by all products, part after part."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    numbers, start = np.full((len(queries), k), -1, np.int64), 0
    for rows in iter_rows(store):
        scores = np.concatenate([best, queries @ _float32(rows.embeddings).T], axis=1)
        of = np.arange(start, start + len(rows.items))[None].repeat(len(queries), 0)
        of = np.concatenate([numbers, of], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best, numbers = np.take_along_axis(scores, order, 1), np.take_along_axis(of, order, 1)
        start += len(rows.items)
    return numbers


def _write(store: Store, faiss: Any, index: Any, about: About) -> None:
    """Write names and index, then what it is: that is only there when all else is whole."""
    (store.folder / ABOUT).unlink(missing_ok=True)
    row_names.write(store)
    with replaced(store.folder / INDEX) as temporary:
        faiss.write_index(index, str(temporary))
    with replaced(store.folder / ABOUT) as temporary:
        temporary.write_text(json.dumps(about._asdict()) + "\n", encoding="utf-8")


def _digest(store: Store) -> str:
    """Hash the manifest, and the sizes of the parts."""
    sizes = [(store.folder / store.format.name(part)).stat().st_size for part in range(store.manifest.parts)]
    manifest = (store.folder / MANIFEST).read_bytes()
    return hashlib.sha256(manifest + json.dumps(sizes).encode()).hexdigest()


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, dtype=np.float32)


def _faiss() -> Any:
    try:
        import faiss  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise InputError("searching needs faiss; pip install 'mmpretrain-contrastive[search]'") from error
    return faiss


def iter_embeddings(folder: Path) -> Iterator[Rows]:
    """Yield all rows of a finished folder of embeddings, part after part."""
    return iter_rows(Store.open(folder))
