"""Names of transformers' CLIPModel, SiglipModel and Siglip2Model and ours, as two-way tables by their `model_type`."""

from __future__ import annotations

import torch

from mmpretrain.interop.names import Entry, Table, Tensors, beneath, same, shaped, split

IMAGE, TEXT = "encoders.image.backbone.", "encoders.text."

IMAGE_LAYERS = [
    same("layer_norm1.{p}", "norm1.{p}"),
    same("layer_norm2.{p}", "norm2.{p}"),
    split(["self_attn.q_proj.{p}", "self_attn.k_proj.{p}", "self_attn.v_proj.{p}"], "attn.qkv.{p}"),
    same("self_attn.out_proj.{p}", "attn.proj.{p}"),
    same("mlp.fc1.{p}", "mlp.fc1.{p}"),
    same("mlp.fc2.{p}", "mlp.fc2.{p}"),
]
TEXT_LAYERS = [
    same("layer_norm1.{p}", "norm1.{p}"),
    same("layer_norm2.{p}", "norm2.{p}"),
    *(same(f"self_attn.{letter}_proj.{{p}}", f"attention.{letter}.{{p}}") for letter in "qkv"),
    same("self_attn.out_proj.{p}", "attention.o.{p}"),
    same("mlp.fc1.{p}", "mlp.up.{p}"),
    same("mlp.fc2.{p}", "mlp.down.{p}"),
]


def _pool(theirs: str, ours: str) -> list[Entry]:
    """The head that lets one learned probe read all patches; they stack query, key and value, timm the last two."""

    def to_ours(tensors: Tensors) -> Tensors:
        query, key, value = tensors[0].chunk(3)
        return query, torch.cat([key, value])

    joint = Entry(
        ("attention.in_proj_{p}",), ("q.{p}", "kv.{p}"), to_ours, lambda tensors: (torch.cat([tensors[0], tensors[1]]),)
    )
    entries = [
        same("probe", "latent"),
        joint,
        same("attention.out_proj.{p}", "proj.{p}"),
        same("layernorm.{p}", "norm.{p}"),
        same("mlp.fc1.{p}", "mlp.fc1.{p}"),
        same("mlp.fc2.{p}", "mlp.fc2.{p}"),
    ]
    return beneath(entries, theirs, ours)


TEXT_TOWER = beneath(
    [
        same("embeddings.token_embedding.weight", "token_embedding.weight"),
        same("embeddings.position_embedding.weight", "position_embedding"),
        *beneath(TEXT_LAYERS, "encoder.layers.{n}.", "blocks.{n}."),
        same("final_layer_norm.{p}", "norm.{p}"),
    ],
    "text_model.",
    TEXT,
)
IMAGE_TOWER = beneath(
    [*beneath(IMAGE_LAYERS, "encoder.layers.{n}.", "blocks.{n}."), same("post_layernorm.{p}", "norm.{p}")],
    "vision_model.",
    IMAGE,
)

CLIP: Table = [
    shaped("vision_model.embeddings.class_embedding", IMAGE + "cls_token", lambda x: x[None, None], lambda x: x[0, 0]),
    same("vision_model.embeddings.patch_embedding.{p}", IMAGE + "patch_embed.proj.{p}"),
    shaped("vision_model.embeddings.position_embedding.weight", IMAGE + "pos_embed", lambda x: x[None], lambda x: x[0]),
    same("vision_model.pre_layrnorm.{p}", IMAGE + "norm_pre.{p}"),  # spelt so
    *IMAGE_TOWER,
    *TEXT_TOWER,
    same("visual_projection.weight", "projections.image.weight"),
    same("text_projection.weight", "projections.text.weight"),
    shaped("logit_scale", "logit_scale", lambda x: x.reshape(1), lambda x: x.reshape(())),
]

_SIGLIP = [
    *IMAGE_TOWER,
    *_pool("vision_model.head.", IMAGE + "attn_pool."),
    *TEXT_TOWER,
    same("text_model.head.{p}", "projections.text.{p}"),
    same("logit_scale", "logit_scale"),
    same("logit_bias", "logit_bias"),
]
SIGLIP: Table = [
    same("vision_model.embeddings.patch_embedding.{p}", IMAGE + "patch_embed.proj.{p}"),
    shaped("vision_model.embeddings.position_embedding.weight", IMAGE + "pos_embed", lambda x: x[None], lambda x: x[0]),
    *_SIGLIP,
]
SIGLIP2: Table = [
    same("vision_model.embeddings.patch_embedding.{p}", IMAGE + "embeds.proj.{p}"),
    shaped(
        "vision_model.embeddings.position_embedding.weight",
        IMAGE + "embeds.pos_embed",
        lambda x: x.view(1, round(len(x) ** 0.5), -1, x.shape[1]),  # a square grid, row by row
        lambda x: x.flatten(0, 2),
    ),
    *_SIGLIP,
]

TABLES: dict[str, Table] = {"clip": CLIP, "siglip": SIGLIP, "siglip2": SIGLIP2}
"""By the `model_type` of a config.json."""

NOT_WEIGHTS = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")
"""Counters that older files hold beside the weights."""
