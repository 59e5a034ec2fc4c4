"""Files that are whole or not there: a reader, or a crash, meets the old file or the new one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Give an empty file beside `target`, which is on the disk and takes its place when the block ends well."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    # Not tempfile's: those are private to their owner, and colleagues share shards and results.
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: str | Path, text: str) -> None:
    """Write a text as UTF-8 to a file that is never half written; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        # Captions may hold lone surrogates, which are no UTF-8.
        temporary.write_bytes(text.encode("utf-8", "replace"))
