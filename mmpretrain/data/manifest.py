"""The manifest of a folder of shards: what they are made from, and which of them are finished."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmpretrain.data.sources import Item, ParquetCell
from mmpretrain.errors import InputError
from mmpretrain.whole_file import write_whole

MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"


class Done(NamedTuple):
    """One finished shard: file name, size in bytes, samples written, and what was skipped."""

    name: str
    bytes: int
    samples: int
    skipped: list[dict[str, str]]


class Ledger:
    """The manifest of a folder: what the shards are made from and which are finished."""

    def __init__(self, out: Path, content: dict[str, Any], shards: dict[str, tuple[int, int]]) -> None:
        self.out, self.content, self.shards = out, content, shards

    @classmethod
    def open(cls, out: Path, options: Mapping[str, Any], source: str, overwrite: bool) -> Ledger:
        """Read the folder's manifest, or begin one; leave only finished shards of the same source and
        options."""
        content = {"version": 1, "options": json.loads(json.dumps(options)), "source": source}
        old = _read_manifest(out / MANIFEST)
        present = sorted(path.name for path in out.glob("*.tar") if path.is_file())
        if old is None and present:
            raise InputError(f"{out} holds {present[0]} but no {MANIFEST}; write to an empty folder")
        if old is not None and overwrite:
            ours = re.compile(re.escape(old["options"].get("prefix", "")) + r"\d{5,}\.tar")
            for name in [MANIFEST, *(name for name in present if ours.fullmatch(name))]:
                (out / name).unlink()
                (out / f"{name}.idx.npz").unlink(missing_ok=True)
            old = None
        shards = {}
        if old is not None:
            _refuse_other(out, old, content)
            shards = {name: (size, samples) for name, (size, samples) in old["shards"].items()}
        kept = {name: shard for name, shard in shards.items() if (_size(out / name) or 0) == shard[0]}
        for leftover in out.glob(".*.tar.*.tmp"):  # of a killed run; two runs may not write to one folder
            leftover.unlink()
        ledger = cls(out, content, kept)
        rows = (out / SKIPPED).read_text("utf-8").splitlines(True) if (out / SKIPPED).exists() else []
        valid = [row for row in rows if row.endswith("\n") and json.loads(row)["shard"] in kept]
        write_whole(out / SKIPPED, "".join(valid))
        ledger.save()
        return ledger

    def add(self, done: Done) -> None:
        """Note a finished shard; its skips first, so that the manifest never claims more than is listed."""
        with (self.out / SKIPPED).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"shard": done.name, **row}, ensure_ascii=False) + "\n" for row in done.skipped)
        self.shards[done.name] = (done.bytes, done.samples)
        self.save()

    def save(self) -> None:
        """Write the manifest in one move."""
        write_whole(self.out / MANIFEST, json.dumps({**self.content, "shards": self.shards}, indent=1) + "\n")


def _read_manifest(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        sound = content["version"] == 1 and all(len(shard) == 2 for shard in content["shards"].values())
        if sound and {"options", "source"} <= content.keys():
            return dict(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{path} is no manifest of `mmpretrain shards write`; write to another folder or remove it")


def _refuse_other(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    how = "use the old ones, give another folder, or --overwrite"
    for name in sorted(old["options"].keys() | new["options"].keys()):
        was, now = old["options"].get(name), new["options"].get(name)
        if was != now:
            raise InputError(f"{out} was begun with {name}={was!r}, now it is {now!r}; {how}")
    if old["source"] != new["source"]:
        raise InputError(f"the source of {out} has changed since it was begun; give another folder, or --overwrite")


def fingerprint(items: Sequence[Item]) -> str:
    """Return a hash of the items and of size and time of every file they name."""
    digest = hashlib.sha256()
    stamps: dict[Path, str] = {}

    def stamp(path: Path) -> str:
        if path not in stamps:
            try:
                stat = path.stat()
                stamps[path] = f"{path.name} {stat.st_size} {stat.st_mtime_ns}"
            except OSError:
                stamps[path] = f"{path.name} missing"
        return stamps[path]

    for key, image, texts, sidecars in items:
        cell = (stamp(image.table), *image[1:]) if isinstance(image, ParquetCell) else stamp(image)
        beside = {field: stamp(path) for field, path in sidecars.items()}
        digest.update(json.dumps([key, cell, texts, beside]).encode())
    return digest.hexdigest()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
