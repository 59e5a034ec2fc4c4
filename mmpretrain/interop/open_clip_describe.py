"""Our model as open_clip's JSON config, or why open_clip cannot hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models.byobnet import ByobNet
from torch import nn

from mmpretrain.encoders import NaFlexImageEncoder, TextEncoder
from mmpretrain.errors import InputError
from mmpretrain.fusion import CrossAttentionFusion
from mmpretrain.heads import CaptionHead
from mmpretrain.interop.open_clip_text import CLIP_VOCABULARY
from mmpretrain.interop.towers import ImageTower, TextTower, activation_name, image_tower, plain_backbone, text_tower
from mmpretrain.model import MultimodalModel

Config = dict[str, Any]

POOLERS: dict[str, Config] = {
    "token": {},
    "avg": {"pool_type": "avg"},
    "SharedAttentionPool": {"attentional_pool": True},
    "CascadedAttentionPool": {"attentional_pool": "cascade"},
    "ParallelAttentionPool": {"attentional_pool": "parallel"},
    "ClassTokenPool": {},
}
"""How a native ViT pools -> fields of `vision_cfg`."""
TRAINING = ("drop_path_rate", "patch_drop_rate", "proj_drop_rate", "pos_drop_rate", "attn_drop_rate", "drop_rate")
"""Arguments of timm that change nothing outside of training."""


def describe(model: MultimodalModel, stated: Mapping[str, Any], image_size: int) -> Config:
    """Return open_clip's `model_cfg`; `stated` is our config of the image encoder, `image_size` the preprocessing's.

    Raises `InputError` naming what open_clip does not have.
    """
    if set(model.encoders) != {"image", "text"}:
        raise _refused(f"encoders {', '.join(model.encoders)}; it has one for images and one for texts")
    text = _described(text_tower, model.encoders["text"])
    section, native = _vision(model, stated, image_size)
    quick = {tower.activation == "quick_gelu" for tower in (text, native) if tower is not None}
    if len(quick) > 1:
        raise _refused("QuickGELU in one encoder alone")
    config: Config = {"embed_dim": model.embed_dim, "vision_cfg": section, "text_cfg": _text(model, text)}
    if quick == {True}:
        config["quick_gelu"] = True
    if model.logit_bias is not None:
        config["init_logit_bias"] = -10
    if model.fusion is not None or len(model.heads):
        config["multimodal_cfg"] = _decoder(model, text, quick == {True})
        section["output_tokens"] = config["text_cfg"]["output_tokens"] = True
    elif text.pooling == "class_token" or section.get("attentional_pool"):
        raise _refused("CoCa's encoders without its decoder")
    if "multimodal_cfg" in config or not text.causal:
        config["custom_text"] = True
    return config


def _vision(model: MultimodalModel, stated: Mapping[str, Any], image_size: int) -> tuple[Config, ImageTower | None]:
    """Return `vision_cfg`, and the tower where it is open_clip's own ViT and not timm's."""
    encoder: Any = model.encoders["image"]
    projection = model.projections["image"]
    backbone = getattr(encoder, "backbone", None)
    if isinstance(encoder, NaFlexImageEncoder):
        raise _refused("image encoder for pictures of any size (NaFlex)")
    if isinstance(backbone, ByobNet) and hasattr(backbone.head, "pos_embed") and type(projection) is nn.Linear:
        return _resnet(backbone), None
    try:
        tower = image_tower(encoder)
    except InputError:
        tower = None
    if tower is not None and tower.class_token and _bare(projection):
        return _vit(tower, encoder), tower
    if getattr(encoder, "pool", None) is not None:
        raise _refused(f"{type(encoder.pool).__name__} on an image encoder that is not its own ViT")
    return _trunk(encoder, projection, stated, tower, image_size), None


def _resnet(backbone: Any) -> Config:
    """OpenAI's ResNet: as many positions as the last stage has places, and one for their mean."""
    side = math.isqrt(len(backbone.head.pos_embed) - 1)
    width = 2 * backbone.stem.conv1.conv.out_channels
    return {"image_size": 32 * side, "layers": [len(stage) for stage in backbone.stages], "width": width}


def _vit(tower: ImageTower, encoder: Any) -> Config:
    """Open_clip's own ViT: class token, and a projection that is a bare matrix."""
    if tower.pool not in POOLERS:
        raise _refused(f"{tower.pool} pooling of a ViT with a class token")
    section: Config = {
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "width": tower.width,
        "layers": tower.depth,
        "head_width": tower.width // tower.num_heads,
        "mlp_ratio": _ratio(tower.width, tower.hidden),
        **POOLERS[tower.pool],
        **_norms(tower.norm_eps),
        **_activation(tower.activation),
    }
    if not tower.norm_before:
        section["no_ln_pre"] = True
    if tower.layer_scale:
        section["ls_init_value"] = 1.0
    if tower.pool == "avg":
        section["final_ln_after_pool"] = tower.norm_at == "pooled"
    if "attentional_pool" in section:
        pool = encoder.pool.pool if tower.pool == "SharedAttentionPool" else encoder.pool.caption
        section |= {"attn_pooler_heads": pool.attention.num_heads, "attn_pooler_queries": len(pool.query)}
    expected = {"SharedAttentionPool": "", "avg": tower.norm_at}.get(tower.pool, "tokens")
    if tower.norm_at != expected:
        raise _refused(f"a norm of {tower.norm_at or 'nothing'} before {tower.pool} pooling")
    return section


def _trunk(
    encoder: Any, projection: nn.Module, stated: Mapping[str, Any], tower: ImageTower | None, image_size: int
) -> Config:
    """A timm backbone, which open_clip builds by its name and kind of pooling alone."""
    name, arguments = stated.get("name"), stated.get("model_args") or {}
    if name is None or not timm.is_model(name):
        raise _refused(f"{type(encoder).__name__} as image encoder")
    held = getattr(encoder.backbone, "global_pool", "")  # convolutional ones hold a module
    pool = getattr(held, "pool_type", held if isinstance(held, str) else "")
    changes = {key: value for key, value in arguments.items() if key not in (*TRAINING, "global_pool")}
    if changes:
        with torch.device("meta"):
            plain = timm.create_model(name, num_classes=0, **({"global_pool": pool} if pool else {}))
        if tower is None or plain_backbone(plain) != plain_backbone(encoder.backbone):
            raise _refused(f"model_args {changes} for timm's {name}, which it builds without arguments")
    size = image_size if tower is None else tower.image_size
    section = {"image_size": size, "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool}
    return section | _projection(projection)


def _projection(projection: nn.Module) -> Config:
    if isinstance(projection, nn.Identity):
        return {"timm_proj": "none"}
    if type(projection) is nn.Linear:
        return {"timm_proj": "linear", "timm_proj_bias": projection.bias is not None}
    if isinstance(projection, nn.Sequential) and [type(layer) for layer in projection] == [
        nn.Linear,
        nn.GELU,
        nn.Linear,
    ]:
        last: Any = projection[2]
        return {"timm_proj": "mlp", "timm_proj_bias": last.bias is not None}
    raise _refused(f"{type(projection).__name__} as projection of the image")


def _text(model: MultimodalModel, text: TextTower) -> Config:
    encoder: Any = model.encoders["text"]
    section: Config = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.depth,
        "mlp_ratio": _ratio(text.width, text.hidden),
        **_norms(text.norm_eps),
        **_activation(text.activation),
    }
    if not text.causal:
        section["no_causal_mask"] = True
    if text.pooling == "class_token":
        if encoder.class_mask != "legacy":
            raise _refused("a class token that sees exactly the text (class_mask=exact); its own sees one place more")
        section["embed_cls"] = True
    elif text.pooling == "last":
        section["pool_type"] = "last"
    elif text.pooling == "eos" and (text.causal or encoder.reads_padding):
        if (text.vocab_size, text.eos_id) != (CLIP_VOCABULARY, CLIP_VOCABULARY - 1):
            section |= {"pool_type": "eos", "eos_id": text.eos_id}
    else:
        masked = "" if encoder.reads_padding else ", bidirectional with a mask for padding"
        raise _refused(f"{text.pooling} pooling of the text{masked}")
    projection = model.projections["text"]
    if isinstance(projection, nn.Identity):
        section["proj_type"] = "none"
    elif type(projection) is not nn.Linear:
        raise _refused(f"{type(projection).__name__} as projection of the text")
    elif projection.bias is not None:
        section["proj_bias"] = True
    return section


def _decoder(model: MultimodalModel, text: TextTower, quick_gelu: bool) -> Config:
    fusion, heads = model.fusion, dict(model.heads)
    if not isinstance(fusion, CrossAttentionFusion) or list(heads) != ["caption"]:
        raise _refused(f"fusion {type(fusion).__name__} with the heads {', '.join(heads) or 'none'}")
    head = heads["caption"]
    block: Any = fusion.blocks[0]
    activation = activation_name(block.mlp.activation, "decoder")
    fits = {
        "another head than CaptionHead of text": isinstance(head, CaptionHead) and head.modality == "text",
        "a decoder of another width than its text encoder's": block.norm1.weight.shape == (text.width,),
        "an MLP of another width than 4 times the decoder's": block.mlp.up.out_features == 4 * text.width,
        f"the activation {activation} in the decoder": activation == ("quick_gelu" if quick_gelu else "gelu"),
        "norms of another epsilon than 1e-5 in the decoder": block.norm1.eps == 1e-5,
        "a caption model whose text has no class token": text.pooling == "class_token",
    }
    if lacking := [feature for feature, holds in fits.items() if not holds]:
        raise _refused("; ".join(lacking))
    return {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": block.attention.num_heads,
        "layers": len(fusion.blocks),
    }


def _described(describe: Any, encoder: nn.Module) -> Any:
    try:
        return describe(encoder)
    except InputError as error:
        fetched = "" if isinstance(encoder, TextEncoder) else "; it fetches such encoders' configs from the hub by name"
        raise InputError(f"open_clip cannot hold this model: {error}{fetched}") from error


def _bare(projection: nn.Module) -> bool:
    return type(projection) is nn.Linear and projection.bias is None


def _norms(eps: float) -> Config:
    return {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}


def _activation(name: str) -> Config:
    return {"act_kwargs": {"approximate": "tanh"}} if name == "gelu_tanh" else {}


def _ratio(width: int, hidden: int) -> float:
    """A ratio that gives the hidden width again where it is cut to an integer."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.25) / width


def _refused(feature: str) -> InputError:
    return InputError(f"open_clip has no {feature}; the model cannot be written for it")
