"""Model folders of ours, tiny and with random weights, for what writes them for other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmpretrain import save
from mmpretrain.config import build_saved

Config = dict[str, Any]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
TEXT = {
    "_target_": "mmpretrain.TextEncoder",
    "vocab_size": 49408,
    "eos_id": 49407,
    "context_length": 16,
    "width": 32,
    "depth": 2,
    "num_heads": 2,
}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
LINEAR = {"_target_": "torch.nn.Linear", "in_features": 32, "out_features": 64}


def clip(**image: Any) -> Config:
    """OpenAI's: QuickGELU, norm before the blocks, class token."""
    args = {**VIT, "act_layer": "quick_gelu", **image}
    encoder = {"_target_": "mmpretrain.ImageEncoder", "name": "vit_base_patch32_clip_224", "model_args": args}
    text = {**TEXT, "activation": "quick_gelu"}
    return parts({"image": encoder, "text": text}, {"embed_dim": 24})


def small_clip() -> Config:
    """As `model=clip_tiny`: a bias where CLIP has none, and no norm before the blocks."""
    encoder = {"_target_": "mmpretrain.ImageEncoder", "name": "vit_tiny_patch16_224", "model_args": VIT}
    return parts({"image": encoder, "text": dict(TEXT)}, {"embed_dim": 24})


def siglip(**image: Any) -> Config:
    args = {**VIT, "num_heads": 2, "act_layer": "gelu_tanh", **image}
    encoder = {"_target_": "mmpretrain.ImageEncoder", "name": "vit_base_patch16_siglip_224", "model_args": args, **HALF}
    found = parts({"image": encoder, "text": bidirectional()}, sigmoid(64), pad="context_length", pad_id=49407)
    found["preprocess"]["resize"] = "squash"
    return found


def naflex() -> Config:
    args = {**VIT, "num_heads": 2, "pos_embed_grid_size": [4, 4]}
    del args["img_size"]
    encoder = {"_target_": "mmpretrain.NaFlexImageEncoder", "model_args": args}
    found = parts({"image": encoder, "text": bidirectional()}, sigmoid(64), pad="context_length", pad_id=49407)
    found["preprocess"] = {
        "_target_": "mmpretrain.data.naflex.NaFlexPreprocess",
        "patch_size": 8,
        "max_patches": 20,
    }
    return found


def coca(**text: Any) -> Config:
    """open_clip's: one pooler, a class token behind the text that sees one place too many."""
    pool = {"_target_": "mmpretrain.SharedAttentionPool", "width": 32, "num_heads": 2, "num_queries": 5}
    args = {**VIT, "global_pool": "", "final_norm": False}
    encoder = {
        "_target_": "mmpretrain.ImageEncoder",
        "name": "vit_base_patch32_clip_224",
        "model_args": args,
        "pool": {**pool, "context_width": 64},
    }
    words = {**TEXT, "pooling": "class_token", "class_mask": "legacy", **text}
    rest = {
        "embed_dim": 32,
        "fusion": {"_target_": "mmpretrain.CrossAttentionFusion", "width": 32, "depth": 2, "num_heads": 2},
        "heads": {"caption": {"_target_": "mmpretrain.CaptionHead", "vocab_size": 49408, "width": 32}},
    }
    return parts({"image": encoder, "text": words}, rest, pad="context_length")


def bidirectional() -> Config:
    return {**TEXT, "causal": False, "pooling": "last", "activation": "gelu_tanh", "norm_eps": 1e-6}


def sigmoid(width: int) -> Config:
    projections = {"image": {"_target_": "torch.nn.Identity"}, "text": {**LINEAR, "out_features": width}}
    return {"embed_dim": width, "logit_scale": 10.0, "logit_bias": -10.0, "projections": projections}


def parts(encoders: Config, rest: Config, **tokenizer: Any) -> Config:
    """What `mmpretrain.save` takes."""
    return {
        "model": {"_target_": "mmpretrain.MultimodalModel", "encoders": encoders, **rest},
        "preprocess": {"_target_": "mmpretrain.data.preprocess.Preprocess", "image_size": 32},
        "tokenizer": {
            "_target_": "mmpretrain.data.tokenizer.ClipTokenizer",
            "context_length": encoders["text"]["context_length"],
            **tokenizer,
        },
    }


def saved(folder: Path, config: Config, seed: int = 0) -> Path:
    """Save a model with random weights, none of which is zero or one as at the start."""
    torch.manual_seed(seed)
    model = build_saved(config["model"])
    noisy(model)
    return save(folder, model, config)


@torch.no_grad()
def noisy(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
