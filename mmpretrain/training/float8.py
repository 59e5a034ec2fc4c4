"""Linear layers in 8-bit floating point, through torchao: an approximation that only large layers gain from."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.activation_checkpointing import repeated_blocks
from mmpretrain.errors import InputError

SMALLEST = 1024
"""Features in and out from which a layer is converted: ViT-L's. Below, casting costs more than the products save."""
MULTIPLE = 16
"""What both must be a multiple of: the tensor cores' tile."""


def check_float8(compiled: bool) -> None:
    """Raise `InputError` where 8-bit training cannot run, or would be slower than without."""
    if find_spec("torchao") is None:
        raise InputError(
            "trainer.fp8 needs torchao; pip install 'mmpretrain-contrastive[fp8]', or set trainer.fp8=false"
        )
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise InputError(
            "trainer.fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later; set trainer.fp8=false"
        )
    if not compiled:
        raise InputError("trainer.fp8 without torch.compile is slower than bf16; set trainer.compile=default")


def convert_to_float8(model: nn.Module, emulate: bool = False) -> list[str]:
    """Let the large linear layers of a model's blocks multiply in float8 while it trains; returns their names.

    Weights stay float32 under their names; activations, weights and gradients are scaled by their largest value, as a
    whole tensor, and rounded for each product. In evaluation mode the layers are exact. `emulate` computes the same
    rounding without the hardware. Raises `InputError` where no layer is large enough.
    """
    from torchao.float8 import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    inside = {id(layer) for block in repeated_blocks(model) for layer in block.modules()}
    converted: list[str] = []

    def large(layer: nn.Module, name: str) -> bool:
        fits = isinstance(layer, nn.Linear) and id(layer) in inside and _fits(layer)
        if fits:
            converted.append(name)
        return fits

    # Packed texts are of any total length, so the inner dimension of a weight's gradient is padded.
    options = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model, config=options, module_filter_fn=large)
    if not converted:
        raise InputError(
            f"no linear layer of this model has {SMALLEST} features on each side (in multiples of {MULTIPLE}): "
            "8-bit training pays from ViT-L on; set trainer.fp8=false"
        )
    for name in converted:
        layer: Any = model.get_submodule(name)
        layer.forward = _OnlyInTraining(layer)
    return converted


def _fits(layer: nn.Linear) -> bool:
    sizes = (layer.in_features, layer.out_features)
    return min(sizes) >= SMALLEST and all(size % MULTIPLE == 0 for size in sizes)


class _OnlyInTraining:
    """A converted layer's `forward`: exact in evaluation mode."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.rounded = layer, type(layer).forward

    def __call__(self, x: Tensor) -> Tensor:
        if not self.layer.training:
            return F.linear(x, self.layer.weight, self.layer.bias)
        product: Tensor = self.rounded(self.layer, x)
        return product
