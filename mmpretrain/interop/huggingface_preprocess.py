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
from mmpretrain.interop.huggingface_fields import colours, is_count, is_number

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


CLASSES = {"CLIPImageProcessor": "clip", "SiglipImageProcessor": "siglip", "Siglip2ImageProcessor": "siglip2"}
"""Image processors that are known, without the endings of their variants, and whose defaults they have."""
NAMES = ("image_processor_type", "feature_extractor_type")
"""Where a file says its class; the first wins."""
FLAGS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")
KNOWN = (
    *("image_mean", "image_std", "size", "crop_size", "resample", "rescale_factor", "patch_size", "max_num_patches"),
    *(*FLAGS, *NAMES, "processor_class", "default_to_square"),
    # what is said of the call, not of the pixels
    *("_valid_processor_keys", "data_format", "input_data_format", "return_tensors", "device", "disable_grouping"),
)
"""Settings that are read, or change no pixel."""


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
    source = f"{folder / FILE}"
    kind = _kind(given, model_type, source)
    settings = {**DEFAULTS[kind], **given}
    _check(settings, kind, source)
    off = [name for name in ("do_resize", "do_rescale", "do_normalize") if not settings.get(name, True)]
    if off or abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise InputError(f"{source}: {', '.join(off) or 'another rescale_factor than 1/255'} is not supported here")
    if settings["resample"] not in RESAMPLE:
        raise InputError(f"{source}: resample is {settings['resample']!r}; supported are 2 (bilinear) and 3 (bicubic)")
    interpolation = RESAMPLE[settings["resample"]]
    mean, std = (colours(settings[name], name, source) for name in ("image_mean", "image_std"))
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


def _kind(given: Mapping[str, Any], model_type: str, source: str) -> str:
    """Return the key of `DEFAULTS` for the class that a file names, else for the model."""
    named = next((given[name] for name in NAMES if given.get(name)), None)
    if named is None:
        return model_type
    base = str(named).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    kind = CLASSES.get(base)
    if kind is None or (kind == "siglip2") != (model_type == "siglip2"):
        fits = [name for name, key in CLASSES.items() if (key == "siglip2") == (model_type == "siglip2")]
        raise InputError(f"{source}: the image processor is {named!r}; for {model_type} expected {' or '.join(fits)}")
    return kind


def _check(settings: Config, kind: str, source: str) -> None:
    """Raise `InputError` for a step that is not known, and for values of another kind than theirs."""
    if unknown := [f"{name}={value!r}" for name, value in settings.items() if name not in KNOWN and value]:
        raise InputError(f"{source} has {', '.join(unknown)[:200]}, which our preprocessing does not have")
    if wrong := [name for name in FLAGS if not isinstance(settings.get(name), bool | None)]:
        raise InputError(f"{source}: {', '.join(wrong)} must be true or false")
    numbers = [*(["rescale_factor"] if "rescale_factor" in settings else []), "resample"]
    numbers += ["patch_size", "max_num_patches"] if kind == "siglip2" else []
    if wrong := [name for name in numbers if not is_number(settings[name])]:
        raise InputError(f"{source}: {wrong[0]} is {settings[wrong[0]]!r}; expected a number")


def _resize(settings: Mapping[str, Any], source: str) -> tuple[int, str]:
    """Return image size and kind of resizing; only those that give a square picture."""
    size, crop = settings["size"], settings.get("crop_size")
    if is_count(size):  # of old files
        squared = settings.get("default_to_square", not settings["do_center_crop"])
        size = {"height": size, "width": size} if squared else {"shortest_edge": size}
    if is_count(crop):
        crop = {"height": crop, "width": crop}
    if not isinstance(size, Mapping) or not (crop is None or isinstance(crop, Mapping)):
        raise InputError(f"{source}: size is {size!r} and crop_size {crop!r}; expected numbers, or sides by name")
    if set(size) == {"shortest_edge"} and settings["do_center_crop"] and crop is not None:
        side = size["shortest_edge"]
        if crop.get("height") == crop.get("width") == side:
            return side, "crop"
    squashed = set(size) == {"height", "width"} and size["height"] == size["width"]
    if squashed and (not settings["do_center_crop"] or crop == size):
        return size["height"], "squash"
    crops = f", do_center_crop to {crop}" if settings["do_center_crop"] else ""
    raise InputError(f"{source}: size {size}{crops} is neither a centre crop of that side nor a squashed square")


def _code(interpolation: str) -> int:
    return next(code for code, name in RESAMPLE.items() if name == interpolation)
