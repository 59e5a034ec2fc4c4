"""A YAML file of a stranger is checked before it is read: a few lines of aliases can stand for a billion values."""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]

from mmpretrain.errors import InputError

MAX_BYTES = 2**20
MAX_VALUES = 100_000


def check_yaml(path: Path) -> None:
    """Raise `InputError` for a file with aliases (`*name`) of over 1 MiB, or that stands for over 100,000 values.

    Damaged YAML passes: whoever reads it says what is wrong.
    """
    data = path.read_bytes()
    if b"*" not in data or b"&" not in data:
        return
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: {len(data)} bytes of YAML with aliases, over the limit of {MAX_BYTES}; remove them")
    try:
        size = _size(yaml.compose(data, Loader=yaml.SafeLoader), {})
    except yaml.YAMLError:
        return
    except RecursionError as error:
        raise InputError(f"{path} is nested too deep, or holds itself; write it flat") from error
    if size > MAX_VALUES:
        raise InputError(f"{path}: its aliases stand for {size} values, over the limit of {MAX_VALUES}; write them out")


def _size(node: object, known: dict[int, int]) -> int:
    """Count values with every alias written out; what is shared is counted once and remembered."""
    if id(node) not in known:
        children: list[object] = []
        if isinstance(node, yaml.SequenceNode):
            children = list(node.value)
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]
