"""A model folder: `config.yaml` (model, preprocess, tokenizer), `model.safetensors`, its identity card; no pickle."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mmpretrain.config import without_pretrained
from mmpretrain.errors import InputError
from mmpretrain.folders import others, put_in_place
from mmpretrain.types import Tokenizer

if TYPE_CHECKING:
    from mmpretrain.data.preprocess import Preprocess
    from mmpretrain.model import MultimodalModel

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"
PARTS = ("model", "preprocess", "tokenizer")
NAMED = re.compile(r"[a-z][a-z0-9_-]+:")
"""How a name begins that is no folder, such as `open_clip:` (one letter would be a drive)."""


class Pretrained(NamedTuple):
    """A model with what it needs to be used, in the order CLIP_benchmark expects."""

    model: MultimodalModel
    preprocess: Preprocess
    tokenizer: Tokenizer


def load(
    path: str | Path, device: str | torch.device = "cpu", allow: Sequence[str] = (), verify: bool = True
) -> Pretrained:
    """Load a model in evaluation mode: a folder written by `save`, the run folder that holds one, or a name.

    Names are `open_clip:ViT-B-32/laion2b_s34b_b79k`, `openai:ViT-B/32` and `hf-hub:org/name`: downloaded and converted
    once. `allow` names packages of your own whose classes the config may build. `verify` compares the folder with its
    identity card, once for each state of its files. Raises `InputError` where the folder is not a model's, weights and
    config do not belong together (missing and extra keys are listed), or the card says otherwise (naming the field).
    """
    from mmpretrain.identity import verify as verify_card

    folder = locate(path)
    config = read_config(folder)
    parts = _build(folder, config, allow)
    if verify and not verify_card(folder, parts, config):
        warnings.warn(
            f"{folder} has no identity card, so nothing was verified; `mmpretrain card {folder}` writes one",
            stacklevel=2,
        )
    return parts._replace(model=parts.model.to(device))


def save(
    path: str | Path,
    model: MultimodalModel,
    config: Mapping[str, Any],
    source: str = "mmpretrain.save",
    allow: Sequence[str] = (),
) -> Path:
    """Write a model folder: weights, the configs (`model`, `preprocess`, `tokenizer`) that build the parts, and a card.

    The folder appears whole or not at all; an existing model folder that holds nothing else is replaced, anything else
    refused with `InputError`. A tokenizer's `path` is copied into the folder. `source` says on the identity card what
    the model was made of or by. The folder is loaded once before it appears: `InputError` where the config builds
    another model than the one given, names classes of packages that are neither in the model nor in `allow`, or where
    the model makes NaN of a picture or text.
    """
    from omegaconf import OmegaConf
    from safetensors.torch import save_model

    target = Path(path)
    missing = [part for part in PARTS if part not in config]
    if missing:
        raise InputError(f"config lacks {', '.join(missing)}; give {{model: ..., preprocess: ..., tokenizer: ...}}")
    if target.exists():
        _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        parts = OmegaConf.create({part: config[part] for part in PARTS})
        OmegaConf.resolve(parts)
        parts = OmegaConf.create(without_pretrained(OmegaConf.to_container(parts)))
        if "path" in parts.tokenizer:
            source_file = Path(parts.tokenizer.path)
            source_file = source_file / "tokenizer.json" if source_file.is_dir() else source_file
            parts.tokenizer.path = shutil.copyfile(source_file, temporary / "tokenizer.json").name
        OmegaConf.save(parts, temporary / CONFIG)
        save_model(model, str(temporary / WEIGHTS), metadata={"format": "pt"})
        _new_card(temporary, model, source, allow)
        temporary.chmod(0o755)
        put_in_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def locate(path: str | Path) -> Path:
    """Return the model folder that a path or a name stands for (see `load`); a name's is downloaded and converted."""
    if isinstance(path, str) and NAMED.match(path) and not Path(path).exists():
        from mmpretrain.interop.remote import resolve

        path = resolve(path)
    return model_folder(Path(path))


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a model folder, in which nothing is resolved; raises `InputError` where it is no model's."""
    from omegaconf import OmegaConf

    from mmpretrain.yaml_files import check_yaml

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
    return {part: config[part] for part in PARTS}


def _build(folder: Path, config: Mapping[str, Any], allow: Sequence[str]) -> Pretrained:
    """Build the parts of a model folder on the CPU and load the weights, in evaluation mode."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    from mmpretrain.config import build_saved
    from mmpretrain.identity import changed_options

    model, preprocess, tokenizer = (build_saved(config[part], allow) for part in PARTS)
    try:
        load_model(model, folder / WEIGHTS, strict=True)
    except (RuntimeError, AttributeError, SafetensorError) as error:
        why = changed_options(folder, config)
        raise InputError(f"{folder / WEIGHTS} does not fit {folder / CONFIG}: {_one_line(error)}{why}") from error
    return Pretrained(model.eval(), preprocess, tokenizer)


def identify(folder: Path, config: Mapping[str, Any], source: str | None = None, allow: Sequence[str] = ()) -> None:
    """Write the card of what loading the model folder `folder` gives now; `source` None keeps that of the old card."""
    from mmpretrain.identity import read_card, write_card

    if source is None:
        try:
            old = read_card(folder)
        except InputError:  # a damaged one is what a new card is written for
            old = None
        source = "unknown" if old is None else old.source
    write_card(folder, _build(folder, config, allow), config, source)


def recheck(folder: Path, config: Mapping[str, Any], allow: Sequence[str] = ()) -> bool:
    """Compare a model folder with its card, whatever is remembered; False where it has none, `InputError` as `load`."""
    from mmpretrain.identity import verify

    return verify(folder, _build(folder, config, allow), config, again=True)


def _new_card(folder: Path, model: MultimodalModel, source: str, allow: Sequence[str]) -> None:
    """Write the card of what loading the new folder gives, once that is the model it was saved from."""
    from mmpretrain.identity import write_card

    config = read_config(folder)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # building draws numbers that are not asked for here
        parts = _build(folder, config, (*allow, *_packages(model)))
    write_card(folder, parts, config, source, model)


def _packages(model: torch.nn.Module) -> set[str]:
    """Name the packages that the model itself was built of, which it shows to be in use here anyway."""
    roots = {type(module).__module__.partition(".")[0] for module in model.modules()}
    return roots - {"builtins", "lightning", "mmpretrain", "timm", "torch", "torchvision"}


def model_folder(path: Path) -> Path:
    """Return the model folder that `path` is, or that lies in the run folder `path`; raises `InputError`."""
    for folder in (path, path / "model"):
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            return folder
    raise InputError(f"{path} is not a model folder (no {WEIGHTS} with {CONFIG}); give runs/<experiment>/latest/model")


def _check_replaceable(target: Path) -> None:
    """Raise `InputError` unless `target` is a model folder that holds nothing but what was written with the model."""
    from mmpretrain.hub import FILES, README, TRAINING

    if not (target / CONFIG).is_file() or not (target / WEIGHTS).is_file():
        raise InputError(f"{target} exists and is not a model folder (no {CONFIG} with {WEIGHTS}); choose another path")
    if strange := others(target, {*FILES, README, TRAINING}):
        more = f" and {len(strange) - 6} more" if len(strange) > 6 else ""
        raise InputError(
            f"{target} is not replaced: it holds {', '.join(strange[:6])}{more}, which is no part of a model; "
            "move that away or choose another path"
        )


def _one_line(error: Exception, limit: int = 600) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."
