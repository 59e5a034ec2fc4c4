"""Our model as the config.json of transformers' CLIPModel, SiglipModel or Siglip2Model, or why it is none of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mmpretrain.errors import InputError
from mmpretrain.interop.huggingface_config import ACTIVATIONS, LEGACY_EOS, Config
from mmpretrain.interop.towers import ImageTower, TextTower, image_tower, text_tower
from mmpretrain.model import MultimodalModel

ARCHITECTURES = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}
"""The class of each `model_type`."""


class Described(NamedTuple):
    """What the model is to transformers."""

    model_type: str
    config: Config
    image: ImageTower
    text: TextTower


def describe(model: MultimodalModel, start_id: int | None, pad_id: int) -> Described:
    """Return the config of the class that computes the same; ids are the tokenizer's.

    Raises `InputError` naming every feature that none of the three classes has.
    """
    if set(model.encoders) != {"image", "text"} or model.fusion is not None or len(model.heads):
        raise InputError(
            f"huggingface: the model has the encoders {', '.join(model.encoders)}"
            f"{'' if model.fusion is None else ', a fusion'}{', heads' if len(model.heads) else ''}; CLIPModel, "
            "SiglipModel and Siglip2Model have an image and a text encoder and nothing else"
        )
    try:
        image, text = image_tower(model.encoders["image"]), text_tower(model.encoders["text"])
    except InputError as error:
        raise InputError(f"huggingface: transformers' classes cannot hold this model: {error}") from error
    model_type = "clip" if text.causal else "siglip" if image.image_size is not None else "siglip2"
    lacking = _clip_lacks(model, image, text) if model_type == "clip" else _siglip_lacks(model, image, text)
    if lacking:
        raise InputError(f"huggingface: {ARCHITECTURES[model_type]} is nearest, but has no {'; no '.join(lacking)}")
    config: Config = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "text_config": {**_text(text), "bos_token_id": start_id, "eos_token_id": text.eos_id, "pad_token_id": pad_id},
        "vision_config": _vision(image, model_type),
        "initializer_factor": 1.0,
        "dtype": "float32",
    }
    if model_type != "clip":
        config["text_config"]["projection_size"] = model.embed_dim
    else:
        config["projection_dim"] = model.embed_dim
        config["logit_scale_init_value"] = 2.6592
        for half in ("text_config", "vision_config"):
            config[half]["projection_dim"] = model.embed_dim
    return Described(model_type, config, image, text)


def _clip_lacks(model: MultimodalModel, image: ImageTower, text: TextTower) -> list[str]:
    tests = {
        **_always(image),
        "pictures of any size (NaFlex)": image.image_size is not None,
        f"{image.pool} pooling of the image": image.pool == "token" and image.class_token,
        "image encoder without a norm before its blocks": image.norm_before,
        "bias in the patch embedding": not image.patch_bias,
        f"{text.pooling} pooling of the text": text.pooling == "eos",
        f"end id {LEGACY_EOS}, which it takes for the largest id of a text": text.eos_id != LEGACY_EOS,
        "logit_bias": model.logit_bias is None,
        **{
            f"projection of {name} other than a matrix": _linear(model.projections[name], bias=False)
            for name in ("image", "text")
        },
    }
    return [feature for feature, holds in tests.items() if not holds]


def _siglip_lacks(model: MultimodalModel, image: ImageTower, text: TextTower) -> list[str]:
    tests = {
        **_always(image),
        f"{image.pool} pooling of the image": image.pool == "map",
        "class token": not image.class_token,
        "norm before the image encoder's blocks": not image.norm_before,
        "patch embedding without bias": image.patch_bias,
        f"{text.pooling} pooling of the text": text.pooling == "last",
        "model without logit_bias": model.logit_bias is not None,
        "projection of image": isinstance(model.projections["image"], nn.Identity),
        "projection of text other than a layer with bias": _linear(model.projections["text"], bias=True),
    }
    return [feature for feature, holds in tests.items() if not holds]


def _always(image: ImageTower) -> dict[str, bool]:
    return {
        "layer scale": not image.layer_scale,
        "image encoder without a norm behind its blocks": image.norm_at == "tokens",
    }


def _linear(layer: nn.Module, bias: bool) -> bool:
    return type(layer) is nn.Linear and (layer.bias is not None) == bias


def _text(text: TextTower) -> Config:
    return {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        **_sizes(text),
    }


def _vision(image: ImageTower, model_type: str) -> Config:
    size = {"num_patches": image.grid**2} if model_type == "siglip2" else {"image_size": image.image_size}
    head = {} if model_type == "clip" else {"vision_use_head": True}
    return {"num_channels": 3, "patch_size": image.patch_size, **size, **head, **_sizes(image)}


def _sizes(tower: ImageTower | TextTower) -> Config:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.hidden,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.num_heads,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == tower.activation),
        "layer_norm_eps": tower.norm_eps,
        "attention_dropout": 0.0,
    }
