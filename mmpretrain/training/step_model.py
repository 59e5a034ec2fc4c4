"""The model of a checkpoint in the middle of a run: its weights alone, without what training needs to go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from torch import Tensor

from mmpretrain.config import without_pretrained
from mmpretrain.errors import InputError
from mmpretrain.pretrained import Pretrained
from mmpretrain.training.checkpoint import rebuild
from mmpretrain.training.manifest import DamagedCheckpoint, Manifest, checked, listed, verify
from mmpretrain.training.sharded_state import load_whole

_PREFIX = "model."


class _Named(NamedTuple):
    """Stands for a tensor that is not read yet."""

    name: str


def load_step(path: Path, device: str | torch.device = "cpu", allow: Sequence[str] = ()) -> Pretrained:
    """Load the model of the checkpoint `RUN/checkpoints/step_...`, in evaluation mode, as the run itself evaluates it.

    The parts are built of the run's `config.yaml`; `allow` names packages of your own whose classes it may build.
    Where the run kept a moving average of the weights, the model has the average. Raises `DamagedCheckpoint`, and
    `InputError` where the folder is no run's or weights and config do not belong together.
    """
    from mmpretrain.config import build_saved

    model, preprocess, tokenizer = (build_saved(part, allow) for part in run_parts(path).values())
    weights = _without_adapters(step_weights(path), path)
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other = [name for name in sorted(own.keys() & weights.keys()) if own[name].shape != weights[name].shape]
    if missing or extra or other:
        raise InputError(
            f"{path} does not fit the config of its run: missing {missing[:5]}, extra {extra[:5]}, of another shape "
            f"{other[:5]}; give a checkpoint in the folder of the run that wrote it"
        )
    model.load_state_dict(weights)
    return Pretrained(model.to(device).eval(), preprocess, tokenizer)


def run_parts(path: Path) -> dict[str, dict[str, Any]]:
    """Read what builds a run's `model`, `preprocess` and `tokenizer` from the `config.yaml` of a checkpoint's run."""
    from omegaconf import OmegaConf

    from mmpretrain.yaml_files import check_yaml

    file = run_config(path)
    try:
        check_yaml(file)
        config: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        parts = {"model": config["model"], "preprocess": config["data"]["preprocess"], "tokenizer": config["tokenizer"]}
    except OSError as error:
        raise InputError(
            f"{path}: the config of its run, {file}, cannot be read ({error.strerror}); leave checkpoints in their "
            "run folder, or give a model folder"
        ) from error
    except Exception as error:  # YAML's, OmegaConf's and the codec's errors share no base
        raise InputError(f"{file} does not describe a run: {type(error).__name__}: {error!s:.200}") from error
    return {name: without_pretrained(part) for name, part in parts.items()}


def run_config(path: Path) -> Path:
    """Return where the config of a checkpoint's run lies."""
    return path.resolve().parents[1] / "config.yaml"


def run_adapters(path: Path) -> dict[str, Any] | None:
    """Read `finetune.lora` of a checkpoint's run: what rank and alpha its adapters have; None where it trains none.

    Raises `InputError` where the config cannot be read.
    """
    from omegaconf import OmegaConf

    from mmpretrain.yaml_files import check_yaml

    file = run_config(path)
    try:
        check_yaml(file)
        config = OmegaConf.load(file)
        options: Any = OmegaConf.select(config, "finetune.lora")
        found: Any = None if options is None else OmegaConf.to_container(options, resolve=True)
    except Exception as error:  # YAML's, OmegaConf's and the codec's errors share no base
        raise InputError(f"{file} does not describe a run: {type(error).__name__}: {error!s:.200}") from error
    return None if found is None else dict(found)


def step_weights(path: Path) -> dict[str, Tensor]:
    """Read the model's weights from a checkpoint of any layout, on the CPU; only files that hold them are opened.

    Every file that is read is checked against the manifest first; raises `DamagedCheckpoint`.
    """
    manifest = listed(path)
    if manifest.layout == "sharded":  # torch reads these itself
        verify(path)
    state = rebuild(path, manifest, lambda reference: _Named(str(reference["tensor"])))
    found = state.get("state_dict")
    if not isinstance(found, dict):
        raise DamagedCheckpoint(f"{path} holds no weights of a model")
    names = {
        key.removeprefix(_PREFIX): value.name
        for key, value in found.items()
        if key.startswith(_PREFIX) and isinstance(value, _Named)
    }
    average = ((state.get("callbacks") or {}).get("EMA") or {}).get("average") or {}
    names |= {key: value.name for key, value in average.items() if isinstance(value, _Named) and key in names}
    wanted = set(names.values())
    tensors = load_whole(path, wanted) if manifest.layout == "sharded" else _tensors(path, manifest, wanted)
    return {key: tensors[name] for key, name in names.items()}


def _tensors(path: Path, manifest: Manifest, wanted: set[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (size, digest) in manifest.files.items():
        if not name.endswith(".safetensors"):
            continue
        try:
            with safe_open(path / name, "pt") as file:
                here = wanted.intersection(file.keys())
            if here:
                whole = load_tensors(checked(path / name, size, digest))
                tensors |= {key: whole[key] for key in here}
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, DamagedCheckpoint):
                raise
            raise DamagedCheckpoint(f"{path / name} is no safetensors file ({error!s:.200})") from error
    if lost := sorted(wanted - tensors.keys()):
        raise DamagedCheckpoint(f"{path} lacks {len(lost)} tensors that its state names: {', '.join(lost[:3])}")
    return tensors


def _without_adapters(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Merge low-rank adapters, where the run trains some, into the weights that they lie beside."""
    if not any(".lora_A." in name for name in weights):
        return weights
    from mmpretrain.training.lora import Lora

    options = run_adapters(path)
    if options is None:
        raise InputError(
            f"{path} holds low-rank adapters, of which {run_config(path)} says nothing; leave checkpoints in their run"
        )
    return Lora(rank=int(options["rank"]), alpha=float(options["alpha"])).merged(weights)
