"""Ranks and collectives: the only file that talks to other processes; with one process everything is the identity.

The convention every loss follows: each rank computes its own share, scaled so that the *mean over ranks* is the loss
of the global batch. Data-parallel training averages gradients over ranks, so `gather` sends back the *sum* of the
gradients that all ranks computed for a row, and averaging then gives the gradient of the global loss.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.autograd.function import once_differentiable

from mmpretrain.device import usable


def is_distributed() -> bool:
    """Say whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Index of this process, 0 where there is only one."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Count of processes, 1 where there is only one."""
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Wait for every rank."""
    if is_distributed():
        dist.barrier()


def leave() -> None:
    """End the process group on every rank, so that what follows runs on each rank alone."""
    if is_distributed():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def joined(device: str | torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun announces in the environment, for the `with` block; gives this rank's device.

    A CPU joins by gloo, `cuda` by NCCL too, with one GPU for each local rank. Alone, or where a group is up already,
    nothing is joined. The others may wait two hours: rank 0 alone builds data sets.
    """
    place, ranks = usable(device), int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized() or ranks < 2 or "RANK" not in os.environ:
        yield place
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    try:
        yield place
    finally:
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        out = x.new_empty((world_size() * len(x), *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty((ctx.rows, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own


def gather(x: Tensor) -> Tensor:
    """Concatenate (B,...) of all ranks, in rank order, to (G,...); gradients flow back to the rank a row came from.

    Every rank must pass the same shape. The gradient of a row is the sum over ranks of what each computed for it.
    """
    if not is_distributed():
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


def gather_uneven(x: Tensor) -> Tensor:
    """Concatenate (B_r,...) of all ranks in rank order, without gradient; first sizes may differ between ranks."""
    if not is_distributed():
        return x.detach()
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], dtype=torch.int64, device=x.device))
    longest = max(int(size) for size in sizes)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: len(x)] = x.detach()
    blocks = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(blocks, padded)
    return torch.cat([block[: int(size)] for block, size in zip(blocks, sizes, strict=True)])


def gather_objects(value: Any) -> list[Any]:
    """Collect a JSON-able value of each rank, in rank order; what comes back went through JSON (tuples are lists).

    JSON and not pickle, so that nothing another process sends can run code. Raises TypeError for what JSON has not.
    """
    text = json.dumps(value).encode()
    if not is_distributed():
        return [json.loads(text)]
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(_device())
    sizes = gather_uneven(torch.tensor([len(data)], device=data.device)).tolist()
    parts = torch.split(gather_uneven(data).cpu(), sizes)
    return [json.loads(part.numpy().tobytes()) for part in parts]


def of_rank_zero(value: Any) -> Any:
    """Give every rank what rank 0 passes, a value that JSON can hold; it went through JSON."""
    return gather_objects(value if rank() == 0 else None)[0]


def _device() -> torch.device:
    # NCCL moves only what lies on the GPU; every other backend takes CPU tensors.
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def any_rank(flag: bool) -> bool:
    """Say whether the flag is up on any rank; every rank waits for the answer."""
    if not is_distributed():
        return flag
    vote = torch.tensor([int(flag)], device=_device())
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor of the same shape over ranks, without gradient."""
    x = x.detach().clone()
    if is_distributed():
        dist.all_reduce(x)
    return x


def exponentials_over_ranks(largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Add up total x exp(largest), each (N,), over ranks without overflow or gradient, given and returned as the two.

    A rank passes the largest of its numbers and the sum of their exponentials relative to it.
    """
    if not is_distributed():
        return largest, total
    top = largest.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    total = total * (largest - top).exp_()
    dist.all_reduce(total)
    return top, total


def rotate(*tensors: Tensor) -> list[Tensor]:
    """Send each tensor to the next rank and return what the previous rank sent, without gradient.

    Repeating it `world_size` times brings every tensor home, so blocks can travel around the ring with their gradients.
    """
    if not is_distributed():
        return list(tensors)
    following, previous = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    sent = [x.detach().contiguous() for x in tensors]
    received = [torch.empty_like(x) for x in sent]
    operations = [dist.P2POp(dist.isend, x, following) for x in sent]
    operations += [dist.P2POp(dist.irecv, x, previous) for x in received]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


class Agreement:
    """A flag that any rank may raise and that all ranks learn at the same step, without waiting for the device.

    Each call of `at_step` starts a vote in the background and answers with the vote of the call before, which every
    rank has long cast. So all ranks stop one step after the first of them wanted to. The votes travel as CPU tensors
    on a gloo group of their own; with one process the answer is immediate. All ranks make, ask and close it together.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if is_distributed() else None
        self._vote = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    def at_step(self, flag: bool) -> bool:
        """Vote at a step boundary; returns whether any rank's flag was up at the last boundary."""
        if self._group is None:
            return flag
        agreed = self._answer()
        if not agreed:
            self._vote.fill_(int(flag))
            self._work = dist.all_reduce(self._vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def now(self, flag: bool) -> bool:
        """Vote and wait for all ranks: whether any rank's flag is up, or was at the last boundary."""
        if self._group is None:
            return flag
        flag = self._answer() or flag
        self.at_step(flag)
        return self._answer()

    def close(self) -> None:
        """Wait for the last vote and give its connections back."""
        if self._group is not None:
            self._answer()
            dist.destroy_process_group(self._group)
            self._group = None

    def _answer(self) -> bool:
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return bool(self._vote.item())


def run_id() -> str:
    """Name this run, the same on every rank though clocks differ: SLURM's job id, by torchrun's store, or the time."""
    seconds, rest = divmod(time.time_ns(), 10**9)  # to the millisecond: a script can start two runs in one second
    now = f"{time.strftime('%Y-%m-%d_%H-%M-%S', time.localtime(seconds))}-{rest // 10**6:03d}"
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return f"slurm_{os.environ['SLURM_JOB_ID']}"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return now
    # torchrun's agent already serves this store; the process group only comes up later, inside the trainer.
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"mmpretrain/run_id/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if os.environ["RANK"] == "0":
        store.set(key, now)
    return str(store.get(key).decode())
