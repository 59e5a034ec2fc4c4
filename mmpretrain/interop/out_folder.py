"""What every export needs: its packages, and a folder to fill, which appears whole or not at all."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from mmpretrain.errors import InputError
from mmpretrain.folders import others, put_in_place
from mmpretrain.interop.parity import REPORT


def needed(target: str, *packages: str) -> ModuleType:
    """Import what an export needs, the extra of that name, and return the first; `InputError` where one is missing."""
    try:
        first, *_ = [importlib.import_module(package) for package in packages]
    except ImportError as error:
        raise InputError(
            f"export {target} needs a package: {error}; pip install 'mmpretrain-contrastive[{target}]'"
        ) from error
    return first


@contextmanager
def new_folder(out: str | Path, target: str) -> Iterator[Path]:
    """Give an empty folder beside `out`, which becomes `out` when the block ends without an exception.

    An earlier export for the same `target` is replaced where it holds nothing but the files that its parity report
    lists; for anything else that is there: `InputError`.
    """
    place = Path(out)
    _check_replaceable(place, target)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        yield temporary
        _list_files(temporary)
        temporary.chmod(0o755)
        _check_replaceable(place, target)  # somebody may have put a file there in the meantime
        put_in_place(temporary, place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_replaceable(place: Path, target: str) -> None:
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    advice = "choose another folder, or remove it yourself"
    if not (place / REPORT).is_file():
        raise InputError(f"{place} exists and is no earlier export (no {REPORT}); {advice}")
    try:
        report = json.loads((place / REPORT).read_text(encoding="utf-8"))
        before, files = str(report["target"]), {str(name) for name in report["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{place / REPORT} does not list the files of an earlier export; {advice}") from error
    if before != target:
        raise InputError(f"{place} is an export for {before}, not for {target}; {advice}")
    if strange := others(place, {REPORT, *files}):
        more = f" and {len(strange) - 6} more" if len(strange) > 6 else ""
        raise InputError(f"{place} holds {', '.join(strange[:6])}{more}, which no export wrote; {advice}")


def _list_files(folder: Path) -> None:
    """Add the names of all files to the parity report, so that a later export knows what it may replace."""
    report = folder / REPORT
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    content = json.loads(report.read_text(encoding="utf-8"))
    report.write_text(json.dumps({**content, "files": files}, indent=1), encoding="utf-8")
