"""The folder a run's checkpoints lie in: their names and order, the links `latest` and `best`, and what is removed."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from mmpretrain.training.manifest import read, write
from mmpretrain.training.state_json import dumps, loads

_NAME = re.compile(r"step_(\d{8,12})(?:\.(\d{1,6}))?")


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, the newest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=age, reverse=True)


def step_of(path: Path) -> int:
    """Read a checkpoint's step from its name."""
    return age(path)[0]


def age(path: Path) -> tuple[int, int]:
    """Return what orders checkpoints: the step, and which save of that step it is."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def linked(folder: Path, name: str) -> Path | None:
    """Say which checkpoint the link `name` (`latest`, `best`) points at, whether it is there or not."""
    path = folder / name
    target = path.readlink().name if path.is_symlink() else ""
    return folder / target if _NAME.fullmatch(target) else None


def link(folder: Path, name: str, target: str) -> None:
    """Point the link `folder/name` at the checkpoint `target`, in one step that a crash cannot halve."""
    temporary = folder / f".{name}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    temporary.replace(folder / name)
    sync(folder)


def prune(folder: Path, keep: int) -> None:
    """Remove all but `latest`, the `keep - 1` of earlier steps before it, and `best`.

    Others of the same step or of later ones go, too: they are damaged, were never verified, or are of a course that
    was left when the run went back to an earlier step.
    """
    latest = linked(folder, "latest")
    found = checkpoints(folder)
    if latest is None or latest not in found:
        return
    earlier = [path for path in found if step_of(path) < step_of(latest)]
    kept = {latest, *earlier[: keep - 1], linked(folder, "best")}
    for path in found:
        if path not in kept:
            # Renamed first: half of a checkpoint must not bear the name of one.
            gone = path.with_name(f".{path.name}.removed")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
    if (folder / "best").is_symlink() and not (folder / "best").exists():
        (folder / "best").unlink()


def mark_best(folder: Path, step: int, monitor: str, value: float) -> None:
    """Point `best` at the checkpoint of `step` and keep its value in `best.json`; nothing where the save failed."""
    latest = linked(folder, "latest")
    if latest is None or not latest.exists() or step_of(latest) != step:
        return
    temporary = folder / f".best.json.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    write(temporary, dumps({"checkpoint": latest.name, "monitor": monitor, "value": value}))
    temporary.replace(folder / "best.json")
    link(folder, "best", latest.name)


def best_value(folder: Path, monitor: str, step: int) -> float | None:
    """Read the value of the checkpoint `best`, None where there is none, or it is later than `step`."""
    best, file = linked(folder, "best"), folder / "best.json"
    if best is None or not best.exists() or not file.is_file() or step_of(best) > step:
        return None
    try:
        content = loads(read(file, 1 << 16))
        same = (content["checkpoint"], content["monitor"]) == (best.name, monitor)
        return float(content["value"]) if same else None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
