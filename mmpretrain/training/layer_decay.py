"""Learning rates that fall towards the input (Clark et al. 2020; Bao et al. 2021): early layers change least.

In an encoder of n blocks, the layers are 0 (embeddings, positions, patches), 1 to n (blocks; what follows the last one
up to the pooling belongs to it). Layer i learns at decay^(n+1-i) of the rate; what is in no layer (poolers,
projections, fusion, heads, logit scale and bias) learns at the full rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn

from mmpretrain.errors import InputError


def with_layer_decay(groups: Sequence[dict[str, Any]], model: nn.Module, decay: float | None) -> list[dict[str, Any]]:
    """Split parameter groups by layer and give each `lr_scale`; groups come back as they are where `decay` is None.

    The group that holds the highest rate comes first. Raises `InputError` for a decay outside (0, 1].
    """
    if decay is None:
        return list(groups)
    if not isinstance(decay, (int, float)) or not 0 < decay <= 1:
        raise InputError(f"optimizer.layer_decay is {decay}; expected more than 0 and at most 1, or null for none")
    scale_of = {id(p): scale for name, p, scale in _scaled(model, decay)}
    split: list[dict[str, Any]] = []
    for group in groups:
        scales = sorted({scale_of[id(p)] for p in group["params"]}, reverse=True)
        split += [
            {**group, "params": [p for p in group["params"] if scale_of[id(p)] == scale], "lr_scale": scale}
            for scale in scales
        ]
    return sorted(split, key=lambda group: -group["lr_scale"])


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return what the learning rate of each parameter is multiplied with, by name."""
    return {name: scale for name, _, scale in _scaled(model, decay)}


def _scaled(model: nn.Module, decay: float) -> list[tuple[str, nn.Parameter, float]]:
    depths: dict[str, int] = {}
    for encoder, module in getattr(model, "encoders", {}).items():
        depths |= {f"encoders.{encoder}.{name}": depth for name, depth in distances(module).items()}
    return [(name, parameter, decay ** depths.get(name, 0)) for name, parameter in model.named_parameters()]


def distances(encoder: nn.Module) -> dict[str, int]:
    """Return n+1-i for the name of each parameter in layer i of n of an encoder; others are in no layer."""
    for prefix, part in encoder.named_modules():
        matcher = getattr(part, "group_matcher", None)
        if matcher is not None:
            start = f"{prefix}." if prefix else ""
            return {f"{start}{name}": distance for name, distance in _by_timm(part, matcher(coarse=False)).items()}
    return _by_order(encoder)


def _by_timm(backbone: nn.Module, matcher: Any) -> dict[str, int]:
    """Group by timm's own table of each backbone; what it does not name (heads, poolers) is in no layer."""
    outside = "~"  # the name of no parameter: it gets the number that timm gives what its table lacks
    named = chain(((name, None) for name, _ in backbone.named_parameters()), [(outside, None)])
    numbers: dict[str, int] = group_with_matcher(named, matcher, reverse=True)
    end = numbers.pop(outside)
    return {name: end - number for name, number in numbers.items() if number < end}


def _by_order(encoder: nn.Module) -> dict[str, int]:
    """Take the longest list of modules for the blocks; what is registered before it is layer 0."""
    lists = [(name, part) for name, part in encoder.named_modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        return {}
    start, blocks = max(lists, key=lambda item: len(item[1]))
    found, n, after = {}, len(blocks), False
    for name, _ in encoder.named_parameters():
        number = name.removeprefix(f"{start}.").partition(".")[0] if name.startswith(f"{start}.") else ""
        after = after or bool(number)
        found[name] = n - int(number) if number else (1 if after else n + 1)
    return found
