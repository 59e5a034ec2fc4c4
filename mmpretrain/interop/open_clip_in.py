"""Weights of open_clip in: by the name of a packaged config, from a folder, or from a config and tensors."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpretrain.encoders.image import CLIP_MEAN, CLIP_STD
from mmpretrain.errors import InputError
from mmpretrain.interop.converted import Converted, as_float32, expected
from mmpretrain.interop.fetch import hub_folder
from mmpretrain.interop.files import read_tensors
from mmpretrain.interop.huggingface_config import read_json
from mmpretrain.interop.huggingface_fields import colours, section
from mmpretrain.interop.names import check_keys, to_ours
from mmpretrain.interop.open_clip_config import Described, describe
from mmpretrain.interop.open_clip_image import fields, refused
from mmpretrain.interop.open_clip_text import DEFAULTS as TEXT
from mmpretrain.interop.openai import SIZES
from mmpretrain.interop.tokenizer_in import FILE, SETTINGS, huggingface_tokenizer, special_tokens

CONFIG = "open_clip_config.json"
"""What a folder saved by open_clip holds: `model_cfg` and `preprocess_cfg`."""
RESIZE = {"shortest": "crop", "longest": "pad", "squash": "squash"}
INTERPOLATION = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
"""open_clip's interpolations -> ours; `random` is bicubic where nothing is trained."""
PREPROCESS: dict[str, Any] = {
    "mode": "RGB",
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
"""open_clip's preprocessing where nothing is said; its size is the model's."""
SETTING_KEYS = ("mean", "std", "interpolation", "resize_mode")
LEFT_OUT = ("text.transformer.embeddings.position_ids",)
"""Tensors of older checkpoints that are no weights."""


def from_name(name: str, weights: str | Path | None = None, tokenizer: Path | None = None) -> Converted:
    """Read a model of open_clip by `NAME`, `NAME/TAG` (a packaged config), or a folder with `open_clip_config.json`.

    `weights` is a file, or a folder with one; only a folder of open_clip's has its own. A tag says how its weights
    take pictures; without one, that is what all released weights of this config agree on. `tokenizer` as in
    `from_config`. Raises `InputError` for an unknown name and for what is missing.
    """
    folder = Path(name)
    if folder.is_dir():
        content = read_json(folder / CONFIG)
        if not isinstance(content.get("model_cfg"), dict):
            raise InputError(f"{folder / CONFIG} has no model_cfg; expected a folder saved by open_clip")
        config, given = content["model_cfg"], section(content, "preprocess_cfg", str(folder / CONFIG))
        if tokenizer is None and _names_tokenizer(config) and (folder / FILE).is_file():
            tokenizer = folder
        return from_config(config, read_tensors(weights or folder), given, tokenizer, folder.name)
    config, settings = packaged(name)
    if weights is None:
        raise InputError(f"open_clip's {name} has no weights of its own here; give a file with --weights")
    return from_config(config, read_tensors(weights), settings, tokenizer, name)


def from_config(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    preprocess: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
    name: str = "model",
) -> Converted:
    """Convert open_clip's `config` (its JSON) and `weights` (its names).

    `preprocess`: mean, std, interpolation, resize_mode, fill_color. `tokenizer`: for a config that names one of the
    hub, a folder with its `tokenizer.json`, and for a Hugging Face text encoder also its `config.json`; None asks the
    hub. Raises `InputError` for a tokenizer where none is named, for a feature that is missing here and for tensors
    that do not fit, naming them.
    """
    text = fields(section(config, "text_cfg", name), TEXT, "text_cfg")
    if tokenizer is not None and not _names_tokenizer(config):
        raise InputError(f"{name} has CLIP's own tokenizer, which comes with this package; leave --tokenizer out")
    source = name if ":" in name else f"open_clip:{name}"
    if not weights.keys().isdisjoint(SIZES):
        raise InputError(f"{source}: the weights are of OpenAI ({', '.join(SIZES)}); give openai: --weights FILE")
    folder, huggingface = _text_files(text, tokenizer)
    eos_id = special_tokens(folder).end_id if folder else None
    custom = any(key.startswith("text.") for key in weights)
    described = describe(config, huggingface, eos_id, prefix="text." if custom else "")
    tensors = {key: x for key, x in weights.items() if key not in LEFT_OUT}
    if "logit_bias" in described.model and "logit_bias" not in tensors:
        tensors["logit_bias"] = torch.zeros(1)  # as open_clip does for weights that were trained without
    ours = as_float32(to_ours(tensors, described.table, source))
    check_keys(ours, expected(described.model), source)
    settings = _settings(preprocess)
    described.model["encoders"]["image"] |= {key: settings[key] for key in ("mean", "std")}
    parts = {
        "model": described.model,
        "preprocess": _preprocess(described, settings),
        "tokenizer": _tokenizer(described, folder),
    }
    return Converted(parts, ours, source)


def packaged(name: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return a packaged config by `NAME` or `NAME/TAG`, and how its weights take pictures (None: nothing is said).

    Raises `InputError` for an unknown name or tag, and where the tags of a name differ and none is given.
    """
    files = config_files()
    base, tag = name.replace("/", "-"), ""
    if base not in files and "/" in name:
        base, _, tag = name.rpartition("/")
        base = base.replace("/", "-")
    if base not in files:
        raise InputError(f"open_clip packages no config {name!r} and it is no folder; see open_clip.list_models()")
    config = read_json(files[base])
    tags = _tags(base)
    if tag:
        if tag not in tags:
            raise InputError(f"open_clip has no weights {tag!r} of {base}; it has {', '.join(tags) or 'none'}")
        if tags[tag].get("quick_gelu"):  # what the weights were trained with; open_clip itself only warns
            config["quick_gelu"] = True
        return config, tags[tag]
    kinds = {json.dumps({key: found.get(key) for key in SETTING_KEYS}) for found in tags.values()}
    if len(kinds) > 1:
        raise InputError(
            f"released weights of {base} take pictures in different ways; say which they are: "
            f"open_clip:{base}/TAG with TAG one of {', '.join(tags)}"
        )
    return config, next(iter(tags.values()), None)


def config_files() -> dict[str, Path]:
    """Return the configs that the installed open_clip packages, by name; it is not imported."""
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        raise InputError("configs by name come with open_clip: pip install open_clip_torch, or give a folder")
    return {file.stem: file for file in sorted((Path(found.origin).parent / "model_configs").glob("*.json"))}


def _tags(name: str) -> dict[str, dict[str, Any]]:
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    return {tag: get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)}


def _names_tokenizer(config: Mapping[str, Any]) -> bool:
    text = section(config, "text_cfg", CONFIG)
    return bool(text.get("hf_tokenizer_name") or text.get("hf_model_name"))


def _text_files(text: Mapping[str, Any], given: Path | None) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the folder of the tokenizer (None: CLIP's own) and the config of a Hugging Face text encoder."""
    model = text.get("hf_model_name")
    repository = text.get("hf_tokenizer_name") or model
    if not repository:
        return None, None
    folder = given or _hub_folder(repository, FILE, SETTINGS)
    if not model:
        return folder, None
    directory = folder if folder.is_dir() else folder.parent
    if not (directory / "config.json").is_file():
        directory = _hub_folder(model, "config.json", ())
    return folder, read_json(directory / "config.json")


def _hub_folder(repository: str, file: str, beside: tuple[str, ...]) -> Path:
    """Return the folder of a file of a hub repository (or of a local folder of that name), fetched where it is not."""
    if (Path(repository) / file).is_file():
        return Path(repository)
    try:
        folder = hub_folder(repository, None, (file, *beside))
    except InputError as error:
        raise InputError(f"{error}; give a folder that has {file}: --tokenizer FOLDER") from error
    if not (folder / file).is_file():
        raise InputError(f"hf-hub:{repository} has no {file}; give a folder that has it: --tokenizer FOLDER")
    return folder


def _settings(given: Mapping[str, Any] | None) -> dict[str, Any]:
    settings = {**PREPROCESS, **{key: x for key, x in (given or {}).items() if key in PREPROCESS and x is not None}}
    for key, known in (("resize_mode", RESIZE), ("interpolation", INTERPOLATION), ("mode", ("RGB",))):
        if settings[key] not in known:
            raise refused(f"preprocess_cfg.{key}={settings[key]!r}", f"known are {', '.join(known)}")
    return settings | {key: colours(settings[key], key, "preprocess_cfg") for key in ("mean", "std")}


def _preprocess(described: Described, settings: Mapping[str, Any]) -> dict[str, Any]:
    size = described.image_size
    if isinstance(size, (list, tuple)):
        if len(set(size)) != 1:
            raise refused(f"vision_cfg.image_size={size}", "pictures are square here")
        size = size[0]
    config = {
        "_target_": "mmpretrain.data.preprocess.Preprocess",
        "image_size": int(size),
        "resize": RESIZE[settings["resize_mode"]],
        "interpolation": INTERPOLATION[settings["interpolation"]],
        "read": "stored",  # as open_clip reads files
    }
    return {**config, "fill": settings["fill_color"]} if settings["fill_color"] else config


def _tokenizer(described: Described, folder: Path | None) -> dict[str, Any]:
    text = described.text
    length, options = int(text.get("context_length", 77)), dict(text.get("tokenizer_kwargs") or {})
    pad = "context_length" if described.reads_padding else "longest"
    clean = options.pop("clean", "lower" if folder is None else "whitespace")
    strip = bool(options.pop("strip_sep_token", False))
    if options or text.get("tokenizer_mode") or (folder is None and (clean != "lower" or strip)):
        raise refused(f"text_cfg.tokenizer_kwargs={text.get('tokenizer_kwargs')!r}", "known are clean, strip_sep_token")
    if folder is not None:
        return huggingface_tokenizer(folder, length, clean, strip, pad)
    return {"_target_": "mmpretrain.data.tokenizer.ClipTokenizer", "context_length": length, "pad": pad}
