"""open_clip's JSON config of a model -> our `model` config, and the table of names that belongs to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmpretrain.errors import InputError
from mmpretrain.interop import open_clip_names as names
from mmpretrain.interop.huggingface_fields import is_count
from mmpretrain.interop.names import Entry
from mmpretrain.interop.open_clip_image import fields, image_tower, refused
from mmpretrain.interop.open_clip_text import decoder, text_tower

DEFAULTS: dict[str, Any] = {
    "embed_dim": None,
    "vision_cfg": None,
    "text_cfg": None,
    "multimodal_cfg": None,
    "custom_text": False,
    "quick_gelu": False,
    "init_logit_scale": None,
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
    "pad_id": 0,
    "output_dict": False,
}
"""Fields of a config that are read; `custom_text` says which of its classes open_clip takes."""


class Described(NamedTuple):
    """A model in our terms: its config, the table of its names, and fields of open_clip's that are needed further."""

    model: dict[str, Any]
    table: list[Entry]
    image_size: Any
    text: dict[str, Any]
    reads_padding: bool


def describe(
    config: Mapping[str, Any],
    huggingface: Mapping[str, Any] | None = None,
    eos_id: int | None = None,
    prefix: str | None = None,
) -> Described:
    """Return our config for open_clip's; raises `InputError` for a feature that is missing here, naming its field.

    `huggingface`: the `config.json` of `text_cfg.hf_model_name`. `eos_id`: that of a tokenizer other than CLIP's.
    `prefix`: what the names of the text encoder begin with, where weights do not follow the config; None = they do.
    """
    given = fields(config, DEFAULTS, "config")
    embed_dim, quick_gelu, text = given["embed_dim"], bool(given["quick_gelu"]), given["text_cfg"]
    if not is_count(embed_dim) or not isinstance(given["vision_cfg"], Mapping) or not isinstance(text, Mapping):
        raise InputError("this is no config of open_clip's: it lacks embed_dim, vision_cfg or text_cfg")
    prefix = text_prefix(config) if prefix is None else prefix
    image = image_tower(given["vision_cfg"], embed_dim, quick_gelu)
    caption = given["multimodal_cfg"] and decoder(given["multimodal_cfg"], text, image, quick_gelu)
    written = text_tower(text, embed_dim, quick_gelu, prefix, huggingface, eos_id)
    if text.get("embed_cls") and not caption and not given["custom_text"]:
        raise refused("text_cfg.embed_cls", "open_clip's own class for this config leaves its class token out")
    model: dict[str, Any] = {
        "_target_": "mmpretrain.MultimodalModel",
        "embed_dim": embed_dim,
        "encoders": {"image": image.encoder, "text": written.encoder},
    }
    projections = {m: t.projection for m, t in (("image", image), ("text", written)) if t.projection is not None}
    model |= {"projections": projections} if projections else {}
    model |= {"fusion": caption.fusion, "heads": caption.heads} if caption else {}
    if given["init_logit_scale"] is not None:
        model["logit_scale"] = math.exp(given["init_logit_scale"])
    if given["init_logit_bias"] is not None:
        model["logit_bias"] = float(given["init_logit_bias"])
    table = [*image.table, *written.table, *(caption.table if caption else ()), *names.SCALARS]
    encoder = written.encoder
    reads_padding = bool(
        encoder.get("reads_padding") or encoder.get("pooling") == "last" or encoder.get("class_mask") == "legacy"
    )
    return Described(model, table, given["vision_cfg"].get("image_size", 224), dict(text), reads_padding)


def text_prefix(config: Mapping[str, Any]) -> str:
    """Return what the names of the text encoder begin with in the class that open_clip takes for this config."""
    custom = config.get("custom_text") or config.get("text_cfg", {}).get("hf_model_name")
    return "text." if custom else ""
