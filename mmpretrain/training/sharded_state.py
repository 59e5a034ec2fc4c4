"""Checkpoints of fully sharded training: every rank writes its own parts, by torch's distributed checkpoint.

The files are safetensors that carry their offsets (torch's Hugging Face layout), under the same manifest, in the same
folders as any other checkpoint. They can be read by any number of ranks.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, zeros

from mmpretrain.errors import InputError
from mmpretrain.training.checkpoint import begin, finish, rebuild
from mmpretrain.training.manifest import DamagedCheckpoint, Manifest, read_manifest
from mmpretrain.training.state_json import Packed


def save_sharded(folder: Path, packed: Packed, step: int, keep: int, group: Any) -> Path | None:
    """Save a state whose sharded tensors each rank of `group` holds a part of; the rest is taken from rank 0.

    Returns the checkpoint on rank 0 and None elsewhere. Raises `OSError` on rank 0 where any rank could not write.
    """
    first, failed = dist.get_rank(group) == 0, None
    place: list[str | None] = [None]
    if first:
        try:
            place = [str(begin(folder, step, sum(tensor.nbytes for tensor in packed.tensors.values())))]
        except OSError as error:
            failed = error
    dist.broadcast_object_list(place, src=0, group=group)
    if place[0] is None:
        if failed is not None:
            raise failed
        return None
    temporary = Path(place[0])
    try:
        save_parts(
            packed.tensors,
            storage_writer=HuggingFaceStorageWriter(place[0], save_distributed=True),
            process_group=group,
        )
        return finish(temporary, packed.tree, Manifest(step, "sharded", {}), keep) if first else None
    except CheckpointException as error:  # on every rank
        causes = {number: cause for number, (cause, _) in error.failures.items()}
        if not all(isinstance(cause, OSError) for cause in causes.values()):
            raise
        if not first:
            return None
        number, cause = next(iter(causes.items()))
        assert isinstance(cause, OSError)
        raise OSError(cause.errno, f"rank {number}: {cause.strerror or cause}", cause.filename) from error
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well


def load_sharded(path: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """Load a checkpoint that was verified, each rank of `mesh` the parts it needs; raises `InputError`.

    Tensors that were sharded come back sharded over the last dimension of `mesh`, others whole on the CPU.
    """
    manifest = read_manifest(path)
    if manifest.layout != "sharded":
        raise InputError(f"{path} was not saved by fully sharded training; go on with the trainer it was made with")
    reader = HuggingFaceStorageReader(str(path))
    written: Any = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}

    def target(reference: Mapping[str, Any]) -> Tensor:
        name = reference["tensor"]
        if name not in tensors:
            tensors[name] = _empty(written[name].size, written[name].properties.dtype, reference, mesh)
        return tensors[name]

    state = rebuild(path, manifest, target)
    load_parts(tensors, storage_reader=reader)
    return state


def load_whole(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Put some tensors of a checkpoint that was verified together, on the CPU of this process alone, by their names.

    Raises `DamagedCheckpoint` where one is not there.
    """
    reader = HuggingFaceStorageReader(str(path))
    written: Any = reader.read_metadata().state_dict_metadata
    if lost := sorted(set(names) - written.keys()):
        raise DamagedCheckpoint(f"{path} lacks {len(lost)} tensors that its state names: {', '.join(lost[:3])}")
    tensors = {name: torch.zeros(written[name].size, dtype=written[name].properties.dtype) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself, as meant
        load_parts(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _empty(size: torch.Size, dtype: torch.dtype, reference: Mapping[str, Any], mesh: DeviceMesh) -> Tensor:
    if "shape" not in reference:
        return torch.zeros(size, dtype=dtype)
    if reference["shape"] != [*size]:
        raise ValueError(f"{reference['tensor']} has parts of shape {[*size]}, not {reference['shape']}")
    cut = reference["cut"]
    last = Replicate() if cut is None else Shard(int(cut))
    tensor: Tensor = zeros(size, dtype=dtype, device_mesh=mesh, placements=[Replicate()] * (mesh.ndim - 1) + [last])
    return tensor
