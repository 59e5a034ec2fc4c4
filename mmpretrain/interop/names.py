"""Tables of weight names that are read both ways: another library's names on the left, ours on the right.

One table is the importer and the exporter of a layout, so what is written can always be read again, to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmpretrain.errors import InputError

Tensors = tuple[Tensor, ...]

VARIABLES = {"n": r"\d+", "m": r"\d+", "p": "weight|bias", "rest": ".+"}
"""What may stand in braces in a template, and what it matches; `{n}` is the number of a layer."""
SHOWN = 12
"""How many names an error lists."""


class Entry(NamedTuple):
    """Some of their tensors and the same numbers in ours; names are templates such as `blocks.{n}.norm.{p}`.

    `to_ours` and `to_theirs` are each other's inverse. Every template of an entry has the same variables.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Tensors], Tensors]
    to_theirs: Callable[[Tensors], Tensors]


Table = Sequence[Entry]


def same(theirs: str, ours: str) -> Entry:
    """The same tensor under another name."""
    return Entry((theirs,), (ours,), _as_it_is, _as_it_is)


def transposed(theirs: str, ours: str) -> Entry:
    """A matrix that multiplies from the right (in,out), where a `Linear` holds (out,in)."""
    return Entry((theirs,), (ours,), _transpose, _transpose)


def shaped(theirs: str, ours: str, to_ours: Callable[[Tensor], Tensor], to_theirs: Callable[[Tensor], Tensor]) -> Entry:
    """The same numbers in another shape, such as `lambda x: x[None]` and `lambda x: x[0]`."""
    return Entry((theirs,), (ours,), lambda tensors: (to_ours(tensors[0]),), lambda tensors: (to_theirs(tensors[0]),))


def joined(theirs: str, ours: Sequence[str]) -> Entry:
    """One tensor of theirs that holds several of ours, equally large, one below the other (query, key, value)."""
    return Entry((theirs,), tuple(ours), lambda tensors: tensors[0].chunk(len(ours)), _stacked)


def split(theirs: Sequence[str], ours: str) -> Entry:
    """Several tensors of theirs, equally large, that ours holds as one, one below the other."""
    return Entry(tuple(theirs), (ours,), _stacked, lambda tensors: tensors[0].chunk(len(theirs)))


def beneath(table: Iterable[Entry], theirs: str = "", ours: str = "") -> list[Entry]:
    """The same table with a prefix before all names of each side."""
    return [
        entry._replace(theirs=tuple(theirs + name for name in entry.theirs), ours=tuple(ours + n for n in entry.ours))
        for entry in table
    ]


def to_ours(tensors: Mapping[str, Tensor], table: Table, source: str) -> dict[str, Tensor]:
    """Return another library's tensors under our names.

    Raises `InputError`, naming `source`, for a tensor that no entry takes and for one whose partners are missing.
    """
    return _renamed(tensors, [(e.theirs, e.ours, e.to_ours) for e in table], source)


def to_theirs(tensors: Mapping[str, Tensor], table: Table, target: str) -> dict[str, Tensor]:
    """Return our tensors under another library's names; raises as `to_ours`."""
    return _renamed(tensors, [(e.ours, e.theirs, e.to_theirs) for e in table], target)


Way = tuple[tuple[str, ...], tuple[str, ...], Callable[[Tensors], Tensors]]


def _renamed(tensors: Mapping[str, Tensor], ways: Sequence[Way], other: str) -> dict[str, Tensor]:
    patterns = [(re.compile(_pattern(given[0])), given, made, convert) for given, made, convert in ways]
    left, found, missing = dict(tensors), dict[str, Tensor](), list[str]()
    for name in tensors:
        for pattern, given, made, convert in patterns:
            match = pattern.fullmatch(name)
            if match is None or name not in left:
                continue
            names = [_filled(template, match) for template in given]
            if lacking := [part for part in names if part not in left]:
                missing += [part for part in lacking if part not in missing]
                continue
            taken = tuple(left.pop(part) for part in names)
            ours = [_filled(template, match) for template in made]
            try:
                found |= dict(zip(ours, convert(taken), strict=True))
            except (RuntimeError, ValueError, IndexError, TypeError) as error:  # too few rows or dimensions
                shapes = ", ".join(f"{part} {tuple(x.shape)}" for part, x in zip(names, taken, strict=True))
                message = f"{other}: wrong shapes {shapes}; {', '.join(ours)} cannot be made of them"
                raise InputError(message) from error
    for name in left:  # a second partner, say, whose first is not there
        for given in (given for _, given, _, _ in patterns if len(given) > 1):
            matches = [re.fullmatch(_pattern(template), name) for template in given]
            for match in filter(None, matches):
                missing += [part for part in (_filled(t, match) for t in given) if part not in {*tensors, *missing}]
    if left or missing:
        raise InputError(
            f"{other}: no place for {_listed(sorted(left))}; missing partners: {_listed(missing)}. "
            "The weights are of another kind than was asked for, or not complete"
        )
    return found


def check_keys(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Raise `InputError` unless `given` has the names and shapes of `expected`; all that differ are said at once."""
    missing = sorted(set(expected) - set(given))
    extra = sorted(set(given) - set(expected))
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(set(given) & set(expected))
        if given[name].shape != expected[name].shape
    ]
    if missing or extra or shapes:
        raise InputError(
            f"{source} does not fit the model: missing {_listed(missing)}; extra {_listed(extra)}; "
            f"wrong shapes {_listed(shapes)}"
        )


def check_numbers(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Raise `InputError` for weights of the same names that are no finite floats where `expected` has floats.

    Quantised integers need scales that are not here, and complex numbers would lose their imaginary part.
    """
    floats = [name for name in sorted(set(given) & set(expected)) if expected[name].is_floating_point()]
    kinds = [
        f"{name} ({str(given[name].dtype).removeprefix('torch.')})"
        for name in floats
        if not given[name].is_floating_point()
    ]
    kinds += [f"{name} (complex)" for name in sorted(given) if name not in floats and given[name].is_complex()]
    if kinds:
        raise InputError(f"{source} holds weights that are no floats: {_listed(kinds)}; save the model in float32")
    if broken := [name for name in floats if not given[name].isfinite().all()]:
        raise InputError(
            f"{source} holds NaN or infinity (in float32) in {_listed(broken)}; take weights from before the model "
            "broke, or a file that is not damaged"
        )


def _pattern(template: str) -> str:
    parts, seen = re.split(r"\{(\w+)\}", template), set[str]()
    pattern = ""
    for index, part in enumerate(parts):
        if index % 2 == 0:
            pattern += re.escape(part)
        else:
            pattern += f"(?P={part})" if part in seen else f"(?P<{part}>{VARIABLES[part]})"
            seen.add(part)
    return pattern


def _filled(template: str, match: re.Match[str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: match[found[1]], template)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) + more) or "none"


def _as_it_is(tensors: Tensors) -> Tensors:
    return tensors


def _transpose(tensors: Tensors) -> Tensors:
    return (tensors[0].T.contiguous(),)


def _stacked(tensors: Tensors) -> Tensors:
    return (torch.cat(tensors),)
