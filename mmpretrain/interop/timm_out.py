"""Out: the image encoder alone as a folder that timm loads (`timm.create_model("local-dir:OUT")`), checked with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from mmpretrain.data.naflex import NaFlexPreprocess
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.encoders import ImageEncoder
from mmpretrain.encoders.naflex import NaFlexImageEncoder
from mmpretrain.errors import InputError
from mmpretrain.interop.out_folder import new_folder
from mmpretrain.interop.parity import Parity, check
from mmpretrain.interop.samples import normalized, samples
from mmpretrain.interop.towers import normalization, stated_image
from mmpretrain.pretrained import load

CROP_MODES = {"crop": "center", "squash": "squash", "pad": "border"}
"""timm's names of the ways to a square picture."""
CARRIED = ("fixed_input_size", "first_conv", "classifier", "pool_size")
"""What timm says of the architecture and not of the weights."""


def export(folder: str | Path, out: str | Path, tolerance: float = 1e-5, allow: Sequence[str] = ()) -> Parity:
    """Write the image encoder of a model folder, without its projection, and `parity.json`.

    timm loads the result and is compared with the encoder: pooled vectors and tokens. Raises `InputError` for a pooler
    that is not timm's, for arguments that its config cannot hold, and beyond `tolerance`.
    """
    pretrained = load(folder, allow=allow)
    encoder = _encoder(pretrained.model)
    stated = _stated(folder)
    mean, std = normalization(encoder, stated)
    config = _config(encoder, stated, pretrained.preprocess, mean, std)
    with new_folder(out, "timm") as temporary:
        _write(temporary, config, encoder)
        given = samples(pretrained.preprocess)
        outputs = _compare(temporary, encoder, normalized(given.pictures, mean, std))
        found = check(outputs, tolerance, {**given.described(), "texts": []}, "timm")
        found.write(temporary)
    return found


def _encoder(model: Any) -> Any:
    encoder = model.encoders["image"] if "image" in model.encoders else None  # noqa: SIM401 (a ModuleDict has no get)
    if not isinstance(encoder, (ImageEncoder, NaFlexImageEncoder)):
        raise InputError(f"timm: the model has no image encoder of timm ({', '.join(model.encoders)})")
    pool = getattr(encoder, "pool", None)
    if pool is not None:
        raise InputError(f"timm has no {type(pool).__name__}, which pools this image encoder's tokens (CoCa)")
    return encoder


def _stated(folder: str | Path) -> dict[str, Any]:
    """Read name and arguments of the backbone from the model's config."""
    image = stated_image(folder)
    arguments = image.get("model_args") or {}
    if built := sorted(key for key, value in arguments.items() if _has_target(value)):
        raise InputError(f"timm: model_args of the image encoder build objects ({', '.join(built)}), which JSON cannot")
    return image


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))


def _config(
    encoder: Any, stated: Mapping[str, Any], preprocess: Any, mean: list[float], std: list[float]
) -> dict[str, Any]:
    backbone = encoder.backbone
    known = dict(backbone.pretrained_cfg)
    size = preprocess.image_size if isinstance(preprocess, Preprocess) else known["input_size"][-1]
    interpolation = preprocess.interpolation if isinstance(preprocess, (Preprocess, NaFlexPreprocess)) else "bicubic"
    name = stated.get("name", backbone.pretrained_cfg["architecture"])
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": int(backbone.num_features),
        "model_args": {**(stated.get("model_args") or {}), "num_classes": 0},
        "pretrained_cfg": {
            **{key: known[key] for key in CARRIED if known.get(key) is not None},
            "num_classes": 0,
            "input_size": [3, size, size],
            "mean": mean,
            "std": std,
            "interpolation": interpolation,
            "crop_pct": 1.0,
            "crop_mode": CROP_MODES[getattr(preprocess, "resize", "crop")],
            "custom_load": False,
        },
    }


def _write(out: Path, config: Mapping[str, Any], encoder: Any) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor.detach().float().clone() for name, tensor in encoder.backbone.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _compare(out: Path, encoder: Any, pictures: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    found = {}
    for batch in [torch.stack(pictures)] if isinstance(encoder, ImageEncoder) else [x[None] for x in pictures]:
        shape = "x".join(str(side) for side in batch.shape[-2:])
        with torch.no_grad():
            ours, features = encoder(batch), theirs.forward_features(batch)
            tokens = encoder._flatten(features) if isinstance(encoder, ImageEncoder) else features
            found[f"tokens {shape}"] = (tokens, ours.tokens)
            found[f"pooled {shape}"] = (theirs(batch), ours.pooled)
    return found
