"""transformers' preprocessor_config.json and our preprocessing, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmpretrain.data.naflex import NaFlexPreprocess
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.encoders.image import CLIP_MEAN, CLIP_STD
from mmpretrain.errors import InputError
from mmpretrain.interop.huggingface_config import Config, read_json

FILE, PROCESSOR = "preprocessor_config.json", "processor_config.json"
RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the two ways to resize."""

_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
DEFAULTS: dict[str, Config] = {
    "clip": {
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "resample": 3,
    },
    "siglip": {**_HALF, "size": {"height": 224, "width": 224}, "do_center_crop": False, "resample": 3},
    "siglip2": {**_HALF, "patch_size": 16, "max_num_patches": 256, "resample": 2},
}
"""What the image processor of a `model_type` does where its file says nothing."""


class Pictures(NamedTuple):
    """How a model takes pictures: the config of our preprocessing, and what the encoder normalises by."""

    preprocess: Config
    mean: list[float]
    std: list[float]


def read_preprocess(folder: Path, model_type: str, image_size: int | None) -> Pictures:
    """Read preprocessor_config.json (or its part of processor_config.json).

    `image_size` is the model's, or None where it takes any. Raises `InputError` for a step that our preprocessing does
    not have, and for pictures of another size.
    """
    given = _file(folder)
    settings = {**DEFAULTS[model_type], **given}
    source = f"{folder / FILE}"
    off = [name for name in ("do_resize", "do_rescale", "do_normalize") if not settings.get(name, True)]
    if off or abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise InputError(f"{source}: {', '.join(off) or 'another rescale_factor than 1/255'} is not supported here")
    if settings["resample"] not in RESAMPLE:
        raise InputError(f"{source}: resample is {settings['resample']!r}; supported are 2 (bilinear) and 3 (bicubic)")
    interpolation = RESAMPLE[settings["resample"]]
    mean, std = list(settings["image_mean"]), list(settings["image_std"])
    if image_size is None:
        found = {
            "_target_": "mmpretrain.data.naflex.NaFlexPreprocess",
            "patch_size": settings["patch_size"],
            "max_patches": settings["max_num_patches"],
            "interpolation": interpolation,
            "read": "rgb",
        }
        return Pictures(found, mean, std)
    size, resize = _resize(settings, source)
    if size != image_size:
        raise InputError(f"{source} makes pictures of {size}x{size}; the model takes {image_size}x{image_size}")
    found = {
        "_target_": "mmpretrain.data.preprocess.Preprocess",
        "image_size": size,
        "resize": resize,
        "interpolation": interpolation,
        "read": "rgb",
    }
    return Pictures(found, mean, std)


def their_preprocess(preprocess: Any, mean: list[float], std: list[float]) -> Config:
    """Write our preprocessing as theirs; raises `InputError` for what their image processors cannot do."""
    common = {"image_mean": mean, "image_std": std, "do_normalize": True, "do_rescale": True, "do_resize": True}
    common |= {"rescale_factor": 1 / 255, "do_convert_rgb": True}
    if isinstance(preprocess, NaFlexPreprocess):
        return {
            "image_processor_type": "Siglip2ImageProcessor",
            **common,
            "patch_size": preprocess.patch_size,
            "max_num_patches": preprocess.max_patches,
            "resample": _code(preprocess.interpolation),
        }
    if not isinstance(preprocess, Preprocess) or preprocess.resize == "pad":
        kind = "resize=pad" if isinstance(preprocess, Preprocess) else type(preprocess).__name__
        raise InputError(f"transformers' image processors of these models have nothing like {kind}; use crop or squash")
    square = {"height": preprocess.image_size, "width": preprocess.image_size}
    common["resample"] = _code(preprocess.interpolation)
    if preprocess.resize == "squash":
        return {"image_processor_type": "SiglipImageProcessor", **common, "do_center_crop": False, "size": square}
    return {
        "image_processor_type": "CLIPImageProcessor",
        **common,
        "do_center_crop": True,
        "size": {"shortest_edge": preprocess.image_size},
        "crop_size": square,
    }


def _file(folder: Path) -> Config:
    if (folder / FILE).is_file() or not (folder / PROCESSOR).is_file():
        return read_json(folder / FILE)
    found = read_json(folder / PROCESSOR).get("image_processor")
    if not isinstance(found, dict):
        raise InputError(f"{folder / PROCESSOR} has no image_processor, and there is no {FILE}; copy that too")
    return found


def _resize(settings: Mapping[str, Any], source: str) -> tuple[int, str]:
    """Return image size and kind of resizing; only those that give a square picture."""
    size, crop = settings["size"], settings.get("crop_size")
    if isinstance(size, int):  # of old files
        size = {"shortest_edge": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    if set(size) == {"shortest_edge"} and settings["do_center_crop"] and crop is not None:
        side = size["shortest_edge"]
        if crop["height"] == crop["width"] == side:
            return side, "crop"
    squashed = set(size) == {"height", "width"} and size["height"] == size["width"]
    if squashed and (not settings["do_center_crop"] or crop == size):
        return size["height"], "squash"
    crops = f", do_center_crop to {crop}" if settings["do_center_crop"] else ""
    raise InputError(f"{source}: size {size}{crops} is neither a centre crop of that side nor a squashed square")


def _code(interpolation: str) -> int:
    return next(code for code, name in RESAMPLE.items() if name == interpolation)
