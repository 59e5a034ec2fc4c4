"""A model folder: `config.yaml` (model, preprocess, tokenizer) and `model.safetensors`; no pickle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mmpretrain.errors import InputError
from mmpretrain.types import Tokenizer

if TYPE_CHECKING:
    from mmpretrain.data.preprocess import Preprocess
    from mmpretrain.model import MultimodalModel

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"
PARTS = ("model", "preprocess", "tokenizer")


class Pretrained(NamedTuple):
    """A model with what it needs to be used, in the order CLIP_benchmark expects."""

    model: MultimodalModel
    preprocess: Preprocess
    tokenizer: Tokenizer


def load(path: str | Path, device: str | torch.device = "cpu", allow: Sequence[str] = ()) -> Pretrained:
    """Load a model folder written by `save` (or the run folder that holds one), in evaluation mode.

    `allow` names packages of your own whose classes the config may build. Raises `InputError` where the folder is
    not a model's, or weights and config do not belong together (missing and extra keys are listed).
    """
    from omegaconf import OmegaConf
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    from mmpretrain.config import build_saved
    from mmpretrain.yaml_files import check_yaml

    folder = _model_folder(Path(path))
    check_yaml(folder / CONFIG)
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG), resolve=False)
    except Exception as error:  # YAML's, OmegaConf's and the codec's errors share no base
        raise InputError(f"{folder / CONFIG} cannot be read: {_one_line(error)}") from error
    if not isinstance(config, dict) or not all(isinstance(config.get(part, {}), dict) for part in PARTS):
        raise InputError(f"{folder / CONFIG} does not describe a model; it was not written by mmpretrain.save")
    missing = [part for part in PARTS if part not in config]
    if missing:
        raise InputError(f"{folder / CONFIG} lacks {', '.join(missing)}; it was not written by mmpretrain.save")
    if "path" in config["tokenizer"]:  # files saved beside the weights
        config["tokenizer"]["path"] = str(folder / Path(config["tokenizer"]["path"]).name)
    model, preprocess, tokenizer = (build_saved(config[part], allow) for part in PARTS)
    try:
        load_model(model, folder / WEIGHTS, strict=True)
    except (RuntimeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} does not fit {folder / CONFIG}: {_one_line(error)}") from error
    return Pretrained(model.to(device).eval(), preprocess, tokenizer)


def save(path: str | Path, model: MultimodalModel, config: Mapping[str, Any]) -> Path:
    """Write a model folder: the weights, and the configs (`model`, `preprocess`, `tokenizer`) that build the parts.

    The folder appears whole or not at all; an existing model folder is replaced, anything else refused with
    `InputError`. A tokenizer's `path` is copied into the folder.
    """
    from omegaconf import OmegaConf
    from safetensors.torch import save_model

    target = Path(path)
    missing = [part for part in PARTS if part not in config]
    if missing:
        raise InputError(f"config lacks {', '.join(missing)}; give {{model: ..., preprocess: ..., tokenizer: ...}}")
    if target.exists() and not (target / CONFIG).is_file():
        raise InputError(f"{target} exists and is not a model folder; choose another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        parts = OmegaConf.create({part: config[part] for part in PARTS})
        OmegaConf.resolve(parts)
        _forget_pretrained(parts)
        if "path" in parts.tokenizer:
            source = Path(parts.tokenizer.path)
            source = source / "tokenizer.json" if source.is_dir() else source
            parts.tokenizer.path = shutil.copyfile(source, temporary / "tokenizer.json").name
        OmegaConf.save(parts, temporary / CONFIG)
        save_model(model, str(temporary / WEIGHTS), metadata={"format": "pt"})
        temporary.chmod(0o755)
        if target.exists():  # a folder cannot be replaced in one step: the old one stays whole until the new is there
            target.rename(temporary.with_suffix(".old"))
        temporary.replace(target)
        shutil.rmtree(temporary.with_suffix(".old"), ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _model_folder(path: Path) -> Path:
    for folder in (path, path / "model"):
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            return folder
    raise InputError(f"{path} is not a model folder (no {WEIGHTS} with {CONFIG}); give runs/<experiment>/latest/model")


def _forget_pretrained(config: Any) -> None:
    """Set every `pretrained` to false: the saved weights are all there is to load."""
    from omegaconf import OmegaConf

    for key in config:
        if key == "pretrained":
            config[key] = False
        elif OmegaConf.is_dict(config[key]):
            _forget_pretrained(config[key])


def _one_line(error: Exception, limit: int = 600) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."
