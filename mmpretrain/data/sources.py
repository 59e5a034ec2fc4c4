"""What shards are written from: folders of pictures and tables, listed as items without reading a picture."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmpretrain.errors import InputError

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}
"""What counts as a picture in a folder; those that cannot be decoded are reported, not passed over."""
TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".parquet": None}


class ParquetCell(NamedTuple):
    """Where a picture's bytes lie in a parquet file."""

    table: Path
    column: str
    row_group: int
    row: int  # in its row group


class Item(NamedTuple):
    """One sample to write: its key, its picture, texts known already, and files beside the picture by
    field."""

    key: str
    image: Path | ParquetCell
    texts: dict[str, str]
    sidecars: dict[str, Path]


def list_folder(folder: Path) -> list[Item]:
    """List the pictures below `folder`; `x.txt` and `x.json` beside `x.jpg` are its captions."""
    items = []
    for picture in find_pictures(folder):
        sidecars = {kind: picture.with_suffix(f".{kind}") for kind in ("txt", "json")}
        found = {kind: path for kind, path in sidecars.items() if path.is_file()}
        items.append(Item(_key_of(picture, folder), picture, {}, found))
    if not any(item.sidecars for item in items):
        raise InputError(
            f"none of the {len(items)} pictures in {folder} has a caption x.txt or x.json beside it; add "
            "them, or give --classes if the folders' names are the captions"
        )
    return _unique(items)


def list_classes(folder: Path) -> tuple[list[Item], list[str]]:
    """List the pictures of a tree with one folder per class, and the class names in the order of their
    index."""
    pictures = find_pictures(folder)
    loose = [picture for picture in pictures if picture.parent == folder]
    if loose:
        raise InputError(f"{loose[0]} lies in no class folder; expected {folder}/CLASS/picture, so move it into one")
    names = sorted({picture.relative_to(folder).parts[0] for picture in pictures})
    index = {name: i for i, name in enumerate(names)}
    items = []
    for picture in pictures:
        name = picture.relative_to(folder).parts[0]
        texts = {"txt": _words(name), "cls": str(index[name])}
        items.append(Item(_key_of(picture, folder), picture, texts, {}))
    return _unique(items), [_words(name) for name in names]


def list_table(
    table: Path, image_column: str, caption_columns: Sequence[str], key_column: str | None = None
) -> list[Item]:
    """List the rows of a CSV, TSV, JSONL or parquet table whose pictures are paths relative to its folder.

    A parquet column may hold the pictures' bytes instead. One caption column becomes the field `txt` (or
    `json`, if it holds lists); several become `json` with {"caption": {column: text}}. Without a key column
    the row number is the key.
    """
    wanted = [image_column, *caption_columns, *([key_column] if key_column else [])]
    items = []
    for number, row in enumerate(rows_of(table, wanted)):
        key = f"{number:09}" if key_column is None else _key(row[key_column], f"row {number + 1} of {table}")
        cell = row[image_column]
        image = cell if isinstance(cell, ParquetCell) else table.parent / str(cell or "")
        items.append(Item(key, image, _captions(row, caption_columns), {}))
    if not items:
        raise InputError(f"{table} has no rows; expected one picture per row")
    return _unique(items)


def rows_of(table: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the wanted columns of a table's rows; bytes in parquet's first one stay in the file, as a `ParquetCell`."""
    yield from _parquet_rows(table, wanted) if table.suffix.lower() == ".parquet" else _text_rows(table, wanted)


def read_picture(image: Path | ParquetCell) -> bytes:
    """Return the undecoded bytes of an item's picture; raises OSError or ValueError if there are none."""
    if isinstance(image, Path):
        return image.read_bytes()
    value = _parquet_column(image.table, image.column, image.row_group)[image.row].as_py()
    if isinstance(value, Mapping):  # Hugging Face's image columns: {"bytes": …, "path": …}
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise ValueError("no bytes in the image column")
    return value


def find_pictures(folder: Path) -> list[Path]:
    """List the picture files below a folder, hidden ones left out; raises `InputError` where there is none."""
    hidden = (".", "__")  # webdataset skips folders called __x__, and nobody means .cache
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURES
        and not any(part.startswith(hidden) for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not found:
        raise InputError(f"{folder} holds no picture; expected files such as x.jpg, x.png or x.webp in it")
    return found


def _key_of(picture: Path, folder: Path) -> str:
    return _key(picture.relative_to(folder).with_suffix("").as_posix(), str(picture))


def _key(value: Any, where: str) -> str:
    """Make a key: a dot would begin the field, and a path out of the folder would harm whoever unpacks the
    shard."""
    key = str(value if value is not None else "").replace(".", "_")
    try:
        key.encode()
        sound = key.isprintable() and all(key.split("/")) and not key.startswith("__")
    except UnicodeEncodeError:
        sound = False
    if not sound:
        raise InputError(f"{where} has the key {value!r}; expected printable text like 'a/b', not empty; rename it")
    return key


def _unique(items: list[Item]) -> list[Item]:
    seen: dict[str, Item] = {}
    for item in items:
        if (other := seen.setdefault(item.key, item)) is not item:
            raise InputError(f"{other.image} and {item.image} both have the key {item.key!r}; rename one of them")
    return items


def _words(folder_name: str) -> str:
    return " ".join(folder_name.replace("_", " ").split())


def _captions(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str]:
    """Return the caption field of a row; nothing if all its captions are empty."""
    texts: dict[str, str | list[str]] = {}
    for column in columns:
        value = row[column]
        if isinstance(value, list):
            value = [str(text).strip() for text in value if text is not None and str(text).strip()]
        elif value is not None:
            value = str(value).strip()
        if value:
            texts[column] = value
    if not texts:
        return {}
    if len(columns) > 1:
        return {"json": json.dumps({"caption": texts}, ensure_ascii=False)}
    (only,) = texts.values()
    return {"txt": only} if isinstance(only, str) else {"json": json.dumps({"caption": only}, ensure_ascii=False)}


def _check_columns(table: Path, wanted: Iterable[str], present: Iterable[str]) -> None:
    present = list(present)
    for column in wanted:
        if column not in present:
            raise InputError(
                f"{table} has no column {column!r}, only {', '.join(map(str, present))}; "
                "set --image-column, --caption-column or --key-column of shards write, --column of embed"
            )


def _text_rows(table: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    delimiter = TABLES[table.suffix.lower()]
    with table.open(encoding="utf-8-sig", newline="") as file:
        try:
            if delimiter is None:
                yield from _jsonl_rows(file, table, wanted)
                return
            reader = csv.DictReader(file, delimiter=delimiter, strict=delimiter == ",")
            _check_columns(table, wanted, reader.fieldnames or ())
            for row in reader:
                if delimiter == "\t" and any("\n" in value for value in row.values() if isinstance(value, str)):
                    raise InputError(
                        f"{table} line {reader.line_num}: a quotation mark opens a cell that swallows further lines; "
                        "close it, or double it where it is meant as text"
                    )
                yield row
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{table} cannot be read: {error}; expected UTF-8 text with one row per line") from error


def _jsonl_rows(lines: Iterable[str], table: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{table} line {number} is not JSON: {error}; expected one object per line") from error
        if not isinstance(row, dict):
            raise InputError(f"{table} line {number} is not a JSON object; expected one object per line")
        if number == 1:
            _check_columns(table, wanted, row)
        yield {column: row.get(column) for column in wanted}


def _parquet(table: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"{table} needs pyarrow; pip install 'mmpretrain-contrastive[parquet]'") from error
    try:
        return parquet.ParquetFile(table)
    except (ArrowException, OSError) as error:
        raise InputError(f"{table} cannot be read as parquet: {error}") from error


def _parquet_rows(table: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield rows; bytes stay in the file and are named by their cell."""
    with _parquet(table) as file:
        schema = file.schema_arrow
        _check_columns(table, wanted, schema.names)
        stored = str(schema.field(wanted[0]).type).startswith(("binary", "large_binary", "struct"))
        pictures = {wanted[0]} if stored else set()
        for row_group in range(file.num_row_groups):
            columns = sorted(set(wanted) - pictures)
            rows = file.read_row_group(row_group, columns=columns).to_pylist()
            count = file.metadata.row_group(row_group).num_rows
            for i in range(count):
                row = rows[i] if columns else {}
                yield {**row, **{name: ParquetCell(table, name, row_group, i) for name in pictures}}


@functools.lru_cache(maxsize=1)  # rows are read one after the other
def _parquet_column(table: Path, column: str, row_group: int) -> Any:
    with _parquet(table) as file:
        return file.read_row_group(row_group, columns=[column]).column(column)
