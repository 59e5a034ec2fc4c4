"""Tiny models of each family, for tests."""

from __future__ import annotations

import torch

from mmpretrain import (
    CaptionHead,
    CascadedAttentionPool,
    CrossAttentionFusion,
    ImageEncoder,
    MultimodalModel,
    Padded,
    TextEncoder,
)

VOCAB, EOS, PAD, START = 50, 49, 0, 48
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def clip(seed: int = 0) -> MultimodalModel:
    torch.manual_seed(seed)
    image = ImageEncoder("vit_tiny_patch16_224", VIT)
    return MultimodalModel(16, {"image": image, "text": TextEncoder(VOCAB, 12, 32, 2, 2, EOS)})


def siglip(seed: int = 0) -> MultimodalModel:
    torch.manual_seed(seed)
    image = ImageEncoder("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "map"})
    text = TextEncoder(VOCAB, 12, 32, 2, 2, EOS, causal=False, pooling="last")
    return MultimodalModel(16, {"image": image, "text": text}, logit_scale=10.0, logit_bias=-10.0)


def coca(seed: int = 0, queries: int = 4) -> MultimodalModel:
    torch.manual_seed(seed)
    pool = CascadedAttentionPool(32, 2, queries)
    image = ImageEncoder("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": ""}, pool)
    text = TextEncoder(VOCAB, 12, 32, 2, 2, EOS, pooling="class_token")
    fusion = CrossAttentionFusion(32, 2, 2)
    return MultimodalModel(16, {"image": image, "text": text}, fusion, {"caption": CaptionHead(VOCAB, 32)})


def batch(size: int, seed: int = 1, lengths: list[int] | None = None, pad_to: int | None = None) -> dict[str, Padded]:
    """Random pictures and texts that begin with START and end with EOS, of lengths 3 to 12."""
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths or torch.randint(3, 13, (size,), generator=generator).tolist()
    ids = torch.full((size, pad_to or max(lengths)), PAD)
    for row, length in enumerate(lengths):
        ids[row, 0] = START
        ids[row, 1 : length - 1] = torch.randint(1, START, (length - 2,), generator=generator)
        ids[row, length - 1] = EOS
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    pixels = torch.randint(0, 256, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return {"image": Padded(pixels), "text": Padded(ids, mask)}
