"""A model of another library in our terms, and how it becomes a model, or a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmpretrain.model import MultimodalModel


class Converted(NamedTuple):
    """A model of another library in our terms.

    `config`: what `mmpretrain.save` takes ({"model", "preprocess", "tokenizer"}, plain dicts with `_target_`).
    `weights`: under our names, float32. `source`: what it was made of, such as "open_clip:ViT-B-32".
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    source: str


def build(converted: Converted) -> MultimodalModel:
    """Build the model and load the weights, in evaluation mode.

    Raises `InputError` unless names and shapes are those of the model; all that differ are listed.
    """
    from mmpretrain.config import build_saved
    from mmpretrain.interop.names import check_keys

    model: MultimodalModel = build_saved(converted.config["model"])
    check_keys(converted.weights, model.state_dict(), converted.source)
    model.load_state_dict(converted.weights)
    return model.eval()


def write(converted: Converted, out: str | Path) -> Path:
    """Write the model folder `out`, whole or not at all; raises `InputError` as `build` and `mmpretrain.save` do."""
    from mmpretrain.pretrained import save

    return save(out, build(converted), converted.config, converted.source)


def as_float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with every kind of float as float32; counters stay integers."""
    return {name: x.to(torch.float32) if x.is_floating_point() else x for name, x in weights.items()}
