"""Results kept on disk, one file for each model, data set and task, so that an evaluation that was killed goes on."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmpretrain.data.cache import REMOTE, local_path, scheme_of
from mmpretrain.data.patterns import expand
from mmpretrain.data.redact import redact
from mmpretrain.errors import InputError
from mmpretrain.evaluation.candidates import Candidate
from mmpretrain.whole_file import write_whole

FORMAT = 1
SPEED = ("batch_size", "num_workers")
"""Arguments of a task that change how fast it is, and no result."""


class Work(NamedTuple):
    """One way to measure on one data set: `config` builds the evaluator, `key` is all that decides its result."""

    data_set: str
    task: str
    config: dict[str, Any]
    key: dict[str, Any]


class Measured(NamedTuple):
    """What a model scored: `metrics` are flat, as an evaluator gives them."""

    candidate: Candidate
    work: Work
    metrics: dict[str, float]


def work(data_set: str, task: str, config: Mapping[str, Any], device: str) -> Work:
    """Describe a piece of work by the config of its evaluator, without interpolations.

    The key holds that config (but for `SPEED`), the kind of device, this package's version, and of every local file or
    folder that the config names, as such or by a pattern, the names, sizes and times of the files. Of an address with
    a password or a signature it holds a digest: it is written down.
    """
    from mmpretrain import __version__

    plain = json.loads(json.dumps(config))
    files = {path: state_of(Path(path)) for path in sorted(set(_paths(plain)))}
    key = {
        "data_set": data_set,
        "task": task,
        "config": _decisive(plain),
        "files": files,
        "device": device.partition(":")[0],
        "mmpretrain": __version__,
    }
    return Work(data_set, task, dict(config), key)


def state_of(path: Path) -> str:
    """Digest names, sizes and times of a file or of all files in a folder; indexes that readers leave there are not.

    Links are followed, to each folder once; one that leads nowhere counts by its name alone.
    """
    found, seen = [], set()
    walk = os.walk(path, followlinks=True) if path.is_dir() else [(str(path.parent), [], [path.name])]
    for folder, folders, files in walk:
        if (place := os.path.realpath(folder)) in seen:  # a link to a folder above would never end
            folders.clear()
            continue
        seen.add(place)
        folders.sort()
        for name in sorted(files):
            if not name.startswith(".") and not name.endswith(".idx.npz"):
                file = Path(folder, name)
                status = f"{(s := file.stat()).st_size} {s.st_mtime_ns}" if file.exists() else "missing"
                found.append(f"{os.path.relpath(folder, path)}/{name} {status}")
    return hashlib.sha256("\n".join(found).encode("utf-8", "surrogateescape")).hexdigest()


class Results:
    """A folder of results; each file holds its whole key, so none is ever taken for another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, candidate: Candidate, work: Work) -> dict[str, float] | None:
        """Return the metrics kept of this work on this model; None where there are none, or the file is damaged."""
        try:
            content = json.loads(self._path(candidate, work).read_text(encoding="utf-8"))
            metrics = {str(name): float(value) for name, value in content["metrics"].items()}
            same = content["format"] == FORMAT and content["key"] == _key(candidate, work)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return metrics if same and all(math.isfinite(value) for value in metrics.values()) else None

    def save(self, candidate: Candidate, work: Work, metrics: Mapping[str, float], seconds: float) -> None:
        """Keep the metrics of this work on this model."""
        content = {
            "format": FORMAT,
            "model": candidate.name,
            "seconds": round(seconds, 3),
            "key": _key(candidate, work),
            "metrics": dict(metrics),
        }
        write_whole(self._path(candidate, work), json.dumps(content, indent=1, allow_nan=False) + "\n")

    def _path(self, candidate: Candidate, work: Work) -> Path:
        key = hashlib.sha256(json.dumps(_key(candidate, work), sort_keys=True).encode()).hexdigest()
        data_set = re.sub(r"[^\w.-]+", "_", work.data_set, flags=re.ASCII).strip(".")[:80]
        task = re.sub(r"\W+", "_", work.task, flags=re.ASCII)[:40]
        return self.folder / candidate.identity[:16] / f"{'-'.join(filter(None, (data_set, task)))}-{key[:16]}.json"


def _key(candidate: Candidate, work: Work) -> dict[str, Any]:
    return {"model": candidate.identity, **work.key}


def _decisive(config: Any) -> Any:
    """Return what of a config decides the result, and no secret."""
    if isinstance(config, dict):
        return {key: _decisive(value) for key, value in config.items() if key not in SPEED}
    if isinstance(config, str) and (shown := redact(config)) != config:
        return f"{shown} {hashlib.sha256(config.encode()).hexdigest()[:16]}"
    return [_decisive(value) for value in config] if isinstance(config, list) else config


def _paths(config: Any) -> Iterator[str]:
    """Yield all that exists of what a config's texts name: paths, and patterns of shards; `~` is the home folder."""
    if isinstance(config, str):
        yield from _existing(os.path.expanduser(config))  # noqa: PTH111 (a text need not be a path)
    elif isinstance(config, (dict, list)):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _paths(value)


def _existing(text: str) -> list[str]:
    if os.path.exists(text):  # noqa: PTH110 (Path.exists raises for a text that is too long for a path)
        return [text]
    if not ("{" in text or glob.has_magic(text) or text.startswith("file:")):
        return []
    try:
        paths = [str(local_path(shard)) for shard in expand(text) if scheme_of(shard) not in REMOTE]
    except (InputError, OSError, ValueError):  # a sentence with a place for a name, most likely
        return []
    return [path for path in paths if os.path.exists(path)]  # noqa: PTH110
