"""The image encoder that open_clip's `vision_cfg` describes, as our config, with the table of its names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from mmpretrain.errors import InputError
from mmpretrain.interop import open_clip_names as names
from mmpretrain.interop.huggingface_fields import check_kinds
from mmpretrain.interop.modified_resnet import resnet_encoder, resnet_projection
from mmpretrain.interop.names import Entry

HEAD_WIDTH = 64
"""Width of one attention head where a config does not say."""

DEFAULTS: dict[str, Any] = {
    "layers": 12,
    "width": 768,
    "head_width": HEAD_WIDTH,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "ls_init_value": None,
    "patch_dropout": 0.0,
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "timm_model_name": None,
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_proj_bias": False,
    "timm_drop": 0.0,
    "timm_drop_path": None,
}
"""Fields of `vision_cfg` that are read, and what open_clip takes where one is left out."""

FREE = ("layers", "image_size", "patch_size")
"""Numbers that may be lists (a ResNet's layers) or nothing, of which those who read them say what is wrong."""
OPTIONAL: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("act_kwargs", "norm_kwargs", "tokenizer_kwargs", "multimodal_cfg"), (Mapping,)),
    **dict.fromkeys(("timm_model_name", "hf_model_name", "hf_tokenizer_name"), (str,)),
    **dict.fromkeys(("timm_drop_path", "ls_init_value", "init_logit_scale", "init_logit_bias"), (int, float)),
}
"""Of what kind those are whose default is nothing."""

NORMS = {1e-5: None, 1e-6: "layernorm"}
"""Epsilon of a ViT's norms -> timm's name of such a norm; None is what the architecture has by itself."""


class Tower(NamedTuple):
    """One encoder in our terms: its config, that of its projection (None: our default), and the table of its names.

    `token_width`: D of the tokens it gives to a decoder.
    """

    encoder: dict[str, Any]
    projection: dict[str, Any] | None
    table: list[Entry]
    token_width: int


def fields(given: Mapping[str, Any], defaults: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Fill in what is left out; raises `InputError` that names every field that asks for a feature we lack.

    Raises it too for a field that is not of its kind: a number, a name, names with values.
    """
    missing = [f"{section}.{key}={value!r}" for key, value in given.items() if key not in defaults and value]
    if missing:
        raise InputError(f"no encoder here has {', '.join(missing)}; the model cannot be converted")
    found = {**defaults, **{key: value for key, value in given.items() if key in defaults}}
    numbers = {key: x for key, x in defaults.items() if type(x) in (int, float) and key not in FREE}
    check_kinds(found, numbers, section)
    for key in OPTIONAL.keys() & defaults.keys():
        if found[key] is not None and not isinstance(found[key], OPTIONAL[key]):
            expected = " or ".join(kind.__name__ for kind in OPTIONAL[key])
            raise InputError(f"{section}.{key} is {found[key]!r:.80}; expected {expected}, or null")
    return found


def refused(feature: str, why: str) -> InputError:
    """Return the error for a field whose value asks for what we lack."""
    return InputError(f"{feature}: {why}; the model cannot be converted")


def activation(quick_gelu: bool, act_kwargs: Mapping[str, Any] | None, section: str) -> str:
    """Return our name of the activation of open_clip's own blocks."""
    options = {"approximate": "none", **(act_kwargs or {})}
    if set(options) > {"approximate"} or options["approximate"] not in ("none", "tanh"):
        raise refused(f"{section}.act_kwargs={act_kwargs!r}", "only approximate=tanh is known")
    if quick_gelu:
        if act_kwargs:
            raise refused(f"{section}.act_kwargs={act_kwargs!r}", "QuickGELU has no options")
        return "quick_gelu"
    return "gelu_tanh" if options["approximate"] == "tanh" else "gelu"


def norm_eps(norm_kwargs: Mapping[str, Any] | None, section: str) -> float:
    """Return the epsilon of the norms of open_clip's own blocks."""
    if set(norm_kwargs or {}) - {"eps"}:
        raise refused(f"{section}.norm_kwargs={norm_kwargs!r}", "only eps is known")
    return float((norm_kwargs or {}).get("eps", 1e-5))


def image_tower(given: Mapping[str, Any], embed_dim: int, quick_gelu: bool) -> Tower:
    """Return the image encoder of a `vision_cfg`; raises `InputError` for a feature we lack, naming it."""
    vision = fields(given, DEFAULTS, "vision_cfg")
    if vision["timm_model_name"]:
        return _timm(vision, embed_dim)
    if isinstance(vision["layers"], (list, tuple)):
        if vision["head_width"] != HEAD_WIDTH:
            raise refused(f"vision_cfg.head_width={vision['head_width']}", "a ResNet's attention pool has heads of 64")
        width = int(vision["width"])
        encoder = resnet_encoder(vision["layers"], width, vision["image_size"])
        return Tower(encoder, resnet_projection(width, embed_dim), list(names.RESNET), 32 * width)
    return _vit(vision, embed_dim, activation(quick_gelu, vision["act_kwargs"], "vision_cfg"))


def _vit(vision: Mapping[str, Any], embed_dim: int, act: str) -> Tower:
    width = int(vision["width"])
    eps = norm_eps(vision["norm_kwargs"], "vision_cfg")
    if eps not in NORMS:
        raise refused(f"vision_cfg.norm_kwargs eps={eps}", f"a ViT has one of {', '.join(map(str, NORMS))}")
    size: dict[str, Any] = {
        "img_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embed_dim": width,
        "depth": vision["layers"],
        "num_heads": width // vision["head_width"],
        "mlp_ratio": vision["mlp_ratio"],
        "act_layer": act,
    }
    size |= {"norm_layer": NORMS[eps]} if NORMS[eps] else {}
    size |= {"pre_norm": False} if vision["no_ln_pre"] else {}
    size |= {"init_values": vision["ls_init_value"]} if vision["ls_init_value"] is not None else {}
    size |= {"patch_drop_rate": vision["patch_dropout"]} if vision["patch_dropout"] else {}
    table = [*names.VIT, *(names.PATCHES_WITHOUT_BIAS if vision["no_ln_pre"] else names.PATCHES)]
    pooled, pool, pool_table, token_width = _pooling(vision, embed_dim, width)
    # The name is that of timm's class with CLIP's norms; every size is given.
    encoder = {"_target_": "mmpretrain.ImageEncoder", "name": "vit_base_patch16_clip_224", "model_args": size | pooled}
    encoder |= {"pool": pool} if pool else {}
    return Tower(encoder, None, [*table, *pool_table], token_width)


def _pooling(
    vision: Mapping[str, Any], embed_dim: int, width: int
) -> tuple[dict[str, Any], dict[str, Any] | None, list[Entry], int]:
    """Return timm's arguments, our pool, its table and the width of the tokens."""
    kind, attentional, late = vision["pool_type"], vision["attentional_pool"], vision["final_ln_after_pool"]
    poolers = {"cascade": "CascadedAttentionPool", "parallel": "ParallelAttentionPool"}
    queries = {"num_heads": vision["attn_pooler_heads"], "num_queries": vision["attn_pooler_queries"]}
    pool = {"width": embed_dim, **queries, "context_width": width}
    if isinstance(attentional, str):
        if attentional not in poolers or width != embed_dim:
            raise refused(
                f"vision_cfg.attentional_pool={attentional!r}", "known are parallel and cascade, of one width"
            )
        pool = {"_target_": f"mmpretrain.{poolers[attentional]}", **pool}
        return {"global_pool": ""}, pool, list(names.CASCADED_POOL), embed_dim
    if attentional:
        if kind != "tok":
            raise refused(f"vision_cfg.pool_type={kind!r}", "behind an attention pool only the first query is known")
        pool = {"_target_": "mmpretrain.SharedAttentionPool", **pool}
        return {"global_pool": "", "final_norm": False}, pool, names.shared_pool(width == embed_dim), embed_dim
    if kind == "tok" and vision["output_tokens"]:
        if late:
            raise refused("vision_cfg.final_ln_after_pool", "tokens for a decoder come behind the final norm")
        return {"global_pool": ""}, {"_target_": "mmpretrain.ClassTokenPool", "width": width}, names.vit_norm(), width
    if kind == "tok":  # the norm of one token is the same before and after it is taken
        return {}, None, names.vit_norm(), width
    if kind == "avg" and not vision["output_tokens"]:
        norm = names.vit_norm(f"{names.BACKBONE}.fc_norm") if late else names.vit_norm()
        return {"global_pool": "avg", "fc_norm": bool(late)}, None, norm, width
    raise refused(f"vision_cfg.pool_type={kind!r}", "known are tok and avg, and avg without tokens for a decoder")


def _timm(vision: Mapping[str, Any], embed_dim: int) -> Tower:
    name, pool, kind = vision["timm_model_name"], vision["timm_pool"], vision["timm_proj"]
    if pool in ("abs_attn", "rot_attn"):
        raise refused(f"vision_cfg.timm_pool={pool!r}", "no such attention pool here")
    if vision["timm_drop"]:
        raise refused(f"vision_cfg.timm_drop={vision['timm_drop']}", "no dropout before a projection here")
    if vision["output_tokens"]:
        raise refused("vision_cfg.output_tokens", "open_clip's timm models give no tokens")
    if kind not in ("linear", "mlp", "none", "", None):
        raise refused(f"vision_cfg.timm_proj={kind!r}", "known are linear, mlp and none")
    args: dict[str, Any] = {}
    if vision["timm_drop_path"] is not None:
        args["drop_path_rate"] = vision["timm_drop_path"]
    if vision["patch_dropout"]:
        args["patch_drop_rate"] = vision["patch_dropout"]
    bias = bool(vision["timm_proj_bias"])
    if kind in ("linear", "mlp"):
        trunk = _on_meta(name, args)
        if pool:
            _check_pool(name, args, pool, trunk)
            args["global_pool"] = pool
        width = int(trunk.num_features)
        projection, table = _head(kind, width, embed_dim, bias)
    else:
        if not pool:
            raise refused(f"vision_cfg.timm_pool={pool!r}", "without pooling and projection there is no vector")
        args["global_pool"] = pool
        trunk = _on_meta(name, {**args, "num_classes": 0 if kind == "none" else embed_dim})
        width = int(trunk.head_hidden_size)
        projection, table = _classifier(trunk, width, embed_dim)
    encoder = {"_target_": "mmpretrain.ImageEncoder", "name": name, "model_args": args}
    return Tower(encoder, projection, table, width)


def _head(kind: str, width: int, embed_dim: int, bias: bool) -> tuple[dict[str, Any], list[Entry]]:
    """Return the projection that open_clip adds behind a timm backbone."""
    if kind == "linear":
        return linear(width, embed_dim, bias), list(names.TIMM_LINEAR)
    layers = [
        linear(width, 2 * embed_dim, True),
        {"_target_": "torch.nn.GELU"},
        linear(2 * embed_dim, embed_dim, bias),
    ]
    return {"_target_": "torch.nn.Sequential", "_args_": layers}, list(names.TIMM_MLP)


def _classifier(trunk: nn.Module, width: int, embed_dim: int) -> tuple[dict[str, Any], list[Entry]]:
    """Return the projection for a timm model's own classifier, if it has one."""
    classifier = trunk.get_classifier()  # type: ignore[operator]
    if isinstance(classifier, nn.Identity):
        if width != embed_dim:
            raise refused(f"embed_dim={embed_dim}", f"the image encoder gives {width} and has no projection")
        return {"_target_": "torch.nn.Identity"}, names.timm_classifier(None)
    if not isinstance(classifier, nn.Linear):
        raise refused(f"a classifier of {type(classifier).__name__}", "only a linear one can be the projection")
    where = next(name for name, module in trunk.named_modules() if module is classifier)
    return linear(width, embed_dim, classifier.bias is not None), names.timm_classifier(where)


def linear(width: int, embed_dim: int, bias: bool) -> dict[str, Any]:
    """Return the config of a linear layer."""
    return {"_target_": "torch.nn.Linear", "in_features": width, "out_features": embed_dim, "bias": bias}


def _on_meta(name: str, args: Mapping[str, Any]) -> Any:
    import timm

    if not timm.is_model(name):
        raise refused(f"vision_cfg.timm_model_name={name!r}", f"timm {timm.__version__} has no such model")
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **args)
    except Exception as error:  # each architecture checks its options in its own way
        raise _unbuilt(name, args, error) from error


def _unbuilt(name: str, args: Mapping[str, Any], error: Exception) -> InputError:
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return refused(f"vision_cfg.timm_model_name={name!r}", f"timm does not build it with {dict(args)} ({said})")


def _check_pool(name: str, args: Mapping[str, Any], pool: str, trunk: Any) -> None:
    """open_clip sets the pooling after the backbone is built, which is not always the same as building it so."""
    try:
        trunk.reset_classifier(0, global_pool=pool)
    except Exception as error:
        raise _unbuilt(name, {"global_pool": pool}, error) from error
    built = _on_meta(name, {**args, "global_pool": pool, "num_classes": 0})
    if trunk.state_dict().keys() != built.state_dict().keys():
        raise refused(f"vision_cfg.timm_pool={pool!r}", f"{name} has it only without a projection of open_clip's")
