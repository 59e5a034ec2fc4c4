"""Class names and templates of well-known data sets, from the files of the `clip-benchmark` package."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

from mmpretrain.errors import InputError

PREFIXES = ("wds/", "tfds/", "vtab/")
"""What CLIP_benchmark puts before a name to say where the data comes from."""


def benchmark_classes(name: str, language: str = "en") -> list[str]:
    """Return the class names of a data set, in the order of its labels; raises `InputError` for an unknown name."""
    known = _file(f"{language}_classnames.json")
    key = _key(name, known)
    if key is None:
        raise InputError(
            f"clip-benchmark has no class names for {name!r}; it has {', '.join(sorted(known))}: "
            "give one of them, or write classnames.txt beside the shards"
        )
    return [str(label) for label in known[key]]


def benchmark_templates(name: str, language: str = "en") -> list[str]:
    """Return the templates of a data set, or ImageNet's for one that has none of its own, `{}` in place of the name."""
    known = _file(f"{language}_zeroshot_classification_templates.json")
    found = with_braces([str(template) for template in known[_key(name, known) or "imagenet1k"]])
    return found or []


def with_braces(templates: list[str] | None) -> list[str] | None:
    """Write CLIP_benchmark's templates, with {c} where the class name belongs, as ours, with {}."""
    return None if templates is None else [template.replace("{c}", "{}") for template in templates]


def _key(name: str, known: dict[str, Any]) -> str | None:
    """Return the name that a table has for a data set: as it is given, or without where the data comes from."""
    for prefix in PREFIXES:
        if name not in known and name.startswith(prefix):
            name = name.removeprefix(prefix)
            # The only set of VTAB with classes in an order of its own, Caltech 101, is called so.
            name = f"{name}_vtab" if prefix == "vtab/" and f"{name}_vtab" in known else name
    return name if name in known else None


@functools.lru_cache
def _file(name: str) -> dict[str, Any]:
    try:
        # Only its files are read: importing its modules would import every reader of data sets there is.
        place = files("clip_benchmark").joinpath("datasets", name)
    except ModuleNotFoundError as error:
        raise InputError(
            "class names and templates by data set need clip-benchmark; pip install 'mmpretrain-contrastive[eval]', "
            "or write classnames.txt and zeroshot_classification_templates.txt beside the shards"
        ) from error
    if not place.is_file():
        raise InputError(f"clip-benchmark has no {name}; give a language it has, such as en")
    table: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return table
