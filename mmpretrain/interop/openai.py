"""OpenAI's CLIP from its weights alone: every size is read off the shapes.

ViT or ResNet, 64 channels to a head, QuickGELU, CLIP's tokenizer and preprocessing (Radford et al. 2021). Released
files hold half precision; the model is float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.interop.converted import Converted, as_float32
from mmpretrain.interop.modified_resnet import resnet_encoder, resnet_projection
from mmpretrain.interop.names import Table, to_ours
from mmpretrain.interop.open_clip_names import PATCHES, RESNET, SCALARS, VIT, text, text_projection, vit_norm

SIZES = ("input_resolution", "context_length", "vocab_size")
EXTRAS = (*SIZES, "attn_mask")
"""In some files beside the weights: three sizes, and the mask of the text encoder."""
HEAD_WIDTH = 64
VOCABULARY = 49_408
VIT_MARK, RESNET_MARK = "visual.proj", "visual.attnpool.positional_embedding"
"""A name that only the weights of such an image encoder have."""


def from_state_dict(weights: Mapping[str, Tensor], source: str = "openai:") -> Converted:
    """Return OpenAI's CLIP in our terms; `source` is what errors and the identity card call it.

    Raises `InputError` for weights of another kind, and for a vocabulary that is not CLIP's.
    """
    given = {name: tensor for name, tensor in weights.items() if name not in EXTRAS}
    _check_origin(weights, source)
    sizes = _Sizes(given, source)
    if VIT_MARK in given:
        image_size, encoder, table = _vit(sizes)
        projections: dict[str, Any] = {}
    elif RESNET_MARK in given:
        image_size, encoder, projections = _resnet(sizes)
        table = RESNET
    else:
        raise InputError(
            f"{source} is no CLIP of OpenAI: it has neither {VIT_MARK} (ViT) nor {RESNET_MARK} (ResNet). "
            "For weights of open_clip give open_clip:NAME, for those of transformers huggingface:FOLDER"
        )
    text_encoder, context_length = _text(sizes)
    model = {
        "_target_": "mmpretrain.MultimodalModel",
        "embed_dim": sizes("text_projection", 2)[1],
        "encoders": {"image": encoder, "text": text_encoder},
        **projections,
    }
    config = {
        "model": model,
        "preprocess": {
            "_target_": "mmpretrain.data.preprocess.Preprocess",
            "image_size": image_size,
            "read": "stored",  # as OpenAI reads files: turned pictures stay turned
        },
        "tokenizer": {"_target_": "mmpretrain.data.tokenizer.ClipTokenizer", "context_length": context_length},
    }
    ours = to_ours(given, [*table, *text(), *text_projection(), *SCALARS], source)
    return Converted(config, as_float32(ours), source)


def _check_origin(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise `InputError` for weights under OpenAI's names that are not of its files: exact GELU may belong to them."""
    if VIT_MARK not in weights and RESNET_MARK not in weights:
        return  # of no such kind at all, which is said elsewhere
    half = any(tensor.dtype == torch.float16 for tensor in weights.values())
    if not half and not any(name in weights for name in SIZES):
        raise InputError(
            f"{source} has no half-precision weights and none of {', '.join(SIZES)}, as OpenAI's files do: it is of "
            "open_clip, whose activation no weight tells. Give open_clip:NAME --weights FILE"
        )


class _Sizes:
    """The shapes of tensors that must be there; the name of the file for errors."""

    def __init__(self, weights: Mapping[str, Tensor], source: str) -> None:
        self.weights, self.source = weights, source

    def __call__(self, name: str, dimensions: int) -> tuple[int, ...]:
        if name not in self.weights:
            raise InputError(f"{self.source} lacks {name}; it is not complete, or no CLIP of OpenAI")
        shape = tuple(self.weights[name].shape)
        if len(shape) != dimensions:
            raise InputError(f"{self.source}: {name} has shape {shape}; expected {dimensions} dimensions")
        return shape

    def depth(self, blocks: str) -> int:
        """How many blocks there are under a prefix."""
        found = {match[1] for name in self.weights if (match := re.match(rf"{re.escape(blocks)}\.(\d+)\.", name))}
        return len(found)

    def grid(self, name: str) -> int:
        """Side of the square of positions, of which the first one is the class token's or the mean's."""
        positions = self(name, 2)[0] - 1
        side = math.isqrt(max(positions, 0))
        if side * side != positions or not side:
            raise InputError(f"{self.source}: {name} has {positions} positions behind the first; expected a square")
        return side

    def heads(self, name: str, dimensions: int, axis: int) -> int:
        """Width of a Transformer in heads."""
        width = self(name, dimensions)[axis]
        if width % HEAD_WIDTH or not width:
            raise InputError(f"{self.source}: width {width} by {name}; expected a multiple of {HEAD_WIDTH}, a head's")
        return width // HEAD_WIDTH


def _vit(sizes: _Sizes) -> tuple[int, dict[str, Any], Table]:
    """Return the image size, the config of the image encoder and the table of its names."""
    width, _, patch_size, _ = sizes("visual.conv1.weight", 4)
    image_size = patch_size * sizes.grid("visual.positional_embedding")
    blocks = "visual.transformer.resblocks"
    model_args = {
        "img_size": image_size,
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": sizes.depth(blocks),
        "num_heads": sizes.heads("visual.conv1.weight", 4, 0),
        "mlp_ratio": sizes(f"{blocks}.0.mlp.c_fc.weight", 2)[0] / width,
        "act_layer": "quick_gelu",
    }
    # A family of timm: every size is given above.
    encoder = {"_target_": "mmpretrain.ImageEncoder", "name": "vit_base_patch32_clip_224", "model_args": model_args}
    return image_size, encoder, [*VIT, *PATCHES, *vit_norm()]


def _resnet(sizes: _Sizes) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Return the image size, the config of the image encoder and what the model needs for its projection."""
    depths = [sizes.depth(f"visual.layer{stage}") for stage in range(1, 5)]
    width = sizes("visual.layer1.0.conv1.weight", 4)[0]
    image_size = 32 * sizes.grid(RESNET_MARK)
    embed_dim = sizes("visual.attnpool.c_proj.weight", 2)[0]
    projection = resnet_projection(width, embed_dim)
    return image_size, resnet_encoder(depths, width, image_size), {"projections": {"image": projection}}


def _text(sizes: _Sizes) -> tuple[dict[str, Any], int]:
    """Return the config of the text encoder, and how many ids it reads."""
    vocab_size, width = sizes("token_embedding.weight", 2)
    context_length, _ = sizes("positional_embedding", 2)
    if vocab_size != VOCABULARY:
        raise InputError(
            f"{sizes.source} has {vocab_size} token ids and so a tokenizer of its own; OpenAI's CLIP has {VOCABULARY}"
        )
    encoder = {
        "_target_": "mmpretrain.TextEncoder",
        "vocab_size": vocab_size,
        "eos_id": vocab_size - 1,
        "context_length": context_length,
        "width": width,
        "depth": sizes.depth("transformer.resblocks"),
        "num_heads": sizes.heads("token_embedding.weight", 2, 1),
        "mlp_ratio": sizes("transformer.resblocks.0.mlp.c_fc.weight", 2)[0] / width,
        "activation": "quick_gelu",
    }
    return encoder, context_length
