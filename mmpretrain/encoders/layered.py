"""Outputs of an encoder's inner layers, by number; those of timm backbones as maps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from mmpretrain.errors import InputError
from mmpretrain.types import LayerInfo


class Layer(NamedTuple):
    """What one layer of a backbone gives: `features` (B,D,H,W), and one vector for all of it, `pooled` (B,D)."""

    features: Tensor
    pooled: Tensor


def layer_indices(layers: Sequence[int], count: int) -> list[int]:
    """Count layers from 0; negative ones are from the end. Raises `InputError` for one outside of `count`, or none."""
    if not layers:
        raise InputError(f"layers is empty; give numbers of layers from 0 to {count - 1}, or from -1 for the last")
    if wrong := [layer for layer in layers if not -count <= layer < count]:
        raise InputError(
            f"there is no layer {', '.join(map(str, wrong))}: this encoder has {count}; "
            f"count them from 0 to {count - 1}, or from -{count} to -1"
        )
    return [layer % count for layer in layers]


def gives_prefix(backbone: nn.Module) -> bool:
    """Whether a timm backbone gives class and register tokens of inner layers too."""
    method = getattr(backbone, "forward_intermediates", None)
    return method is not None and "return_prefix_tokens" in inspect.signature(method).parameters


def backbone_info(backbone: nn.Module) -> list[LayerInfo]:
    """List a timm backbone's layers; raises `InputError` for one that gives none."""
    info: Any = getattr(backbone, "feature_info", None)
    if not info or not hasattr(backbone, "forward_intermediates"):
        raise InputError(
            f"timm's {type(backbone).__name__} gives no intermediate layers (it has no forward_intermediates); "
            "choose another backbone, or use encode for its last tokens"
        )
    return [LayerInfo(str(layer["module"]), int(layer["num_chs"]), int(layer["reduction"])) for layer in info]


def backbone_layers(
    backbone: Any, pixels: Tensor, layers: Sequence[int], norm: bool, gives_prefix: bool
) -> list[Layer]:
    """Run a timm backbone on normalised pixels up to the highest of `layers`, in whatever order these are given.

    Raises `InputError` for a layer there is not, and in training mode with patch dropout, after which no map is left.
    """
    wanted = layer_indices(layers, len(backbone_info(backbone)))
    if backbone.training and getattr(getattr(backbone, "patch_drop", None), "prob", 0):
        raise InputError("patch dropout leaves no map of the picture; call model.eval() before taking its layers")
    order = sorted(set(wanted))  # in which timm returns them, each once
    options = {"return_prefix_tokens": True} if gives_prefix else {}
    found = backbone.forward_intermediates(
        pixels, indices=order, norm=norm, stop_early=True, output_fmt="NCHW", intermediates_only=True, **options
    )
    has_class_token = getattr(backbone, "cls_token", None) is not None
    taken = dict(zip(order, (_layer(item, has_class_token) for item in found), strict=True))
    return [taken[layer] for layer in wanted]


def _layer(item: Tensor | tuple[Tensor, Tensor], has_class_token: bool) -> Layer:
    features, prefix = (item, None) if isinstance(item, Tensor) else item
    pooled = prefix[:, 0] if prefix is not None and has_class_token else features.mean((2, 3))
    return Layer(features, pooled)
