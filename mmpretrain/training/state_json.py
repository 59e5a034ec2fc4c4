"""Training state as JSON and named tensors, so that nothing in a checkpoint needs unpickling."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mmpretrain.errors import InputError

MAX_DEPTH = 64
"""Levels of nesting a state may have; a reader goes no deeper."""


class Packed(NamedTuple):
    """A state taken apart: `tree` is JSON, and names the tensors that lie in `tensors`."""

    tree: Any
    tensors: dict[str, Tensor]


def pack(state: Any) -> Packed:
    """Take a nested state of dicts, lists, tuples, tensors, numbers, text, booleans and None apart.

    Plain values stay themselves. JSON objects are tags: `{"dict": {...}}` (text keys), `{"items": [[key, value]]}`
    (other keys), `{"tuple": [...]}`, `{"float": "nan"}`, and `{"tensor": name}`, for a tensor sharded over ranks
    with its shape and the dimension that is cut. A tensor that occurs twice is stored once. Raises `InputError` for
    any other type, naming where it is.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def tensor(value: Tensor, path: tuple[str, ...]) -> dict[str, Any]:
        value = value.detach()
        local = value.to_local() if isinstance(value, DTensor) else value
        if local.layout != torch.strided or local.is_quantized or local.device.type == "meta":
            raise InputError(
                f"checkpoint: {'.'.join(path)} is a {local.layout} tensor on {local.device}; only dense ones"
            )
        same = (local.data_ptr(), local.device, local.dtype, value.shape, local.stride())
        if local.numel() == 0 or same not in names:
            name = ".".join(path)
            while name in tensors:
                name += "_"
            tensors[name] = value
            names[same] = name
        else:
            name = names[same]
        if not isinstance(value, DTensor):
            return {"tensor": name}
        cut = [place.dim for place in value.placements if isinstance(place, Shard)]
        if len(cut) > 1:
            raise InputError(
                f"checkpoint: {'.'.join(path)} is cut along {cut}; a tensor may be cut along one dimension"
            )
        return {"tensor": name, "shape": [*value.shape], "cut": cut[0] if cut else None}

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > MAX_DEPTH:
            raise InputError(f"checkpoint: {'.'.join(path[:4])}... is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if isinstance(value, Tensor):
            return tensor(value, path)
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value):
                return {"dict": {str(key): walk(item, (*path, key)) for key, item in value.items()}}
            return {"items": [[walk(key, path), walk(item, (*path, str(key)))] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [walk(item, (*path, str(index))) for index, item in enumerate(value)]}
        if isinstance(value, list):
            return [walk(item, (*path, str(index))) for index, item in enumerate(value)]
        raise InputError(
            f"checkpoint: {'.'.join(path)} is a {type(value).__module__}.{type(value).__qualname__}; a state may hold "
            "dicts, lists, tuples, tensors, numbers, text, booleans and None"
        )

    return Packed(walk(state, ()), tensors)


def unpack(tree: Any, tensor: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Put a state together again; `tensor` finds `{"tensor": name, ...}`. Raises `ValueError` for other JSON."""

    def walk(value: Any, depth: int) -> Any:
        if depth > 3 * MAX_DEPTH:
            raise ValueError("nested too deep")
        if isinstance(value, list):
            return [walk(item, depth + 1) for item in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return tensor(value)
        if len(value) != 1:
            raise ValueError(f"an object of {len(value)} entries is no tag")
        ((tag, content),) = value.items()
        if tag == "dict" and isinstance(content, dict):
            return {key: walk(item, depth + 1) for key, item in content.items()}
        if tag == "float" and content in ("nan", "inf", "-inf"):
            return float(content)
        if tag == "tuple" and isinstance(content, list):
            return tuple(walk(item, depth + 1) for item in content)
        if tag == "items" and isinstance(content, list):
            pairs = [walk(pair, depth + 1) for pair in content]
            if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                try:
                    return {key: item for key, item in pairs}  # noqa: C416  (a list as key is a TypeError)
                except TypeError as error:
                    raise ValueError(str(error)) from None
        raise ValueError(f"unknown tag {tag!r:.40}")

    return walk(tree, 0)


def dumps(value: Any) -> bytes:
    """Write JSON in the one form that `loads` takes back: compact, in the order given, ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def loads(data: bytes) -> Any:
    """Read JSON; raises `ValueError` for anything that is not plain JSON of bounded depth."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(data, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None
