"""Where this library keeps what it made, and how a new folder takes the place of an old one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mmpretrain.errors import InputError


def cache_root() -> Path:
    """Return $MMPRETRAIN_CACHE, else ~/.cache/mmpretrain."""
    return Path(os.environ.get("MMPRETRAIN_CACHE") or Path.home() / ".cache" / "mmpretrain").expanduser()


def put_in_place(new: Path, target: Path) -> None:
    """Rename the folder `new` to `target` on the same file system, and remove the one that was there.

    Raises `InputError` where the system refuses; the old folder then has its name again, or the error says where it is.
    """
    old = new.with_name(f"{new.name}.old")
    try:
        if target.exists():  # a folder cannot be replaced in one step: the old one stays whole until the new is there
            target.rename(old)
        new.rename(target)
    except BaseException as error:
        kept = _put_back(old, target)
        if isinstance(error, OSError):
            raise InputError(f"{target} cannot be written: {error}{kept}") from error
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def others(folder: Path, names: set[str]) -> list[str]:
    """Name what a folder holds that is no plain file called one of `names` (paths with `/` inside), sorted."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    parents = {parent.as_posix() for name in names for parent in Path(name).parents}
    return sorted(
        name
        for name, path in found.items()
        if not (name in parents if path.is_dir() and not path.is_symlink() else name in names)
    )


def _put_back(old: Path, target: Path) -> str:
    if not old.exists():
        return ""
    try:
        if not target.exists():
            old.rename(target)
            return "; what was there is as it was"
    except OSError:
        pass
    return f"; what was there is now {old}"
