"""Training on a CPU: the cores a process may really use, its threads, and where bfloat16 pays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmpretrain.training import cpu
from tests import models

V2 = {"proc/self/cgroup": "0::/jobs/mine\n"}
V1 = {"proc/self/cgroup": "5:memory:/jobs\n4:cpu,cpuacct:/jobs/mine\n0::/\n"}
MIXED = {"proc/self/cgroup": "1:cpu:/docker/abc\n0::/\n"}
NONE = {"proc/self/cgroup": "0::/\n"}
MACHINES: dict[str, tuple[dict[str, str], float]] = {
    "no cgroups": ({}, 99),
    "no limit": ({**NONE, "sys/fs/cgroup/cpu.max": "max 100000\n"}, 99),
    "version 2": ({**V2, "sys/fs/cgroup/jobs/mine/cpu.max": "250000 100000\n"}, 2),
    "the parent's is smaller": (
        {**V2, "sys/fs/cgroup/jobs/mine/cpu.max": "800000 100000\n", "sys/fs/cgroup/jobs/cpu.max": "300000 100000\n"},
        3,
    ),
    "less than one core": ({**V2, "sys/fs/cgroup/jobs/mine/cpu.max": "50000 100000\n"}, 1),
    "seen from inside a container": ({**V2, "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    "version 1": (
        {
            **V1,
            "sys/fs/cgroup/cpu,cpuacct/jobs/mine/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/jobs/mine/cpu.cfs_period_us": "50000\n",
        },
        4,
    ),
    "version 1 without limit": (
        {
            **V1,
            "sys/fs/cgroup/cpu/jobs/mine/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/jobs/mine/cpu.cfs_period_us": "100000\n",
        },
        99,
    ),
    "version 1 in a container": (
        {
            **MIXED,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        1,
    ),
}


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("machine", MACHINES)
def test_a_quota_counts_like_missing_cores(machine, tmp_path, monkeypatch):
    files, cores = MACHINES[machine]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(99), raising=False)
    assert cpu.available_cores(lay(tmp_path, files)) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity masks")
def test_the_affinity_mask_counts():
    one = min(os.sched_getaffinity(0))
    script = f"import os; os.sched_setaffinity(0, [{one}]); from mmpretrain.training import cpu; "
    script += "print(cpu.available_cores(), cpu.share_threads())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["1", "1"], done.stderr


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_ranks_share_the_cores(four_threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cpu.share_threads(1, cores=16) == 4  # never more than torch or the caller chose
    assert cpu.share_threads(2, cores=6) == 3
    assert cpu.share_threads(8, cores=4) == 1


def test_the_number_a_user_sets_stays(four_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert cpu.share_threads(2, cores=2) == 4


CPUINFO = {
    "flags\t\t: fpu sse2 avx512f avx512_bf16\n": "bf16-mixed",
    "flags : fpu avx512f amx_bf16 amx_tile\n": "bf16-mixed",
    "Features\t: fp asimd bf16 i8mm\n": "bf16-mixed",
    "flags : fpu sse2 avx2 avx512f\n": "32-true",
    "Features : fp asimd\n": "32-true",
    "": "32-true",
}


@pytest.mark.parametrize("text", CPUINFO)
def test_bfloat16_only_where_the_hardware_multiplies_it(text, tmp_path):
    assert cpu.cpu_precision(lay(tmp_path, {"proc/cpuinfo": f"processor : 0\n{text}"})) == CPUINFO[text]
    assert cpu.cpu_precision(tmp_path / "elsewhere") == "32-true"


@pytest.mark.skipif(not hasattr(torch.cpu, "_is_avx512_bf16_supported"), reason="torch does not say")
def test_torch_sees_the_same_hardware():
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        found = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        assert (cpu.cpu_precision() == "bf16-mixed") == found


def test_every_attention_becomes_plain_and_computes_the_same():
    model, batch = models.coca().double().eval(), models.batch(4)
    want = model(batch)
    cpu.use_plain_attention(model)
    switches = [part.fused_attn for part in model.modules() if hasattr(part, "fused_attn")]
    assert switches and not any(switches)
    got = model(batch)
    for modality, embedding in want.embeddings.items():
        torch.testing.assert_close(got.embeddings[modality], embedding, rtol=0, atol=1e-6)
