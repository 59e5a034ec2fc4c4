"""A folder of embeddings: a manifest that says what they are of, and parts that are each there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mmpretrain.errors import InputError
from mmpretrain.whole_file import replaced

MANIFEST = "embeddings.json"
LOST = "lost.skipped.jsonl"
"""What shards lost to damage: these samples have no number, so they are counted apart."""


class Rows(NamedTuple):
    """Some embedded samples: number in the source, key, path, text (empty for pictures), embedding (N,E)."""

    items: list[int]
    keys: list[str]
    paths: list[str]
    texts: list[str]
    embeddings: NDArray[Any]


class Manifest(NamedTuple):
    """What a folder of embeddings is of. Nothing is added to a folder unless all but `MOVABLE` is the same.

    `model_digest`: of the model folder's files. `digest`: of the source. `dtype`: of the stored numbers.
    """

    model: str
    model_digest: str
    modality: str
    embed_dim: int
    source: str
    column: str | None
    key_column: str | None
    digest: str
    samples: int
    part_size: int
    format: str
    dtype: str
    version: int = 1

    @property
    def parts(self) -> int:
        """How many parts there are in the end."""
        return -(-self.samples // self.part_size)

    def items(self, part: int) -> range:
        """Numbers of the samples of a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.samples))


MOVABLE = {"model", "source"}
"""Fields that say where something lies; what it is, its digest says."""


class Format(Protocol):
    """How a part is stored; what `name` names is written last, and is there only when the part is whole."""

    def name(self, part: int) -> str:
        """File that says that a part is there."""

    def write(self, folder: Path, part: int, rows: Rows) -> None:
        """Write a part, atomically."""

    def read(self, folder: Path, part: int) -> Rows:
        """Read a part."""


class Parquet:
    """`part-00000.parquet`: columns item, key, path, text and embedding (a list of fixed size)."""

    def __init__(self) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise InputError(
                "embeddings as parquet need pyarrow; pip install 'mmpretrain-contrastive[parquet]', or --format npy"
            ) from error

    def name(self, part: int) -> str:
        """File of a part."""
        return f"part-{part:05}.parquet"

    def write(self, folder: Path, part: int, rows: Rows) -> None:
        """Write a part."""
        import pyarrow as pa
        from pyarrow import parquet

        values = pa.array(rows.embeddings.reshape(-1))
        table = pa.table(
            {
                "item": pa.array(rows.items, pa.int64()),
                "key": pa.array(rows.keys, pa.string()),
                "path": pa.array(rows.paths, pa.string()),
                "text": pa.array(rows.texts, pa.string()),
                "embedding": pa.FixedSizeListArray.from_arrays(values, rows.embeddings.shape[1]),
            }
        )
        with replaced(folder / self.name(part)) as temporary:
            parquet.write_table(table, temporary)

    def read(self, folder: Path, part: int) -> Rows:
        """Read a part."""
        from pyarrow import parquet

        table = parquet.read_table(folder / self.name(part))
        column = table.column("embedding").combine_chunks()
        values = column.values.to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
        items, keys, paths, texts = (table.column(name).to_pylist() for name in ("item", "key", "path", "text"))
        return Rows(items, keys, paths, texts, values)


class Npy:
    """`part-00000.npy` (N,E), and `part-00000.jsonl` with a line of item, key, path and text for each row."""

    def name(self, part: int) -> str:
        """File of a part."""
        return f"part-{part:05}.npy"

    def write(self, folder: Path, part: int, rows: Rows) -> None:
        """Write a part."""
        names = zip(rows.items, rows.keys, rows.paths, rows.texts, strict=True)
        with replaced(folder / f"part-{part:05}.jsonl") as temporary:
            lines = [json.dumps(dict(zip(Rows._fields, row, strict=False)), ensure_ascii=False) for row in names]
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        with replaced(folder / self.name(part)) as temporary, temporary.open("wb") as file:
            np.save(file, rows.embeddings, allow_pickle=False)

    def read(self, folder: Path, part: int) -> Rows:
        """Read a part."""
        lines = (folder / f"part-{part:05}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        named = [json.loads(line) for line in lines]
        items, keys, paths, texts = ([row[name] for row in named] for name in Rows._fields[:-1])
        return Rows(items, keys, paths, texts, np.load(folder / self.name(part), allow_pickle=False))


FORMATS: dict[str, type[Format]] = {"parquet": Parquet, "npy": Npy}


class Store:
    """A folder of embeddings that is being filled, or read."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.format = folder, manifest, FORMATS[manifest.format]()

    @classmethod
    def create(cls, folder: Path, manifest: Manifest, overwrite: bool) -> Store:
        """Begin a folder, or go on with one of the same manifest; raises `InputError` for another one's.

        `overwrite` removes an earlier one's files, and nothing else.
        """
        store = cls(folder, manifest)
        if (folder / MANIFEST).is_file():
            old = cls.open(folder)
            same = [n for n in Manifest._fields if n not in MOVABLE]
            differ = [n for n in same if getattr(old.manifest, n) != getattr(manifest, n)]
            if differ and not overwrite:
                said = "; ".join(f"{n} {getattr(old.manifest, n)!r}, now {getattr(manifest, n)!r}" for n in differ)
                raise InputError(f"{folder} holds other embeddings ({said}); give another OUT, or --overwrite")
            if overwrite:
                for path in [*folder.glob("part-*"), *folder.glob("index.*"), folder / LOST, folder / MANIFEST]:
                    path.unlink(missing_ok=True)
        elif folder.exists() and any(not path.match(".*.tmp") for path in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no {MANIFEST}; give an empty or a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):  # of a killed run
            leftover.unlink(missing_ok=True)
        with replaced(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest._asdict(), indent=1) + "\n", encoding="utf-8")
        return store

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open a folder that was written before; raises `InputError` where it is none."""
        try:
            manifest = Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
            return cls(folder, manifest)
        except InputError:
            raise
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{folder} holds no embeddings ({error}); make them with `mmpretrain embed`") from error

    def has(self, part: int) -> bool:
        """Whether a part is there."""
        return (self.folder / self.format.name(part)).is_file()

    @property
    def missing(self) -> list[int]:
        """The parts that are still to be made."""
        return [part for part in range(self.manifest.parts) if not self.has(part)]

    def write_lost(self, lost: list[dict[str, str]]) -> None:
        """List the samples that damage took before they could be counted; an empty list leaves no file."""
        if lost:
            with replaced(self.folder / LOST) as temporary:
                temporary.write_text(_lines(lost), encoding="utf-8")

    def write(self, part: int, rows: Rows, skipped: list[dict[str, str]]) -> None:
        """Write a part, and before it the list of what was left out."""
        listed = self.folder / f"part-{part:05}.skipped.jsonl"
        listed.unlink(missing_ok=True)  # of a run that was killed before the part was there
        if skipped:
            with replaced(listed) as temporary:
                temporary.write_text(_lines(skipped), encoding="utf-8")
        self.format.write(self.folder, part, rows)

    def read(self, part: int) -> Rows:
        """Read a part; raises `InputError` where it is damaged."""
        file = self.folder / self.format.name(part)
        try:
            rows = self.format.read(self.folder, part)
            if rows.embeddings.shape != (len(rows.items), self.manifest.embed_dim):
                raise ValueError(f"{rows.embeddings.shape} numbers for {len(rows.items)} samples")
            return rows
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError) as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(
                f"{file} is damaged ({said}); remove it and run the same `mmpretrain embed` again"
            ) from error

    def skipped(self) -> int:
        """Count the samples that were left out."""
        files = self.folder.glob("part-*.skipped.jsonl")
        return sum(file.read_bytes().count(b"\n") for file in files)


def _lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def iter_rows(store: Store) -> Iterator[Rows]:
    """Yield every part; raises `InputError` where some are still to be made."""
    if missing := store.missing:
        raise InputError(
            f"{store.folder} lacks {len(missing)} of {store.manifest.parts} parts; "
            "run the same `mmpretrain embed` again"
        )
    for part in range(store.manifest.parts):
        yield store.read(part)
