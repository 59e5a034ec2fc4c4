"""Useful FLOPs of a model: matrix products of real tokens only, two for each multiply-add, backward twice forward.

Padding, masked halves of causal attention, recomputation, norms and activations count nothing, so skipping padding
does not lower the figure and computing it does not raise it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def useful(config: Mapping[str, Any], lengths: Iterable[int]) -> float:
    """FLOPs of forward and backward for one sample of each text length (start and end ids included)."""
    return 3.0 * sum(forward(config, length) for length in lengths)


def forward(config: Mapping[str, Any], length: int, causal: bool = True) -> float:
    """FLOPs of one sample forward; `causal=False` counts both halves of the text's attention, as kernels may run."""
    found = image(config["vision_cfg"], config["embed_dim"])
    captions = config.get("multimodal_cfg")
    return (
        found
        + text(config["text_cfg"], config["embed_dim"], length, causal)
        + (0 if captions is None else decoder(config, length - 1, causal))
    )


def image(vision: Mapping[str, Any], embed_dim: int) -> float:
    """FLOPs of the image tower with its projection, and of the attention pooler where there is one."""
    width, patch = vision["width"], vision["patch_size"]
    patches = (vision.get("image_size", 224) // patch) ** 2
    tokens = patches + 1
    found = 2 * 3 * patch**2 * width * patches
    found += vision["layers"] * block(width, tokens, tokens * tokens, vision.get("mlp_ratio", 4.0))
    if not vision.get("attentional_pool"):
        return found + 2 * width * embed_dim
    queries = vision.get("attn_pooler_queries", 256)
    found += 2 * (2 * queries * embed_dim**2 + 2 * tokens * width * embed_dim)
    return found + 4 * queries * tokens * embed_dim + 2 * embed_dim**2


def text(tower: Mapping[str, Any], embed_dim: int, length: int, causal: bool = True) -> float:
    """FLOPs of the text tower over `length` real tokens, and its class token where it has one."""
    tokens = length + bool(tower.get("embed_cls"))
    pairs = tokens * (tokens + 1) / 2 if causal else tokens * tokens
    return tower["layers"] * block(tower["width"], tokens, pairs) + 2 * tower["width"] * embed_dim


def decoder(config: Mapping[str, Any], length: int, causal: bool = True) -> float:
    """FLOPs of CoCa's decoder for `length` predicted tokens, with the vocabulary's logits."""
    tower, context = config["multimodal_cfg"], config["embed_dim"]
    width, read = tower["width"], config["vision_cfg"].get("attn_pooler_queries", 256) - 1
    pairs = length * (length + 1) / 2 if causal else length * length
    cross = 2 * (2 * length * width**2 + 2 * read * context * width) + 4 * length * read * width
    mlp = 16 * length * width**2
    layers = tower["layers"] * (block(width, length, pairs) + cross + mlp)
    return layers + 2 * length * width * config["text_cfg"]["vocab_size"]


def block(width: int, tokens: int, pairs: float, mlp_ratio: float = 4.0) -> float:
    """FLOPs of one self-attention block: `pairs` of a query and a key it sees."""
    return 2 * tokens * (4 + 2 * mlp_ratio) * width**2 + 4 * pairs * width
