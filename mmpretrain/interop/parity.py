"""How far an exported model is from ours: the report every export writes, and the limit beyond which it is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.whole_file import write_whole

REPORT = "parity.json"
PACKAGES = ("mmpretrain-contrastive", "torch", "timm")
"""Whose versions every report names; `check` takes further ones."""
SHOWN = 6
"""How many outputs an error lists."""


class Parity(NamedTuple):
    """What was compared and how far apart it was.

    `target`: the format, or the library that ran the other side. `errors`: output -> max abs error. `inputs`: what both
    sides were given, as JSON: seed, shapes, whatever is needed to give it again. `versions`: package -> version.
    `notes`: differences (max abs) that are known and not held against the tolerance.
    """

    target: str
    errors: dict[str, float]
    tolerance: float
    inputs: dict[str, Any]
    versions: dict[str, str]
    notes: dict[str, float] | None = None

    @property
    def said(self) -> str:
        """The notes in a sentence, empty where there is nothing to say."""
        found = {name: error for name, error in (self.notes or {}).items() if not error <= self.tolerance}
        listed = ", ".join(f"{name} differ by up to {error:.2g}" for name, error in found.items())
        return f"{self.target} reads some files otherwise than this model: {listed} (normalised)" if found else ""

    @property
    def largest(self) -> float:
        """The largest error of all outputs."""
        return max(self.errors.values())

    def write(self, folder: str | Path) -> Path:
        """Write `parity.json` into an existing folder, whole or not at all."""
        path = Path(folder) / REPORT
        content = {**self._asdict(), "notes": self.notes or {}, "largest": self.largest}
        write_whole(path, json.dumps(content, indent=1, allow_nan=False))
        return path


def check(
    outputs: Mapping[str, tuple[Tensor, Tensor]],
    tolerance: float,
    inputs: Mapping[str, Any],
    target: str,
    packages: Iterable[str] = (),
    notes: Mapping[str, float] | None = None,
) -> Parity:
    """Compare pairs (theirs, ours) of outputs that must be equal, in float64.

    `packages` are further ones whose versions the report names; `notes` are not held against `tolerance`. Raises
    `InputError` where an output has another shape, is not finite or is further away than `tolerance` (max abs), saying
    which and by how much; and for no outputs.
    """
    if not outputs:
        raise InputError(f"{target}: no output was compared, so nothing is known of it")
    errors = {name: max_abs_error(*pair) for name, pair in outputs.items()}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        said = [_said(name, *outputs[name], error) for name, error in list(wrong.items())[:SHOWN]]
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise InputError(
            f"{target}: {len(wrong)} of {len(errors)} outputs differ by more than {tolerance:g}: "
            f"{'; '.join(said)}{more}. Nothing was kept; the exported model does not compute what this one does"
        )
    return Parity(target, errors, tolerance, dict(inputs), versions([*PACKAGES, *packages]), dict(notes or {}))


def max_abs_error(theirs: Tensor, ours: Tensor) -> float:
    """Largest absolute difference of two tensors; infinite where shapes differ or a value is not finite."""
    if theirs.shape != ours.shape:
        return math.inf
    if not theirs.numel():
        return 0.0
    error = float((theirs.detach().cpu().double() - ours.detach().cpu().double()).abs().max())
    return error if math.isfinite(error) else math.inf


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _said(name: str, theirs: Tensor, ours: Tensor, error: float) -> str:
    if theirs.shape != ours.shape:
        return f"{name} has shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}"
    return f"{name} by {error:.2e}" if math.isfinite(error) else f"{name} has values that are not finite"
