"""A config.json of transformers' CLIPModel, SiglipModel or Siglip2Model as the config of our model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpretrain.errors import InputError
from mmpretrain.interop.huggingface_fields import check_kinds, section

MAX_JSON = 2**24
"""Bytes of the largest JSON that is read; a config has a few thousand."""

Config = dict[str, Any]

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
"""Their names of activations and ours."""

LEGACY_EOS = 2
"""With this `eos_token_id` CLIPModel pools at the largest id, whatever the tokenizer's end id is."""

CLIP_TIMM, SIGLIP_TIMM, NAFLEX_TIMM = (
    "vit_base_patch32_clip_224",
    "vit_base_patch16_siglip_224",
    "naflexvit_base_patch16_siglip",
)
"""timm's models of the three kinds; every size is given by `model_args`."""
TIMM_EPS: dict[str, dict[float, Config]] = {
    "clip": {1e-5: {}, 1e-6: {"norm_layer": "layernorm"}},
    "siglip": {1e-6: {}},
    "siglip2": {1e-6: {}},
}
"""Norm epsilons that these timm models can have, and the `model_args` for them."""

# What a config.json leaves out has its library's default: transformers writes only what differs.
_SIZES = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072}
_SIGLIP_TEXT = {
    **_SIZES,
    "vocab_size": 32000,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "projection_size": None,
}
_SIGLIP_VISION = {
    **_SIZES,
    "num_channels": 3,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
DEFAULTS: dict[str, dict[str, Config]] = {
    "clip": {
        "text_config": {
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "eos_token_id": 49407,
        },
        "vision_config": {
            **_SIZES,
            "num_channels": 3,
            "image_size": 224,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        "top": {"projection_dim": 512},
    },
    "siglip": {"text_config": _SIGLIP_TEXT, "vision_config": {**_SIGLIP_VISION, "image_size": 224}, "top": {}},
    "siglip2": {"text_config": _SIGLIP_TEXT, "vision_config": {**_SIGLIP_VISION, "num_patches": 256}, "top": {}},
}


class Towers:
    """The two halves of a config.json with every default filled in: `type`, `text`, `vision`, `top`."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in DEFAULTS:
            raise InputError(f"{source}: model_type is {kind!r}; expected one of {', '.join(DEFAULTS)}")
        self.type: str = kind
        self.source = source
        self.text, self.vision = (
            _half(config, DEFAULTS[kind][half], half, source) for half in ("text_config", "vision_config")
        )
        self.top: Config = {**DEFAULTS[kind]["top"], **config}
        check_kinds(self.top, DEFAULTS[kind]["top"], f"{source}: config")

    def activation(self, half: Config, name: str) -> str:
        """Our name of the activation of one half."""
        given = half["hidden_act"]
        if given not in ACTIVATIONS:
            raise InputError(f"{self.source}: {name}.hidden_act is {given!r}; known are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[given]


def read_json(path: Path) -> Config:
    """Read a JSON object; raises `InputError` where the file is not there or holds something else."""
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}; copy it there with the other files of the model")
    if path.stat().st_size > MAX_JSON:
        raise InputError(f"{path} has {path.stat().st_size} bytes; expected at most {MAX_JSON}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}; expected a JSON object")
    return content


def our_model(towers: Towers, eos_id: int, mean: list[float], std: list[float]) -> Config:
    """Describe our model of the same sizes; `eos_id` is the tokenizer's, `mean` and `std` the image processor's."""
    text = _text_encoder(towers, eos_id)
    image = {**_image_encoder(towers), "mean": mean, "std": std}
    model: Config = {"_target_": "mmpretrain.MultimodalModel", "encoders": {"image": image, "text": text}}
    if towers.type == "clip":
        width = towers.top["projection_dim"]
        return {**model, "embed_dim": width}
    width = towers.vision["hidden_size"]
    projected = towers.text["projection_size"] or towers.text["hidden_size"]
    if projected != width:
        raise InputError(
            f"{towers.source}: the text head gives {projected} numbers and the image encoder {width}; they must agree"
        )
    linear = {"_target_": "torch.nn.Linear", "in_features": towers.text["hidden_size"], "out_features": width}
    projections = {"image": {"_target_": "torch.nn.Identity"}, "text": linear}
    return {**model, "embed_dim": width, "logit_scale": 10.0, "logit_bias": -10.0, "projections": projections}


def _text_encoder(towers: Towers, eos_id: int) -> Config:
    text, is_clip = towers.text, towers.type == "clip"
    if is_clip:
        _check_pooling(towers, eos_id)
    return {
        "_target_": "mmpretrain.TextEncoder",
        "vocab_size": text["vocab_size"],
        "context_length": text["max_position_embeddings"],
        "width": text["hidden_size"],
        "depth": text["num_hidden_layers"],
        "num_heads": text["num_attention_heads"],
        "eos_id": eos_id,
        "causal": is_clip,
        "pooling": "eos" if is_clip else "last",
        "mlp_ratio": _ratio(text),
        "activation": towers.activation(text, "text_config"),
        "norm_eps": text["layer_norm_eps"],
    }


def _check_pooling(towers: Towers, eos_id: int) -> None:
    """See that the first end id of a text is where CLIPModel pools."""
    given, vocab_size = towers.text["eos_token_id"], towers.text["vocab_size"]
    if given == LEGACY_EOS and eos_id != vocab_size - 1:
        raise InputError(
            f"{towers.source}: eos_token_id {LEGACY_EOS} lets CLIPModel pool at the largest id of a text, which for "
            f"{vocab_size} ids need not be the tokenizer's end id {eos_id}; set text_config.eos_token_id to {eos_id} "
            "if texts are pooled there"
        )
    if given not in (LEGACY_EOS, eos_id):
        raise InputError(
            f"{towers.source}: the model pools at the id {given!r} (text_config.eos_token_id) but the tokenizer ends "
            f"texts with {eos_id}; the tokenizer is of another model"
        )


def _image_encoder(towers: Towers) -> Config:
    vision = towers.vision
    _check_vision(towers)
    patch = vision["patch_size"]
    args: Config = {
        "patch_size": patch,
        "embed_dim": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "num_heads": vision["num_attention_heads"],
        "mlp_ratio": _ratio(vision),
        "act_layer": towers.activation(vision, "vision_config"),
        **TIMM_EPS[towers.type][vision["layer_norm_eps"]],
    }
    if towers.type == "siglip2":
        side = round(vision["num_patches"] ** 0.5)
        args["pos_embed_grid_size"] = [side, side]
        return {"_target_": "mmpretrain.NaFlexImageEncoder", "name": NAFLEX_TIMM, "model_args": args}
    args["img_size"] = vision["image_size"]
    return {
        "_target_": "mmpretrain.ImageEncoder",
        "name": CLIP_TIMM if towers.type == "clip" else SIGLIP_TIMM,
        "model_args": args,
    }


def _check_vision(towers: Towers) -> None:
    vision, eps = towers.vision, TIMM_EPS[towers.type]
    places = vision.get("num_patches", 1)
    side = round(places**0.5) if isinstance(places, int) else 0
    tests = {
        f"layer_norm_eps {vision['layer_norm_eps']}, expected {' or '.join(map(str, eps))}": vision["layer_norm_eps"]
        in eps,
        f"{vision['num_channels']} channels, expected 3": vision["num_channels"] == 3,
        "no pooling head (vision_use_head)": vision.get("vision_use_head", True),
        f"patches of size {vision['patch_size']}, expected one number": isinstance(vision["patch_size"], int),
        f"{vision.get('num_patches')} positions, expected a square": side**2 == vision.get("num_patches", 1),
        f"images of size {vision.get('image_size')}, expected one number": isinstance(vision.get("image_size", 0), int),
    }
    lacking = [feature for feature, holds in tests.items() if not holds]
    if lacking:
        raise InputError(f"{towers.source}: vision_config has {'; '.join(lacking)}; such a model cannot be converted")


def _half(config: Mapping[str, Any], defaults: Config, name: str, source: str) -> Config:
    """Return one half with its defaults; an old `text_config_dict` wins over `text_config`, as in transformers."""
    half = {**defaults, **section(config, name, source)}
    if config.get(f"{name}_dict") is not None:
        half = {**half, **defaults, **section(config, f"{name}_dict", source)}
    single = ("patch_size", "image_size", "num_patches")  # whose lists have an error of their own
    checked = {key: x for key, x in defaults.items() if key not in single or not isinstance(half[key], list)}
    check_kinds(half, checked, f"{source}: {name}")
    if half["hidden_size"] % half["num_attention_heads"]:
        raise InputError(
            f"{source}: {name} has hidden_size {half['hidden_size']}, which {half['num_attention_heads']} heads "
            "(num_attention_heads) cannot share equally"
        )
    return half


def _ratio(half: Config) -> float:
    """A ratio that gives the hidden width again, whether it is cut (timm) or rounded (ours) to an integer."""
    width, hidden = half["hidden_size"], half["intermediate_size"]
    exact: float = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.25) / width
