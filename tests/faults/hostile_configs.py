"""Hostile configs and model folders: targets that are commands, behind aliases, methods and interpolations."""

from __future__ import annotations

import os
import pickle
import struct
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  what the cases import is loaded once, before the forks
import timm  # noqa: F401
import torchvision.datasets  # noqa: F401
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import OmegaConf

import mmpretrain
from mmpretrain.composition import check_given
from mmpretrain.config import instantiate
from tests.faults.hostile import Case
from tests.faults.hostile_shards import pickled

TOUCH = {"command": "touch MARKER"}
PATH = {"_target_": "pathlib.Path", "_args_": ["MARKER"]}

TOUCH_PATH = {"_target_": "pathlib.Path.touch", "_args_": [PATH]}
UNSAFE = {"weights_only": False}
TRAIN = ["train", "allow_targets=[os]", "+callbacks.extra.x._target_=os.system"]

TARGETS: dict[str, Any] = {
    "os.system": {"_target_": "os.system", **TOUCH},
    "os.system by an alias of ours": {"_target_": "mmpretrain.distributed.os.system", **TOUCH},
    "os.system by an alias of logging": {"_target_": "logging.os.system", **TOUCH},
    "os.system by an alias of Lightning": {"_target_": "lightning.pytorch.trainer.trainer.os.system", **TOUCH},
    "os.system by an alias of torch.nn": {"_target_": "torch.nn.modules.module.torch.os.system", **TOUCH},
    "subprocess.run": {"_target_": "subprocess.run", "args": ["touch", "MARKER"]},
    "exec": {"_target_": "builtins.exec", "_args_": ["import os; os.system('touch MARKER')"]},
    "open a file to write": {"_target_": "builtins.open", "_args_": ["MARKER", "w"]},
    "a method of pathlib": TOUCH_PATH,
    "deep in lists": {"_target_": "builtins.dict", "a": [{"b": [TOUCH_PATH]}]},
    "as an argument": {"_target_": "torch.nn.Sequential", "_args_": [TOUCH_PATH]},
    "shutil.copyfile": {"_target_": "shutil.copyfile", "src": "/etc/hostname", "dst": "MARKER"},
    "torch.load": {"_target_": "torch.load", "f": "PICKLE", **UNSAFE},
    "pickle.load": {"_target_": "pickle.load", "_args_": [{"_target_": "builtins.open", "_args_": ["PICKLE", "rb"]}]},
    "numpy.load": {"_target_": "numpy.load", "file": "PICKLE", "allow_pickle": True},
    "a folder as torch.hub": {"_target_": "torch.hub.load", "repo_or_dir": "FOLDER", "model": "x", "source": "local"},
    "Lightning's loader": {"_target_": "lightning.fabric.utilities.cloud_io._load", "path_or_url": "PICKLE", **UNSAFE},
    "Lightning's class method": {
        "_target_": "lightning.pytorch.LightningModule.load_from_checkpoint",
        "checkpoint_path": "PICKLE",
        **UNSAFE,
    },
    "timm's loader": {
        "_target_": "timm.models.load_checkpoint",
        "model": {"_target_": "torch.nn.Identity"},
        "checkpoint_path": "PICKLE",
        **UNSAFE,
    },
    "timm's reader": {"_target_": "timm.data.readers.reader_wds.ReaderWds", "root": "pipe:touch MARKER;", "name": "x"},
    "our own command": {"_target_": "mmpretrain.cli.main", "argv": TRAIN},
    "our own checker": {
        "_target_": "mmpretrain.config.instantiate",
        "config": {"_target_": "os.system", **TOUCH},
        "allow": ["os"],
    },
    "our own loader": {"_target_": "mmpretrain.load", "path": "FOLDER", "allow": ["os"]},
    "our program run by its import": {"_target_": "mmpretrain.__main__.main"},
    "an interpolated target": {
        "x": {"name": "pathlib.Path.touch"},
        "y": {"_target_": "${x.name}", "_args_": [PATH]},
        "_target_": "builtins.dict",
    },
    "a target from the environment": {"_target_": "${oc.env:HOSTILE}", **TOUCH},
    "a part decoded from a text": {
        "_target_": "torch.nn.Sequential",
        "_args_": ["${oc.create:${oc.decode:${oc.env:HOSTILE_PART}}}"],
    },
    "a target that is a list": {"_target_": ["os.system"], **TOUCH},
    "a partial": {"_target_": "functools.partial", "_args_": [{"_target_": "os.system", "_partial_": True}]},
    "Hydra's own": {"_target_": "hydra.utils.call", "config": TOUCH_PATH},
}

EXPERIMENTS = {
    "allows itself a package": "allow_targets: [os]",
    "a callback of Hydra's": "hydra: {callbacks: {x: {_target_: pathlib.Path.touch, _args_: [x]}}}",
    "a log handler": "hydra: {job_logging: {version: 1, handlers: {x: {'()': os.system, command: touch marker}}}}",
    "another launcher": "hydra: {launcher: {_target_: pathlib.Path.touch}}",
    "variables of the environment": "hydra: {job: {env_set: {LD_PRELOAD: marker.so}}}",
}


def filled(value: Any, folder: Path) -> Any:
    """The config with the paths of a folder, in which a pickle lies."""
    if isinstance(value, dict):
        return {key: filled(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, folder) for inner in value]
    if not isinstance(value, str):
        return value
    for word, path in {"MARKER": "marker", "PICKLE": "x.pt", "FOLDER": "."}.items():
        value = value.replace(word, str(folder / path))
    return value


def prepare(folder: Path) -> None:
    (folder / "x.pt").write_bytes(pickled(folder / "marker"))
    (folder / "hubconf.py").write_text(f"open({str(folder / 'marker')!r}, 'w')\n")


def set_variables(folder: Path) -> None:
    path = f"{{_target_: pathlib.Path, _args_: [{folder}/marker]}}"
    os.environ.update(HOSTILE="os.system", HOSTILE_PART=f"{{_target_: pathlib.Path.touch, _args_: [{path}]}}")


def build(target: Any, folder: Path) -> str:
    set_variables(folder)
    return f"read: {instantiate(OmegaConf.create(filled(target, folder)))!r:.40}"


def with_hydra(target: Any, folder: Path) -> str:
    set_variables(folder)
    return f"read: {hydra_instantiate(OmegaConf.create(filled(target, folder)))!r:.40}"


def experiment(text: str, folder: Path) -> str:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "theirs.yaml").write_text(f"# @package _global_\nname: x\n{text}\n")
    check_given("train", ["--config-dir", str(folder), "experiment=theirs"])
    return "read: it"


def bomb() -> str:
    """Ten texts of ten texts of ten texts: YAML's aliases, nine deep."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join(lines)


PREPROCESS = "preprocess: {_target_: mmpretrain.data.preprocess.Preprocess, image_size: 8}\n"
PARTS = f"{PREPROCESS}tokenizer: {{_target_: mmpretrain.data.tokenizer.ByteTokenizer}}\n"
LINEAR = f"model: {{_target_: torch.nn.Linear, in_features: 1, out_features: 1}}\n{PARTS}"
ELSEWHERE = "path: ../../../etc/passwd, context_length: 7, eos_token: x, pad_token: x"
CONFIGS = {
    "a target that is a command": "model: {_target_: os.system, command: touch marker}\n" + PARTS,
    "a target that is not of a model": "model: {_target_: torchvision.datasets.CIFAR10, root: .}\n" + PARTS,
    "a function as a part": "model: {_target_: mmpretrain.datasets.openmoji.build, root: .}\n" + PARTS,
    "a tokenizer from elsewhere": "model: {_target_: torch.nn.Identity}\n"
    f"{PREPROCESS}tokenizer: {{_target_: mmpretrain.data.tokenizer.HuggingFaceTokenizer, {ELSEWHERE}}}\n",
    "Python objects in its YAML": "model: !!python/object/apply:os.system [touch marker]\n" + PARTS,
    "3,000 levels of YAML": "model: " + "[" * 3000 + "]" * 3000 + "\n" + PARTS,
    "a bomb of aliases": bomb(),
    "a secret of the environment": LINEAR.replace("in_features: 1", "in_features: '${oc.env:HOSTILE_SECRET}'"),
}
FOLDERS = {
    **{name: (text, b"") for name, text in CONFIGS.items()},
    "pickled weights": (LINEAR, pickle.dumps([1])),
    "weights with a header of 2^63 bytes": (LINEAR, struct.pack("<Q", 2**63 - 1) + b"{}"),
}


def model_folder(text: str, weights: bytes, folder: Path) -> None:
    (folder / "config.yaml").write_text(text)
    (folder / "model.safetensors").write_bytes(weights)


def loaded(folder: Path) -> str:
    os.environ["HOSTILE_SECRET"] = "hunter2"
    try:
        return f"read: {mmpretrain.load(folder)!r:.40}"
    except mmpretrain.InputError as error:
        if "hunter2" in str(error):
            raise AssertionError("the message tells the secret") from error
        raise


CASES = [
    *(
        Case(f"target: {name}", partial(build, target), {"hydra": partial(with_hydra, target)}, prepare=prepare)
        for name, target in TARGETS.items()
    ),
    *(Case(f"experiment: {name}", partial(experiment, text)) for name, text in EXPERIMENTS.items()),
    *(Case(f"model folder: {name}", loaded, prepare=partial(model_folder, *made)) for name, made in FOLDERS.items()),
]
