"""Shipped models at a tiny size, saved with bytes as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mmpretrain import save
from mmpretrain.composition import register_resolvers
from mmpretrain.config import instantiate

SIDE, LENGTH = 32, 24
TEXT = ["vocab_size=259", "eos_id=2", "width=32", "depth=2", "num_heads=2", f"context_length={LENGTH}"]
VIT = "++model.encoders.image.model_args={img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2"
CONVNEXT = "+model.encoders.image.model_args={depths: [1, 1, 1, 1], dims: [8, 16, 24, 32]}"
RESNET = "++model.encoders.image.model_args={img_size: 32, width_factor: 0.25}"
FAMILIES = {
    "clip_tiny": [VIT + "}"],
    "siglip_tiny": [
        VIT + ", class_token: false, global_pool: map}",
        "model.projections.text.in_features=32",
        "model.projections.text.out_features=32",
        "model.embed_dim=32",
    ],
    "coca_tiny": [
        VIT + ", class_token: false, global_pool: ''}",
        "model.encoders.image.pool.width=32",
        "model.encoders.image.pool.num_heads=2",
        "model.fusion.width=32",
        "model.fusion.num_heads=2",
        "model.heads.caption.width=32",
        "model.heads.caption.vocab_size=259",
    ],
    "clip_convnext_base": [CONVNEXT, "model.encoders.text.depth=1"],
    "clip_rn50": [RESNET, "model.encoders.text.depth=1"],
}
SLOW = {"clip_rn50"}  # over 200 operators
PARAMETERS = [pytest.param(family, marks=pytest.mark.slow if family in SLOW else ()) for family in FAMILIES]


def config(family: str) -> dict[str, Any]:
    """What `mmpretrain.save` takes, of one of `FAMILIES`."""
    register_resolvers()
    text = [f"model.encoders.text.{override}" for override in TEXT]
    with initialize_config_module("mmpretrain.configs", version_base="1.3"):
        composed = compose("train", overrides=["run_dir=none", f"model={family}", *text, *FAMILIES[family]])
    pad = "context_length" if composed.model.encoders.text.get("pooling") == "last" else "longest"
    return {
        "model": OmegaConf.to_container(composed.model, resolve=True),
        "preprocess": {"_target_": "mmpretrain.data.preprocess.Preprocess", "image_size": SIDE},
        "tokenizer": {
            "_target_": "mmpretrain.data.tokenizer.ByteTokenizer",
            "context_length": LENGTH,
            "pad": pad,
            "pad_multiple": 4,
        },
    }


def saved(folder: Path, family: str, seed: int = 0) -> Path:
    """Save a family with random weights."""
    torch.manual_seed(seed)
    parts = config(family)
    return save(folder, instantiate(parts["model"]), parts)
