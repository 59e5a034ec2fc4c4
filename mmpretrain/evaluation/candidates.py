"""Which models a suite evaluates: model folders, runs, checkpoints of a run, and what identifies each of them."""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mmpretrain.errors import InputError
from mmpretrain.pretrained import CONFIG, NAMED, WEIGHTS, Pretrained, load, locate
from mmpretrain.training.folder import checkpoints, step_of
from mmpretrain.training.manifest import MANIFEST, STATE, digest

TOKENIZER = "tokenizer.json"


class Candidate(NamedTuple):
    """A model to evaluate.

    `name`: how tables call it. `run`, `step`: of which run and step of training it is, None where that is not known.
    `identity`: a digest of weights and config; the same model under another name has the same. `path`: where it lies.
    """

    name: str
    run: str | None
    step: int | None
    identity: str
    path: str

    def load(self, device: str | torch.device, allow: Sequence[str] = ()) -> Pretrained:
        """Load it in evaluation mode; `allow` names packages of your own whose classes its config may build."""
        if is_step(Path(self.path)):
            from mmpretrain.training.step_model import load_step

            return load_step(Path(self.path), device, allow)
        return load(self.path, device, allow)


def find(given: str | Sequence[str]) -> list[Candidate]:
    """Find what `checkpoint=` names: one or several model folders, run folders, checkpoints, or patterns of such.

    A folder of checkpoints (`RUN/checkpoints`) stands for all of them, in the order of their steps; what is named twice
    is taken once. Raises `InputError` where something is no model, or a pattern matches nothing.
    """
    specs = [given] if isinstance(given, str) else [str(spec) for spec in given]
    if not specs:
        raise InputError("checkpoint is empty; give a model folder, a run folder, or a list of such")
    places: dict[str, str] = {}  # where it really lies -> as given
    for spec in specs:
        for place in _places(spec):
            places.setdefault(str(place), spec)
    return _named([_candidate(Path(place), spec) for place, spec in places.items()])


def names_one(given: str | Sequence[str]) -> bool:
    """Whether `checkpoint=` names one model as such: no list, no pattern, no folder of checkpoints."""
    if not isinstance(given, str):
        return False
    path = Path(given).expanduser()
    return (path.exists() and (is_step(path) or not checkpoints(path))) or bool(NAMED.match(given))


def is_step(path: Path) -> bool:
    """Whether a folder is a checkpoint of a run; a run folder has a manifest, too."""
    return (path / MANIFEST).is_file() and (path / STATE).is_file()


def _places(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if path.exists():
        return _expanded(path)
    if NAMED.match(spec):  # a published model: it is fetched and converted once
        return [locate(spec)]
    if glob.has_magic(spec):
        found = sorted(glob.glob(str(path)))  # noqa: PTH207 (takes absolute ones)
        if not found:
            raise InputError(f"checkpoint={spec!r} matches nothing; correct the pattern")
        places = [place for match in found for place in _expanded(Path(match))]
        return sorted(places, key=lambda place: (str(place.parent), step_of(place) if is_step(place) else -1))
    raise InputError(f"checkpoint={spec!r}: there is no such path; it is not a model folder, a run or a checkpoint")


def _expanded(path: Path) -> list[Path]:
    """Follow links, so that `latest` has the name of a step, and list the checkpoints of a folder of them."""
    path = path.resolve()
    steps = [] if is_step(path) else checkpoints(path)
    return sorted(steps, key=step_of) or [path]


def _candidate(path: Path, spec: str) -> Candidate:
    if is_step(path):
        from mmpretrain.training.step_model import run_adapters, run_parts

        adapters = run_adapters(path)  # their scale decides what weights the model has
        described = run_parts(path) if adapters is None else {**run_parts(path), "lora": adapters}
        parts = json.dumps(described, sort_keys=True)
        identity = _hash([parts.encode(), (path / MANIFEST).read_bytes()])
        run = path.parents[1]
        return Candidate(f"{_short(run)}@{step_of(path)}", _short(run), step_of(path), identity, str(path))
    for folder, run in ((path, path.parent), (path / "model", path)):
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            files = [folder / name for name in (CONFIG, WEIGHTS, TOKENIZER) if (folder / name).is_file()]
            identity = _hash([f"{file.name} {digest(file)}".encode() for file in files])
            if not (run / "metrics.json").is_file():
                published = NAMED.match(spec) and not Path(spec).exists()
                return Candidate(spec if published else _short(folder), None, None, identity, str(folder))
            return Candidate(_short(run), _short(run), _last_step(run), identity, str(folder))
    raise InputError(
        f"{path} is not a model folder (no {WEIGHTS} with {CONFIG}), no run folder that holds one, and no checkpoint; "
        "give runs/<experiment>/latest/model, or runs/<experiment>/latest/checkpoints"
    )


def _last_step(run: Path) -> int | None:
    try:
        return int(json.loads((run / "metrics.json").read_text(encoding="utf-8"))["train/steps"])
    except (ValueError, KeyError, TypeError):
        return None


def _short(path: Path) -> str:
    """Name a folder by its path from here, or by its last two parts where it lies elsewhere."""
    here = Path.cwd().resolve()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else "/".join(path.parts[-2:])


def _named(candidates: list[Candidate]) -> list[Candidate]:
    """Make equal names different by a piece of the identity, or of the place where even that is the same."""
    count = Counter(candidate.name for candidate in candidates)
    named = [c._replace(name=f"{c.name} {c.identity[:8]}") if count[c.name] > 1 else c for c in candidates]
    count = Counter(candidate.name for candidate in named)
    return [c._replace(name=c.path) if count[c.name] > 1 else c for c in named]


def _hash(parts: list[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
