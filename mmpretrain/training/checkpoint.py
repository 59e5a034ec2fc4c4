"""Checkpoints on disk: written aside, checked, then renamed; a damaged one is refused and never taken for a good one.

A checkpoint is a folder `step_00000500` of safetensors files, `state.json` (everything that is no tensor) and
`manifest.json` (step, and size and SHA-256 of every file). The link `latest` beside it names the newest one that was
read back and found whole.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.training.folder import age, checkpoints, link, linked, prune, sync
from mmpretrain.training.manifest import (
    STATE,
    DamagedCheckpoint,
    Manifest,
    checked,
    digest,
    drop_cached,
    listed,
    verify,
    write,
    write_manifest,
)
from mmpretrain.training.state_json import Packed, dumps, loads, pack, unpack

FILE_BYTES = 256 << 20
"""A file of tensors is closed at this size: one file's bytes are held in memory while it is written or read."""


class Found(NamedTuple):
    """The checkpoint to go on from (None: there is none), and one line for each newer one that was refused."""

    path: Path | None
    refused: list[str]


def save(folder: Path, state: Mapping[str, Any] | Packed, step: int, keep: int = 2) -> Path:
    """Save a state as `folder/step_XXXXXXXX`, point `latest` at it, and remove what is no longer kept.

    Raises `OSError` where the disk is full or does not return what was written; what was there before is untouched.
    """
    packed = state if isinstance(state, Packed) else pack(state)
    temporary = begin(folder, step, sum(tensor.nbytes for tensor in packed.tensors.values()))
    try:
        files = {}
        for name, group in _files(packed.tensors).items():
            files[name] = write(temporary / name, tensor_bytes(_apart(group), {"format": "pt"}))
        return finish(temporary, packed.tree, Manifest(step, "plain", files), keep)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin(folder: Path, step: int, size: int) -> Path:
    """Make the folder that a save of about `size` bytes writes to; what killed saves left behind is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in [*folder.glob(".step_*"), *folder.glob(".latest.*"), *folder.glob(".best.*")]:
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() and not left.is_symlink() else left.unlink()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB free", str(folder))
    temporary = folder / f".step_{step:08d}.{os.getpid()}"
    temporary.mkdir()
    return temporary


def finish(temporary: Path, tree: Any, manifest: Manifest, keep: int) -> Path:
    """Turn a folder of written tensors into a checkpoint: state, manifest, rename, verify, `latest`, prune.

    What the manifest has no hash of yet is hashed from the disk.
    """
    folder = temporary.parent
    files = {STATE: write(temporary / STATE, dumps(tree)), **manifest.files}
    for path in sorted(temporary.iterdir()):
        if path.name not in files:
            files[path.name] = path.stat().st_size, digest(path)
    write_manifest(temporary, manifest._replace(files=files))
    sync(temporary)
    name, number = f"step_{manifest.step:08d}", 0
    place = folder / name
    while place.exists():  # never over another one: it may be the last good one
        number += 1
        place = folder / f"{name}.{number}"
    temporary.rename(place)
    sync(folder)
    try:
        for path in place.iterdir():
            drop_cached(path)
        verify(place)
    except InputError as error:
        shutil.rmtree(place, ignore_errors=True)
        raise OSError(errno.EIO, f"read back, it is not what was written: {error}") from error
    link(folder, "latest", place.name)
    prune(folder, keep)
    return place


def newest(folder: Path) -> Found:
    """Find what `latest` names, or the newest sound one before it, and say why others were refused.

    One that is newer than what `latest` names was never verified, or is of a course that was left.
    """
    refused: list[str] = []
    latest = linked(folder, "latest")
    for path in checkpoints(folder):
        if latest is not None and age(path) > age(latest):
            continue
        try:
            manifest = verify(path)
            if age(path)[0] != manifest.step:
                raise DamagedCheckpoint(f"{path} is of step {manifest.step}, its name says another")
            return Found(path, refused)
        except InputError as error:
            refused.append(str(error))
    return Found(None, refused)


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU, each file only after its hash was checked; raises `DamagedCheckpoint`."""
    manifest = listed(path)
    if manifest.layout != "plain":
        raise InputError(f"{path} was saved by fully sharded training; go on with trainer=fsdp")
    tensors: dict[str, Tensor] = {}
    for name, (size, want) in manifest.files.items():
        if name.endswith(".safetensors"):
            data = checked(path / name, size, want)
            try:
                tensors.update(load_tensors(data))
            except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
                raise DamagedCheckpoint(f"{path / name} is no safetensors file ({error!s:.200})") from error
    return rebuild(path, manifest, lambda reference: tensors[reference["tensor"]])


def rebuild(path: Path, manifest: Manifest, tensor: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    """Put the state of a checkpoint together from `state.json` and `tensor`; raises `DamagedCheckpoint`."""
    size, want = manifest.files[STATE]
    try:
        state = unpack(loads(checked(path / STATE, size, want)), tensor)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except DamagedCheckpoint:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(
            f"{path / STATE} is no training state ({type(error).__name__}: {error!s:.200})"
        ) from error
    return state


def part(path: Path, name: str) -> Any:
    """Read one part of a checkpoint's state, tensors as None; None where it lacks it. Raises `DamagedCheckpoint`."""
    return rebuild(path, listed(path), lambda reference: None).get(name)


def shapes(path: Path, part: str = "state_dict") -> dict[str, torch.Size]:
    """List the tensors of one part of a checkpoint with their whole shapes; reads `state.json` and headers alone.

    Raises `DamagedCheckpoint`.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    manifest = listed(path)
    try:
        tensors: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: a safetensors file cannot be read ({error!s:.200})") from error
    state = rebuild(path, manifest, lambda reference: tensors[reference["tensor"]].size)
    found = state.get(part)
    if not isinstance(found, dict):
        raise DamagedCheckpoint(f"{path / STATE} has no {part!r}")
    return {name: torch.Size(size) for name, size in found.items() if isinstance(size, (tuple, torch.Size))}


def _files(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Spread tensors over files named after the first part of their names, each closed at FILE_BYTES."""
    files: dict[str, dict[str, Tensor]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        part = re.sub(r"\W", "_", name.split(".", 1)[0], flags=re.ASCII) or "_"
        number, size = sizes.get(part, (1, 0))
        if size >= FILE_BYTES:
            number, size = number + 1, 0
        sizes[part] = (number, size + tensor.nbytes)
        files.setdefault(f"{part}-{number:05d}.safetensors", {})[name] = tensor
    return files


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to the CPU, whole and without memory that two of them share, as the format asks."""
    memory, found = set(), {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        pointer = own.untyped_storage().data_ptr()
        found[name] = own.clone() if pointer in memory else own
        memory.add(pointer)
    return found
