"""A folder that an export fills: it appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmpretrain.errors import InputError
from mmpretrain.interop.parity import REPORT


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Give an empty folder beside `out`, which becomes `out` when the block ends without an exception.

    An earlier export (a folder with a parity report) is replaced; for anything else that is there: `InputError`.
    """
    target = Path(out)
    if target.exists() and not (target / REPORT).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists and is no earlier export (no {REPORT}); choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():  # a folder cannot be replaced in one step: the old one stays whole until the new is there
            target.rename(old)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
