"""What our encoders are made of, read off the built parts: the facts another library's config has to state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mmpretrain.encoders import ImageEncoder, TextEncoder
from mmpretrain.encoders.naflex import NaFlexImageEncoder
from mmpretrain.errors import InputError
from mmpretrain.layers import ACTIVATIONS
from mmpretrain.pretrained import locate, read_config


class ImageTower(NamedTuple):
    """A plain ViT. `pool`: timm's `global_pool` ("token", "avg", "map", ...) or the class of one of our poolers.

    `grid`: rows of learned positions (so many columns too). `image_size`: None where it takes pictures of any size.
    `norm_at`: what the last norm is applied to: "tokens", "pooled" or nothing ("").
    """

    image_size: int | None
    grid: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    hidden: int
    activation: str
    norm_eps: float
    pool: str
    class_token: bool
    norm_before: bool
    norm_at: str
    patch_bias: bool
    layer_scale: bool


class TextTower(NamedTuple):
    """A `TextEncoder`."""

    vocab_size: int
    context_length: int
    width: int
    depth: int
    num_heads: int
    hidden: int
    activation: str
    norm_eps: float
    causal: bool
    pooling: str
    eos_id: int


def image_tower(encoder: nn.Module) -> ImageTower:
    """Describe an image encoder; raises `InputError` for one that is no plain ViT, naming what it has beside."""
    if not isinstance(encoder, (ImageEncoder, NaFlexImageEncoder)):
        raise InputError(f"its image encoder is a {type(encoder).__name__}")
    found = plain_backbone(encoder.backbone)
    pool = getattr(encoder, "pool", None)
    return found if pool is None else found._replace(pool=type(pool).__name__)


def plain_backbone(backbone: Any) -> ImageTower:
    """Describe a ViT of timm; raises as `image_tower`."""
    if not isinstance(backbone, (VisionTransformer, NaFlexVit)):
        raise InputError(f"its image encoder is a {type(backbone).__name__}, no plain ViT")
    if extra := _extras(backbone):
        raise InputError(f"its image encoder has {', '.join(extra)}")
    block: Any = backbone.blocks[0]
    flexible = isinstance(backbone, NaFlexVit)
    patches: Any = backbone.embeds if flexible else backbone.patch_embed
    grid = patches.pos_embed_grid_size if flexible else patches.grid_size
    sizes = [grid, patches.patch_size] + ([] if flexible else [patches.img_size])
    if any(rows != columns for rows, columns in sizes):
        raise InputError(f"its image encoder is not square: {', '.join(f'{a}x{b}' for a, b in sizes)}")
    return ImageTower(
        image_size=None if flexible else int(patches.img_size[0]),
        grid=int(grid[0]),
        patch_size=int(patches.patch_size[0]),
        width=int(backbone.embed_dim),
        depth=len(backbone.blocks),
        num_heads=int(block.attn.num_heads),
        hidden=int(block.mlp.fc1.out_features),
        activation=activation_name(block.mlp.act, "image"),
        norm_eps=float(block.norm1.eps),
        pool=str(backbone.global_pool),
        class_token=not flexible and backbone.cls_token is not None,
        norm_before=isinstance(backbone.norm_pre, nn.LayerNorm),
        norm_at=_norm_at(backbone),
        patch_bias=patches.proj.bias is not None,
        layer_scale=not isinstance(block.ls1, nn.Identity),
    )


def text_tower(encoder: nn.Module) -> TextTower:
    """Describe a text encoder; raises `InputError` for one that is no `TextEncoder`."""
    if not isinstance(encoder, TextEncoder):
        raise InputError(f"its text encoder is a {type(encoder).__name__}, no mmpretrain.TextEncoder")
    if encoder.reads_padding and encoder.pooling != "last" and encoder.class_mask != "legacy":
        raise InputError("its text encoder attends to padding (reads_padding)")
    block: Any = encoder.blocks[0]
    return TextTower(
        vocab_size=encoder.vocab_size,
        context_length=encoder.context_length,
        width=encoder.width,
        depth=len(encoder.blocks),
        num_heads=block.attention.num_heads,
        hidden=block.mlp.up.out_features,
        activation=activation_name(block.mlp.activation, "text"),
        norm_eps=float(block.norm1.eps),
        causal=encoder.causal,
        pooling=encoder.pooling,
        eos_id=encoder.eos_id,
    )


def activation_name(function: Callable[[Tensor], Tensor], tower: str) -> str:
    """Our name of an activation, by what it computes."""
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    for name, ours in ACTIVATIONS.items():
        if torch.allclose(function(x.clone()), ours(x), rtol=0, atol=1e-9):
            return name
    raise InputError(f"its {tower} encoder has the activation {function}, none of {', '.join(ACTIVATIONS)}")


def stated_image(folder: str | Path) -> dict[str, Any]:
    """Return what the config of a model folder says of its image encoder; raises `InputError` where it has none."""
    model = read_config(locate(folder))["model"]
    found: Any = (model.get("encoders") or {}).get("image")
    if not isinstance(found, dict):
        raise InputError(
            f"the config of {folder} describes no image encoder (model.encoders.image); this format has one"
        )
    return found


def normalization(encoder: Any, stated: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return mean and std that an image encoder normalises by; `stated` is its config, which need not say them.

    The encoder keeps them folded into one scale and shift. Raises `InputError` where the config's are not those.
    """
    defaults = {name: p.default for name, p in inspect.signature(type(encoder)).parameters.items()}
    mean, std = ([float(x) for x in stated.get(name, defaults.get(name, ()))] for name in ("mean", "std"))
    scale, shift = encoder.scale.flatten(), encoder.shift.flatten()
    same = len(mean) == len(std) == len(scale) and all(
        torch.allclose(buffer, buffer.new_tensor(values), rtol=1e-6, atol=0)
        for buffer, values in (
            (scale, [1 / (255 * s) for s in std]),
            (shift, [-m / s for m, s in zip(mean, std, strict=True)]),
        )
    )
    if not same:
        raise InputError(f"the image encoder does not normalise by mean {mean} and std {std}, as its config says")
    return mean, std


def _extras(backbone: Any) -> list[str]:
    """Name what a timm ViT has that no plain ViT has."""
    block = backbone.blocks[0]
    if not all(type(found) is Block for found in backbone.blocks):
        return [f"blocks of the kind {type(block).__name__}"]
    pool = backbone.attn_pool
    tests = {
        "register tokens": not getattr(backbone, "num_reg_tokens", 0),
        "positions without the class token": not getattr(backbone, "no_embed_class", False),
        "norms of query and key": isinstance(block.attn.q_norm, nn.Identity),
        "no bias in its attention": block.attn.qkv.bias is not None and block.attn.proj.bias is not None,
        "norms inside its attention or MLP": all(
            isinstance(norm, nn.Identity) for norm in (getattr(block.attn, "norm", nn.Identity()), block.mlp.norm)
        ),
        "a classifier": isinstance(backbone.head, nn.Identity),
        "norms of different epsilon": len(_epsilons(backbone)) == 1,
        "an attention pool of other sizes than its blocks": pool is None
        or (pool.num_heads == block.attn.num_heads and pool.mlp.fc1.out_features == block.mlp.fc1.out_features),
    }
    return [feature for feature, holds in tests.items() if not holds]


def _norm_at(backbone: Any) -> str:
    if isinstance(backbone.norm, nn.LayerNorm):
        return "tokens"
    return "pooled" if isinstance(backbone.fc_norm, nn.LayerNorm) else ""


def _epsilons(backbone: nn.Module) -> set[float]:
    return {float(module.eps) for module in backbone.modules() if isinstance(module, nn.LayerNorm)}
