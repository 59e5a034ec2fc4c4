"""OpenAI's ResNets as timm's `ByobNet`: the table of their weights, and the configs of encoder and projection.

Their attention pool ends in a layer with a bias; here that is the projection into the shared space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmpretrain.interop.names import Entry, same

_BACKBONE = "encoders.image.backbone"
_CONVOLUTIONS = {1: "conv1_1x1", 2: "conv2_kxk", 3: "conv3_1x1"}
"""Their number of a bottleneck's convolution -> timm's name of it."""


def _normed(theirs: str, their_norm: str, ours: str) -> list[Entry]:
    """A convolution without bias and the batch norm behind it, with its running statistics."""
    return [same(f"{theirs}.weight", f"{ours}.conv.weight"), same(f"{their_norm}.{{rest}}", f"{ours}.bn.{{rest}}")]


def _stage(number: int) -> list[Entry]:
    """One stage; theirs are counted from 1, timm's from 0."""
    theirs, ours = f"visual.layer{number}.{{n}}", f"{_BACKBONE}.stages.{number - 1}.{{n}}"
    entries = _normed(f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}.shortcut.conv")
    for index, name in _CONVOLUTIONS.items():
        entries += _normed(f"{theirs}.conv{index}", f"{theirs}.bn{index}", f"{ours}.{name}")
    return entries


RESNET: list[Entry] = [
    *_normed("visual.conv{n}", "visual.bn{n}", f"{_BACKBONE}.stem.conv{{n}}"),
    *(entry for number in range(1, 5) for entry in _stage(number)),
    same("visual.attnpool.positional_embedding", f"{_BACKBONE}.head.pos_embed"),
    *(same(f"visual.attnpool.{name}_proj.{{p}}", f"{_BACKBONE}.head.{name}.{{p}}") for name in "qkv"),
    same("visual.attnpool.c_proj.{p}", "projections.image.{p}"),
]
"""The image encoder of OpenAI's and open_clip's `ModifiedResNet`, projection included."""


def resnet_encoder(depths: Sequence[int], width: int, image_size: int) -> dict[str, Any]:
    """Return the config of the image encoder: blocks of each of the four stages, `width` of the stem in channels.

    The heads of the attention pool are 64 wide, as in every released model.
    """
    block = "timm.models.byobnet.ByoBlockCfg"
    stages = [
        {"_target_": block, "type": "bottle", "d": depth, "c": 4 * width * 2**i, "s": 1 if i == 0 else 2, "br": 0.25}
        for i, depth in enumerate(depths)
    ]
    return {
        "_target_": "mmpretrain.ImageEncoder",
        "name": "resnet50_clip",  # a family of timm: every size below is given
        "model_args": {"img_size": image_size, "blocks": stages, "stem_chs": [width // 2, width // 2, width]},
    }


def resnet_projection(width: int, embed_dim: int) -> dict[str, Any]:
    """Return the config of the projection of such an encoder's (B,32*width) into the shared space."""
    return {"_target_": "torch.nn.Linear", "in_features": 32 * width, "out_features": embed_dim}
