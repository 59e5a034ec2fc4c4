"""Run folders: where a run writes, and where a resumed one goes on."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor, nn

from mmpretrain.errors import InputError
from mmpretrain.secrets import masked_yaml
from mmpretrain.training.checkpoint import newest, part, shapes
from mmpretrain.training.folder import checkpoints, step_of
from mmpretrain.training.folder import link as link_checkpoint
from mmpretrain.training.manifest import MANIFEST, verify
from mmpretrain.training.step_model import run_adapters, run_config

_locks: dict[Path, IO[str]] = {}


class Run(NamedTuple):
    """A run folder, the checkpoint to go on from (None = from the start), and the step that is of."""

    folder: Path
    checkpoint: str | None
    step: int = 0

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.folder / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end at the checkpoint's step: its metrics are written last."""
        try:
            metrics = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
            return bool(metrics["train/steps"] == self.step)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def saved_order(self) -> dict[str, Any] | None:
        """Read from the checkpoint what decided the order of the samples; None without a checkpoint."""
        if self.checkpoint is None:
            return None
        callbacks = part(Path(self.checkpoint), "callbacks") or {}
        found: dict[str, Any] | None = callbacks.get("DataLog", {}).get("order")
        return found

    def start(self, config: DictConfig) -> None:
        """Make the folder, write the resolved config, and point `latest` at it; for rank 0.

        Raises `InputError` where another process is writing to it. The lock is the system's and ends with the process.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock()
        (self.folder / "config.yaml").write_text(masked_yaml(config), encoding="utf-8")
        if self.checkpoint is not None and Path(self.checkpoint).parent == self.checkpoints:
            link_checkpoint(self.checkpoints, "latest", Path(self.checkpoint).name)  # later ones are of another course
        link = self.folder.parent / "latest"
        if link.is_symlink() or not link.exists():
            temporary = link.with_name(f".latest.{os.getpid()}")
            temporary.symlink_to(self.folder.name, target_is_directory=True)
            temporary.replace(link)

    def end(self) -> None:
        """Let other processes write to the folder."""
        if self.folder in _locks:
            _locks.pop(self.folder).close()

    def _lock(self) -> None:
        if self.folder in _locks:  # opening the file again and closing it would end the lock
            return
        file = (self.checkpoints / ".lock").open("w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise InputError(
                f"run_dir {self.folder} is in use by another process; wait for its end, or give another run_dir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            _say(f"run_dir {self.folder} cannot be locked ({error.strerror}); see that no other process writes to it")
        _locks[self.folder] = file


def open_run(config: DictConfig) -> Run:
    """Find the folder a run writes to, and the checkpoint it goes on from.

    Every rank reads the same files before any rank writes, so all come to the same answer. Raises `InputError` where
    the folder is taken, or there is nothing to resume.
    """
    if config.resume is not None:
        return _resumed(config)
    folder = _folder(config)
    taken = (folder / "config.yaml").exists() or (folder / "checkpoints").exists()
    if taken and rank_zero():  # further ranks start later, when the first has made the folder
        raise InputError(
            f"run_dir {folder} already holds a run; give another run_dir, or resume=auto to go on with that one"
        )
    return Run(folder, None)


def rank_zero() -> bool:
    """Say whether this process is rank 0, before there is a process group."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def _folder(config: DictConfig) -> Path:
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().runtime.output_dir).resolve()
    return Path(config.run_dir).resolve()


def _resumed(config: DictConfig) -> Run:
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    named = hydra is not None and (
        hydra.mode == RunMode.MULTIRUN or any(o.startswith("run_dir=") for o in hydra.overrides.task)
    )
    folder = _folder(config)
    if config.resume == "auto":
        wanted = folder if named else (folder.parent / "latest").resolve()
        if not wanted.is_dir():
            _say(f"resume=auto: no run at {wanted}; starting one")
            return Run(folder, None)
        return _last(wanted)
    given = Path(config.resume).resolve()  # `latest` and `best` are links
    if (given / "checkpoints").is_dir():
        found = _last(given)
    elif (given / MANIFEST).is_file():
        found = Run(given.parents[1] if given.parent.name == "checkpoints" else folder, str(given), verify(given).step)
    else:
        what = "no run and no checkpoint" if given.exists() else "there is no such path"
        raise InputError(
            f"resume={config.resume}: {what}; give auto, a run folder, or a checkpoint in it (RUN/checkpoints/step_...)"
        )
    if found.checkpoint is None:
        raise InputError(f"resume={config.resume}: the run holds no checkpoint yet; give resume=auto to start it again")
    return found._replace(folder=folder) if named else found


def _last(folder: Path) -> Run:
    """Go on with a run: from its newest sound checkpoint, or from the start where it was ended before its first."""
    found = newest(folder / "checkpoints")
    for line in found.refused:
        _say(f"refused: {line}")
    if found.path is not None:
        return Run(folder, str(found.path), step_of(found.path))
    if checkpoints(folder / "checkpoints"):
        raise InputError(
            f"resume: no checkpoint of {folder} is sound: {'; '.join(found.refused) or 'none was verified'}; give "
            "another run_dir to start anew"
        )
    if (folder / "checkpoints").is_dir():
        _say(f"resume=auto: {folder} holds no checkpoint yet; starting at step 0")
    return Run(folder, None)


def check_checkpoint(run: Run, module: nn.Module, max_steps: int) -> None:
    """Raise `InputError` where a checkpoint is another model's (listing what differs) or leaves nothing to do.

    Only the headers of its files are read. A checkpoint at `max_steps` of a run that did not finish is fine: its
    evaluation is left to do.
    """
    if run.checkpoint is None:
        return
    saved = shapes(Path(run.checkpoint))
    own = {name: tensor.shape for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    other = [name for name in sorted(own.keys() & saved.keys()) if own[name] != saved[name]]
    problems = [
        f"{name} {len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for name, keys in (("missing", missing), ("extra", extra), ("of another shape", other))
        if keys
    ]
    if problems:
        raise InputError(
            f"checkpoint {run.checkpoint} is of another model: tensors {'; '.join(problems)}; "
            "resume with the config it was made with"
        )
    if run.step > max_steps or (run.step == max_steps and run.finished):
        raise InputError(
            f"checkpoint {run.checkpoint} is at step {run.step} and training ends at {max_steps}: nothing is left to "
            "do; raise trainer.max_steps, or evaluate the model"
        )


def check_groups(run: Run, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `InputError` where a checkpoint's optimizer trained other weights than `groups`, or layers at other rates.

    With as many groups it would go on at the old rates, whatever the config says.
    """
    if run.checkpoint is None:
        return
    now = _sizes(groups)
    for state in part(Path(run.checkpoint), "optimizer_states") or []:
        before = _sizes(state["param_groups"])
        if before != now:
            raise InputError(
                f"checkpoint {run.checkpoint} trained {sum(size for size, _ in before)} tensors at "
                f"{len({scale for _, scale in before})} rates, this config {sum(size for size, _ in now)} at "
                f"{len({scale for _, scale in now})}, or other ones; resume with the finetune, optimizer and "
                "optimizer.layer_decay it was made with, or begin another run with init=MODEL"
            )


def _sizes(groups: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Count the tensors of each parameter group, with what their rate is multiplied with."""
    return [(len(group["params"]), group.get("lr_scale", 1.0)) for group in groups]


def check_adapters(run: Run, lora: Mapping[str, Any] | None) -> None:
    """Raise `InputError` where a checkpoint's run says another `finetune.lora`: tensors do not show rank and alpha.

    A checkpoint that lies in no run folder any more says nothing of it.
    """
    if run.checkpoint is None or not run_config(Path(run.checkpoint)).is_file():
        return
    before, now = run_adapters(Path(run.checkpoint)) or {}, dict(lora or {})
    other = [
        f"{key}={before.get(key)}, now {now.get(key)}"
        for key in sorted({*before, *now})
        if key not in before or key not in now or before[key] != now[key]
    ]
    if other:
        raise InputError(
            f"checkpoint {run.checkpoint} was made with another finetune.lora: {'; '.join(other)}; give what it was "
            "made with, or begin another run with init=MODEL"
        )


def _say(line: str) -> None:
    if rank_zero():
        print(line, file=sys.stderr)
