"""What makes training on a CPU quick without changing a number: threads, precision, memory, attention."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import nn


def prepare_cpu(model: nn.Module, local_ranks: int = 1) -> None:
    """Prepare this process, one of `local_ranks` on the machine, to train `model` on a CPU."""
    share_threads(local_ranks)
    use_plain_attention(model)


def share_threads(local_ranks: int = 1, cores: int | None = None) -> int:
    """Lower torch's threads to this rank's share of the available cores, and return how many there are.

    A container's CPU quota is not seen by torch: with more threads than it grants, all of them are stopped for the
    rest of each period, most at a barrier the others wait at. A number in `OMP_NUM_THREADS` is the user's, and stays.
    """
    share = max(1, (available_cores() if cores is None else cores) // max(1, local_ranks))
    if not os.environ.get("OMP_NUM_THREADS") and torch.get_num_threads() > share:
        torch.set_num_threads(share)
    return torch.get_num_threads()


def available_cores(root: Path = Path("/")) -> int:
    """Count the cores that this process may keep busy: those of its affinity mask, or fewer where a cgroup says so.

    `root` is where /proc and /sys are found. A quota of 2.5 cores counts as 2.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(cores, _quota(root))))


def cpu_precision(root: Path = Path("/")) -> str:
    """`bf16-mixed` where the CPU multiplies bfloat16 in hardware (AMX, AVX512-BF16, Arm BF16), else `32-true`.

    Elsewhere bfloat16 is converted to float32 for each product, which is slower than float32 alone.
    """
    return "bf16-mixed" if _BF16 & _cpu_flags(root) else "32-true"


def use_plain_attention(model: nn.Module) -> None:
    """Turn fused attention off in every part that has the switch, ours and timm's.

    torch's fused kernel in bfloat16 takes several times as long on a CPU, most of all backwards, as the same three
    products (`benchmarks/train_step.py`), and memory for short sequences is no concern there.
    """
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            setattr(part, "fused_attn", False)  # noqa: B010 (the type of a module's attributes is not known)


_BF16 = {"amx_bf16", "avx512_bf16", "bf16"}
"""As Linux names them; `bf16` is Arm's."""


def _cpu_flags(root: Path) -> set[str]:
    """What the first processor of /proc/cpuinfo can do (`flags` on x86, `Features` on Arm)."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    found = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return set(found[0]) if found else set()


def _quota(root: Path) -> float:
    """Cores granted by the cgroups of this process and those above them; infinity where there is no limit."""
    quotas = [math.inf]
    for line in _lines(root / "proc/self/cgroup"):  # "0::/path" (version 2) or "4:cpu,cpuacct:/path" (version 1)
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts, read = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"), _quota_v1
        else:
            continue
        # A container may see its own group as the root of the mount, under a path of the host: every level is tried.
        levels = [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]
        quotas += [read(root / mount / level) for mount in mounts for level in levels]
    return min(quotas)


def _quota_v2(group: Path) -> float:
    for line in _lines(group / "cpu.max"):  # "max 100000" or "200000 100000"
        quota, period = line.split()
        return math.inf if quota == "max" else int(quota) / int(period)
    return math.inf


def _quota_v1(group: Path) -> float:
    quota, period = _lines(group / "cpu.cfs_quota_us"), _lines(group / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else math.inf


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
