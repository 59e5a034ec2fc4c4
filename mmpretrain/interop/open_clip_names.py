"""Names of open_clip's own layouts (OpenAI's are the same) and ours, as two-way tables.

A model's table is the sum of its parts: one for the image encoder, `text` for the text encoder, `DECODER` for CoCa's
decoder and `SCALARS`.
"""

from __future__ import annotations

import torch

from mmpretrain.errors import InputError
from mmpretrain.interop.modified_resnet import RESNET as RESNET  # its configs are there too
from mmpretrain.interop.names import Entry, Tensors, joined, same, shaped, transposed

BACKBONE, POOL = "encoders.image.backbone", "encoders.image.pool"

SCALARS: list[Entry] = [
    shaped(name, name, lambda x: x.reshape(1), lambda x: x.reshape(())) for name in ("logit_scale", "logit_bias")
]
"""`logit_scale` and `logit_bias`, which open_clip keeps without a dimension."""


def attention(theirs: str, ours: str) -> list[Entry]:
    """`nn.MultiheadAttention` that reads what is as wide as itself, and our `Attention`."""
    return [
        joined(f"{theirs}.in_proj_{{p}}", [f"{ours}.{name}.{{p}}" for name in "qkv"]),
        same(f"{theirs}.out_proj.{{p}}", f"{ours}.o.{{p}}"),
    ]


def block(theirs: str, ours: str) -> list[Entry]:
    """open_clip's residual block and our `Block` or `CrossBlock`."""
    return [
        same(f"{theirs}.ln_1.{{p}}", f"{ours}.norm1.{{p}}"),
        same(f"{theirs}.ln_1_kv.{{p}}", f"{ours}.context_norm.{{p}}"),
        *attention(f"{theirs}.attn", f"{ours}.attention"),
        same(f"{theirs}.ln_2.{{p}}", f"{ours}.norm2.{{p}}"),
        same(f"{theirs}.mlp.c_fc.{{p}}", f"{ours}.mlp.up.{{p}}"),
        same(f"{theirs}.mlp.c_proj.{{p}}", f"{ours}.mlp.down.{{p}}"),
    ]


_BLOCK, _OURS = "visual.transformer.resblocks.{n}", f"{BACKBONE}.blocks.{{n}}"
VIT: list[Entry] = [
    shaped("visual.class_embedding", f"{BACKBONE}.cls_token", lambda x: x[None, None], lambda x: x[0, 0]),
    shaped("visual.positional_embedding", f"{BACKBONE}.pos_embed", lambda x: x[None], lambda x: x[0]),
    same("visual.ln_pre.{p}", f"{BACKBONE}.norm_pre.{{p}}"),
    same(f"{_BLOCK}.ln_1.{{p}}", f"{_OURS}.norm1.{{p}}"),
    same(f"{_BLOCK}.attn.in_proj_{{p}}", f"{_OURS}.attn.qkv.{{p}}"),
    same(f"{_BLOCK}.attn.out_proj.{{p}}", f"{_OURS}.attn.proj.{{p}}"),
    same(f"{_BLOCK}.ls_1.gamma", f"{_OURS}.ls1.gamma"),
    same(f"{_BLOCK}.ln_2.{{p}}", f"{_OURS}.norm2.{{p}}"),
    same(f"{_BLOCK}.mlp.c_fc.{{p}}", f"{_OURS}.mlp.fc1.{{p}}"),
    same(f"{_BLOCK}.mlp.c_proj.{{p}}", f"{_OURS}.mlp.fc2.{{p}}"),
    same(f"{_BLOCK}.ls_2.gamma", f"{_OURS}.ls2.gamma"),
    transposed("visual.proj", "projections.image.weight"),
]
"""The native ViT without its patches (`PATCHES` or `PATCHES_WITHOUT_BIAS`) and its final norm (`vit_norm`)."""

PATCHES: list[Entry] = [same("visual.conv1.weight", f"{BACKBONE}.patch_embed.proj.weight")]
"""Patches of a ViT that norms its input: neither side has a bias."""


def _with_bias(tensors: Tensors) -> Tensors:
    return tensors[0], torch.zeros_like(tensors[0][:, 0, 0, 0])


def _without_bias(tensors: Tensors) -> Tensors:
    weight, bias = tensors
    if bool(bias.any()):
        raise InputError(
            "patch_embed.proj.bias is not zero, but open_clip's ViT has no such bias; it cannot be written"
        )
    return (weight,)


PATCHES_WITHOUT_BIAS: list[Entry] = [
    Entry(
        ("visual.conv1.weight",),
        (f"{BACKBONE}.patch_embed.proj.weight", f"{BACKBONE}.patch_embed.proj.bias"),
        _with_bias,
        _without_bias,
    )
]
"""Patches of a ViT without that norm (`no_ln_pre`), for which timm has a bias and open_clip none: it is zero."""


def vit_norm(ours: str = f"{BACKBONE}.norm") -> list[Entry]:
    """The native ViT's final norm: `norm`, or `fc_norm` where it comes after average pooling."""
    return [same("visual.ln_post.{p}", f"{ours}.{{p}}")]


def pooler(theirs: str, ours: str, same_width: bool) -> list[Entry]:
    """An `AttentionalPooler` and our `AttentionPool`; `same_width`: it reads tokens as wide as its queries."""
    return [
        same(f"{theirs}.query", f"{ours}.query"),
        same(f"{theirs}.ln_q.{{p}}", f"{ours}.query_norm.{{p}}"),
        same(f"{theirs}.ln_k.{{p}}", f"{ours}.context_norm.{{p}}"),
        *(attention if same_width else _uneven_attention)(f"{theirs}.attn", f"{ours}.attention"),
    ]


def _uneven_attention(theirs: str, ours: str) -> list[Entry]:
    """`nn.MultiheadAttention` that reads what is not as wide as itself: three matrices, yet one bias."""
    return [
        *(same(f"{theirs}.{name}_proj_weight", f"{ours}.{name}.weight") for name in "qkv"),
        joined(f"{theirs}.in_proj_bias", [f"{ours}.{name}.bias" for name in "qkv"]),
        same(f"{theirs}.out_proj.{{p}}", f"{ours}.o.{{p}}"),
    ]


def shared_pool(same_width: bool) -> list[Entry]:
    """CoCa's one pooler with the norm behind it, as in all released weights."""
    return [*pooler("visual.attn_pool", f"{POOL}.pool", same_width), *vit_norm(f"{POOL}.norm")]


CASCADED_POOL: list[Entry] = [
    *pooler("visual.attn_pool", f"{POOL}.caption", True),
    *pooler("visual.attn_pool_contrastive", f"{POOL}.contrastive", True),
    *vit_norm(),
]
"""CoCa's two poolers, one after the other or side by side; open_clip can only run them where all widths are equal."""

_TRUNK: list[Entry] = [same("visual.trunk.{rest}", f"{BACKBONE}.{{rest}}")]
TIMM_LINEAR: list[Entry] = [same("visual.head.proj.{p}", "projections.image.{p}"), *_TRUNK]
"""A timm backbone with a linear projection."""
TIMM_MLP: list[Entry] = [
    same("visual.head.mlp.fc1.{p}", "projections.image.0.{p}"),
    same("visual.head.mlp.fc2.{p}", "projections.image.2.{p}"),
    *_TRUNK,
]
"""A timm backbone with a projection of two layers."""


def timm_classifier(name: str | None) -> list[Entry]:
    """A timm backbone whose own classifier, of that name in it, is the projection; None = it has no projection."""
    return [*([same(f"visual.trunk.{name}.{{p}}", "projections.image.{p}")] if name else []), *_TRUNK]


def text(prefix: str = "") -> list[Entry]:
    """The native text encoder; `prefix` is empty or `text.`, depending on open_clip's class."""
    ours = "encoders.text"
    return [
        same(f"{prefix}token_embedding.weight", f"{ours}.token_embedding.weight"),
        same(f"{prefix}positional_embedding", f"{ours}.position_embedding"),
        same(f"{prefix}cls_emb", f"{ours}.class_token"),
        *block(f"{prefix}transformer.resblocks.{{n}}", f"{ours}.blocks.{{n}}"),
        same(f"{prefix}ln_final.{{p}}", f"{ours}.norm.{{p}}"),
    ]


def text_projection(prefix: str = "", bias: bool = False) -> list[Entry]:
    """The native text encoder's projection: a bare matrix, or a layer where it has a bias."""
    if bias:
        return [same(f"{prefix}text_projection.{{p}}", "projections.text.{p}")]
    return [transposed(f"{prefix}text_projection", "projections.text.weight")]


HUGGINGFACE_TEXT: list[Entry] = [
    same("text.proj.{p}", "projections.text.{p}"),
    same("text.proj.{n}.{p}", "projections.text.{n}.{p}"),
    same("text.transformer.{rest}", "encoders.text.transformer.{rest}"),
]
"""A Hugging Face text encoder, with a projection of one layer, of two, or none."""

DECODER: list[Entry] = [
    *block("text_decoder.resblocks.{n}", "fusion.blocks.{n}"),
    *block("text_decoder.cross_attn.{n}", "fusion.cross_blocks.{n}"),
    same("text_decoder.ln_final.{p}", "fusion.norm.{p}"),
    transposed("text_decoder.text_projection", "heads.caption.weight"),
]
"""CoCa's decoder and its output embedding."""
