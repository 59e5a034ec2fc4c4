"""The text encoder that open_clip's `text_cfg` describes, and CoCa's decoder, as our config, with tables of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mmpretrain.encoders.huggingface_text import library_config, plain_config
from mmpretrain.interop import open_clip_names as names
from mmpretrain.interop.names import Entry
from mmpretrain.interop.open_clip_image import Tower, activation, fields, linear, norm_eps, refused

CLIP_VOCABULARY = 49_408
"""Ids of CLIP's own tokenizer, whose end of text is the largest."""

DEFAULTS: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": CLIP_VOCABULARY,
    "hf_tokenizer_name": None,
    "tokenizer_mode": None,
    "tokenizer_kwargs": None,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "embed_cls": False,
    "pad_id": 0,
    "eos_id": 2,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "final_ln_after_pool": False,
    "hf_model_name": None,
    "hf_model_pretrained": True,
    "hf_proj_type": "mlp",
    "hf_pooler_type": "mean_pooler",
}
"""Fields of `text_cfg` that are read (or that say nothing of the model), and open_clip's values of those left out."""

DECODER_DEFAULTS: dict[str, Any] = {
    **{key: DEFAULTS[key] for key in ("context_length", "width", "heads", "layers")},
    # what follows is in the configs, and open_clip does not read it
    **dict.fromkeys(("vocab_size", "mlp_ratio", "dim_head", "n_queries", "attn_pooler_heads", "pad_id", "eos_id")),
}
"""Fields of `multimodal_cfg`."""

POOLINGS = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "first"}
"""open_clip's poolers of Hugging Face models -> ours; `cls_pooler` depends on the model."""


class Decoder(NamedTuple):
    """CoCa's decoder in our terms: the configs of fusion and heads, and the table of its names."""

    fusion: dict[str, Any]
    heads: dict[str, Any]
    table: list[Entry]


def text_tower(
    given: Mapping[str, Any],
    embed_dim: int,
    quick_gelu: bool,
    prefix: str,
    huggingface: Mapping[str, Any] | None = None,
    eos_id: int | None = None,
) -> Tower:
    """Return the text encoder of a `text_cfg`; raises `InputError` for a feature we lack, naming it.

    `prefix` is what its names begin with: empty or `text.`. `huggingface`: the `config.json` of its `hf_model_name`.
    `eos_id`: the tokenizer's, None for CLIP's own.
    """
    text = fields(given, DEFAULTS, "text_cfg")
    if text["hf_model_name"]:
        return _huggingface(text, embed_dim, huggingface or {})
    width, vocab_size = int(text["width"]), int(text["vocab_size"])
    encoder: dict[str, Any] = {
        "_target_": "mmpretrain.TextEncoder",
        "vocab_size": vocab_size,
        "context_length": text["context_length"],
        "width": width,
        "depth": text["layers"],
        "num_heads": text["heads"],
        "eos_id": CLIP_VOCABULARY - 1 if eos_id is None else eos_id,
        "activation": activation(quick_gelu, text["act_kwargs"], "text_cfg"),
        "norm_eps": norm_eps(text["norm_kwargs"], "text_cfg"),
        **_attention(text, prefix, eos_id),
    }
    if text["mlp_ratio"] != DEFAULTS["mlp_ratio"]:
        encoder["mlp_ratio"] = mlp_ratio(width, text["mlp_ratio"])
    if text["proj_type"] == "none":
        if width != embed_dim:
            raise refused(f"embed_dim={embed_dim}", f"the text encoder gives {width} and has no projection")
        return Tower(encoder, {"_target_": "torch.nn.Identity"}, names.text(prefix), width)
    bias = bool(text["proj_bias"])
    table = [*names.text(prefix), *names.text_projection(prefix, bias)]
    return Tower(encoder, linear(width, embed_dim, True) if bias else None, table, width)


def _attention(text: Mapping[str, Any], prefix: str, eos_id: int | None) -> dict[str, Any]:
    """Return what is attended to and what is pooled."""
    causal, kind = not text["no_causal_mask"], text["pool_type"]
    if text["embed_cls"]:
        if not causal or not prefix:
            raise refused("text_cfg.embed_cls", "a class token is known behind causal text, in open_clip's own class")
        return {"pooling": "class_token", "class_mask": "legacy"}
    if kind == "last":
        return {"causal": causal, "pooling": "last"}
    if eos_id is None and not text["hf_tokenizer_name"]:
        eos_id = CLIP_VOCABULARY - 1
    if kind == "argmax" and eos_id != text["vocab_size"] - 1:
        why = "the largest id is known to end a text only in CLIP's vocabulary, or where it is the last one"
        raise refused(f"text_cfg.pool_type={kind!r}", why)
    if kind == "eos" and eos_id is not None and eos_id != text["eos_id"]:
        raise refused(f"text_cfg.eos_id={text['eos_id']}", f"the tokenizer ends a text with {eos_id}")
    if kind not in ("argmax", "eos"):
        raise refused(f"text_cfg.pool_type={kind!r}", "known are argmax, eos and last")
    # open_clip has no mask for padding: text that is not causal attends to it.
    return {} if causal else {"causal": False, "reads_padding": True}


def mlp_ratio(width: int, ratio: float) -> float:
    """Return the ratio for which our rounding gives open_clip's hidden width, which is cut off."""
    hidden = int(width * ratio)
    return float(ratio) if round(width * ratio) == hidden else hidden / width


def _huggingface(text: Mapping[str, Any], embed_dim: int, config: Mapping[str, Any]) -> Tower:
    if not config:
        raise refused(f"text_cfg.hf_model_name={text['hf_model_name']!r}", "its config.json is needed")
    plain, found = plain_config(config), library_config(config)
    width = int(found.hidden_size)
    pooler, kind = text["hf_pooler_type"] or "mean_pooler", text["hf_proj_type"]
    if pooler == "cls_pooler":
        pooling = "first" if found.is_encoder_decoder else "pooler"
    elif pooler in POOLINGS:
        pooling = POOLINGS[pooler]
    else:
        raise refused(f"text_cfg.hf_pooler_type={pooler!r}", f"known are cls_pooler, {', '.join(POOLINGS)}")
    encoder = {
        "_target_": "mmpretrain.HuggingFaceTextEncoder",
        "config": plain,
        "context_length": text["context_length"],
        "pooling": pooling,
    }
    hidden = (width + embed_dim) // 2
    layers = [linear(width, hidden, False), {"_target_": "torch.nn.GELU"}, linear(hidden, embed_dim, False)]
    projections: dict[str | None, dict[str, Any] | None] = {
        "linear": None,
        "mlp": {"_target_": "torch.nn.Sequential", "_args_": layers},
    }
    if width == embed_dim:
        projections[None] = {"_target_": "torch.nn.Identity"}
    if kind not in projections:
        raise refused(f"text_cfg.hf_proj_type={kind!r}", f"known are {', '.join(map(str, projections))}")
    return Tower(encoder, projections[kind], list(names.HUGGINGFACE_TEXT), width)


def decoder(given: Mapping[str, Any], text: Mapping[str, Any], image: Tower, quick_gelu: bool) -> Decoder:
    """Return CoCa's decoder for a `multimodal_cfg`; raises `InputError` for a feature we lack, naming it."""
    section = fields(given, DECODER_DEFAULTS, "multimodal_cfg")
    written = fields(text, DEFAULTS, "text_cfg")
    if written["hf_model_name"]:
        raise refused(
            "multimodal_cfg with text_cfg.hf_model_name",
            "captions need a causal text encoder; a Hugging Face text encoder sees the words it should predict",
        )
    width = int(section["width"])
    if width != written["width"] or width != image.token_width:
        raise refused(
            f"multimodal_cfg.width={width}",
            f"the decoder reads text of {written['width']} and image tokens of {image.token_width}; all must be equal",
        )
    fusion = {
        "_target_": "mmpretrain.CrossAttentionFusion",
        "width": width,
        "depth": section["layers"],
        "num_heads": section["heads"],
        "activation": "quick_gelu" if quick_gelu else "gelu",
    }
    heads = {"caption": {"_target_": "mmpretrain.CaptionHead", "vocab_size": written["vocab_size"], "width": width}}
    return Decoder(fusion, heads, list(names.DECODER))
