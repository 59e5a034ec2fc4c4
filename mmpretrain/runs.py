"""Run folders: where a run writes, and where a resumed one goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mmpretrain.errors import InputError


class Run(NamedTuple):
    """A run folder, and the checkpoint to go on from (None = from the start)."""

    folder: Path
    checkpoint: str | None

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.folder / "checkpoints"

    def start(self, config: DictConfig) -> None:
        """Make the folder, write the resolved config, and point `latest` at it."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
        link = self.folder.parent / "latest"
        if link.is_symlink() or not link.exists():
            temporary = link.with_name(f".latest.{os.getpid()}")
            temporary.symlink_to(self.folder.name, target_is_directory=True)
            temporary.replace(link)


def open_run(config: DictConfig) -> Run:
    """Find the folder a run writes to; raises `InputError` where it is taken, or there is nothing to resume."""
    if config.resume is not None:
        return _resumed(config)
    folder = _folder(config)
    taken = (folder / "config.yaml").exists() or (folder / "checkpoints").exists()
    if (
        taken and getattr(rank_zero_only, "rank", 0) == 0
    ):  # further ranks start later, when the first has made the folder
        raise InputError(
            f"run_dir {folder} already holds a run; give another run_dir, or resume=auto to go on with that one"
        )
    return Run(folder, None)


def _folder(config: DictConfig) -> Path:
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().runtime.output_dir).resolve()
    return Path(config.run_dir).resolve()


def _resumed(config: DictConfig) -> Run:
    named = HydraConfig.initialized() and any(o.startswith("run_dir=") for o in HydraConfig.get().overrides.task)
    folder = _folder(config)
    if config.resume == "auto":
        if named and not folder.exists():
            return Run(folder, None)  # so that one command both starts a run and, requeued, goes on with it
        return _last(folder if named else folder.parent / "latest", config.resume)
    given = Path(config.resume)
    if not given.is_file():
        return _last(given, config.resume)
    own = given.resolve().parent.parent if given.resolve().parent.name == "checkpoints" else None
    return Run(folder if named or own is None else own, str(given.resolve()))


def _last(folder: Path, asked: str) -> Run:
    found = sorted((folder / "checkpoints").glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"resume={asked}: {folder} holds no checkpoint; give a run folder or a checkpoint file")
    return Run(folder.resolve(), str(found[-1].resolve()))


def check_checkpoint(path: str | None, module: nn.Module, max_steps: int) -> None:
    """Raise `InputError` where a checkpoint is another model's (listing what differs) or leaves nothing to do."""
    if path is None or Path(path).is_dir():  # a folder of shards is checked by torch as it is read
        return
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        saved, step = checkpoint["state_dict"], checkpoint["global_step"]
    except Exception as error:  # torch raises many types for a file that is no checkpoint
        raise InputError(f"{path} is no checkpoint of a training run ({type(error).__name__}); give another") from error
    own = module.state_dict()
    missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    shapes = [k for k in sorted(own.keys() & saved.keys()) if own[k].shape != saved[k].shape]
    problems = [
        f"{name} {len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for name, keys in (("missing", missing), ("extra", extra), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise InputError(
            f"checkpoint {path} is of another model: tensors {'; '.join(problems)}; "
            "resume with the config it was made with"
        )
    if step >= max_steps:
        raise InputError(
            f"checkpoint {path} is at step {step} and training ends at {max_steps}: nothing is left to do; "
            "raise trainer.max_steps, or evaluate the model"
        )
