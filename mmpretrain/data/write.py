"""Write shards from items: in parallel, resumable, and with every picture checked."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from mmpretrain.data.manifest import SKIPPED, Done, Ledger, fingerprint
from mmpretrain.data.sources import Item, ParquetCell, read_picture
from mmpretrain.errors import InputError

_FIELD = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Written(NamedTuple):
    """What a folder of shards holds after writing: file names in order, samples, and pictures skipped."""

    shards: list[str]
    samples: int
    skipped: int


def write_shards(
    items: Sequence[Item],
    out: Path,
    options: Mapping[str, Any],
    samples_per_shard: int = 1000,
    workers: int = 1,
    prefix: str = "",
    overwrite: bool = False,
    progress: Callable[[Done, bool], None] = lambda done, kept: None,
) -> Written:
    """Write `items` to `out/<prefix>00000.tar` and so on, in their order, `samples_per_shard` items each.

    A shard appears under its name only when complete, and is then noted in `out/manifest.json`: run again
    after an interruption, finished shards are kept. Unreadable pictures are left out and listed in
    `out/skipped.jsonl`. `options` describe how the items came about and are compared on resuming.
    `progress(done, kept)` is called per shard. Raises `InputError` if `out` holds shards of another source or
    other options (unless `overwrite`), if the disk is full, or if no picture is readable.
    """
    if samples_per_shard < 1 or workers < 1:
        raise InputError(f"samples_per_shard={samples_per_shard}, workers={workers}; expected at least 1 each")
    if "/" in prefix or prefix.startswith("."):
        raise InputError(f"prefix {prefix!r} is no beginning of a file name; leave out slashes and leading dots")
    parts = [items[i : i + samples_per_shard] for i in range(0, len(items), samples_per_shard)]
    names = [f"{prefix}{i:05}.tar" for i in range(len(parts))]
    made_by = {**options, "samples_per_shard": samples_per_shard, "prefix": prefix}
    with _readable_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        ledger = Ledger.open(out, made_by, fingerprint(items), overwrite)
        for name in names:
            if name in ledger.shards:
                progress(Done(name, *ledger.shards[name], []), True)
        todo = [(out, name, part) for name, part in zip(names, parts) if name not in ledger.shards]
        for done in _run(todo, min(workers, len(todo))):
            ledger.add(done)
            progress(done, False)
    samples = sum(count for _, count in ledger.shards.values())
    if samples == 0:
        raise InputError(f"none of the {len(items)} pictures could be written; {out / SKIPPED} says why for each")
    return Written([name for name in names if ledger.shards[name][1]], samples, len(items) - samples)


def _run(todo: list[tuple[Path, str, Sequence[Item]]], workers: int) -> Iterator[Done]:
    """Yield shards as they are finished; on an error those in work are still finished and yielded first."""
    if workers <= 1:
        yield from (_write_one(*task) for task in todo)
        return
    error: BaseException | None = None
    queue = iter(todo)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running: set[Future[Done]] = set()
        while True:
            # No more than two tasks per worker wait: a task carries the whole item list of its shard.
            while error is None and len(running) < 2 * workers and (task := next(queue, None)) is not None:
                running.add(pool.submit(_write_one, *task))
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                if (failed := future.exception()) is not None:
                    error = error or failed
                    running -= {waiting for waiting in running if waiting.cancel()}
                else:
                    yield future.result()
    if error is not None:
        raise error


def _write_one(out: Path, name: str, items: Sequence[Item]) -> Done:
    """Write one shard under a temporary name, then give it its own."""
    from webdataset import TarWriter

    skipped: list[dict[str, str]] = []
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=out)
    try:
        with os.fdopen(handle, "wb") as file:
            # mtime=0: the same source gives the same bytes. pax: names of any length.
            with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:
                for item in items:
                    try:
                        fields = _read(item)
                    except (
                        OSError,
                        ValueError,
                    ) as error:  # InputError and UnicodeDecodeError are ValueErrors
                        reason = " ".join(str(error).split())
                        skipped.append({"key": item.key, "image": _where(item.image), "reason": reason})
                    else:
                        writer.write({"__key__": item.key, **fields})
            file.flush()
            os.fsync(file.fileno())
        if len(skipped) == len(items):  # readers take a shard without a sample for a damaged one
            Path(temporary).unlink()
            return Done(name, 0, 0, skipped)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(out / name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return Done(name, (out / name).stat().st_size, len(items) - len(skipped), skipped)


def _read(item: Item) -> dict[str, bytes]:
    """Return the fields of an item; raises OSError or ValueError with the reason why it cannot be written."""
    fields = {field: text.encode() for field, text in item.texts.items()}
    fields |= {field: path.read_bytes() for field, path in item.sidecars.items()}
    if not fields:
        raise ValueError("no caption")
    if not str(fields.get("txt", b"-"), "utf-8-sig").strip():
        raise ValueError("the caption in txt is empty")
    if "json" in fields:
        json.loads(fields["json"])
    data = read_picture(item.image)
    return {_picture_field(data): data, **fields}


def _picture_field(data: bytes) -> str:
    """Decode a picture as training will, and return the field its format belongs to."""
    from PIL import UnidentifiedImageError

    from mmpretrain.data.decode import DecodeError, Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on odd metadata; what matters raises
        decoder = Image(transform=lambda image, generator: NotImplemented, extensions=("picture",))
        try:
            with decoder.open({"picture": data}) as image:
                return _FIELD.get(image.format or "", "jpg")
        except DecodeError as error:
            if isinstance(error.__cause__, UnidentifiedImageError):
                raise ValueError("not a picture in a format that training reads") from error
            raise ValueError(str(error).removeprefix("a sample, field picture: ")) from error


def _where(image: Path | ParquetCell) -> str:
    return str(image) if isinstance(image, Path) else f"{image.table} row group {image.row_group} row {image.row}"


@contextlib.contextmanager
def _readable_errors(out: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line that says what to do."""
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in _FULL else "it cannot be written"
        raise InputError(
            f"{out}: {what} ({error.strerror or error}); finished shards are kept; "
            "make room or fix this, then run the same command again"
        ) from error
