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

    Raises `InputError` unless names and shapes are those of the model, and its weights are finite floats; all that
    differ are listed. Raises it too for an interpolation in the config, which comes from a stranger.
    """
    from mmpretrain.config import build_saved, refuse_interpolations
    from mmpretrain.interop.names import check_keys, check_numbers

    refuse_interpolations(converted.config)  # `mmpretrain.save` resolves those of its caller
    # Before anything is built: a config may claim sizes that no memory holds.
    wanted = expected(converted.config["model"])
    check_keys(converted.weights, wanted, converted.source)
    check_numbers(converted.weights, wanted, converted.source)
    model: MultimodalModel = build_saved(converted.config["model"])
    model.load_state_dict(converted.weights)
    return model.eval()


def expected(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return names and shapes of the weights of a model config, without making any."""
    from mmpretrain.config import build_saved

    with torch.device("meta"):
        state: dict[str, Tensor] = build_saved(model).state_dict()
    return state


def write(converted: Converted, out: str | Path) -> Path:
    """Write the model folder `out`, whole or not at all; raises `InputError` as `build` and `mmpretrain.save` do."""
    from mmpretrain.pretrained import save

    return save(out, build(converted), converted.config, converted.source)


def as_float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with every kind of float as float32; all else stays, see `names.check_numbers`."""
    return {name: x.to(torch.float32) if x.is_floating_point() else x for name, x in weights.items()}
