"""Collectives on real gloo ranks, and the identity on one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmpretrain import distributed
from tests.ranks import run_ranks


def on_ranks() -> dict[str, object]:
    rank = distributed.rank()
    x = torch.arange(4.0).view(2, 2).add(10 * rank).requires_grad_()
    gathered = distributed.gather(x)
    # Each rank weighs every row by its own factor, so a row's gradient is the sum of the factors.
    (gathered * (rank + 1)).sum().backward()
    block, seen = torch.tensor([float(rank)]), []
    for _ in range(distributed.world_size()):
        seen.append(block.item())
        (block,) = distributed.rotate(block)
    return {
        "gathered": gathered.detach(),
        "gradient": x.grad,
        "uneven": distributed.gather_uneven(torch.full((rank + 1, 2), float(rank))),
        "sum": distributed.sum_over_ranks(torch.tensor(rank + 1)),
        "seen": seen,
        "home": block.item(),
        # At 1e4 apart, one exponential is nothing beside the other; nothing may overflow.
        "exponentials": distributed.exponentials_over_ranks(torch.tensor([5.0, 1e4 * rank]), torch.tensor([2.0, 1.0])),
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives(world_size):
    for rank, result in enumerate(run_ranks(on_ranks, world_size)):
        want = torch.cat([torch.arange(4.0).view(2, 2) + 10 * r for r in range(world_size)])
        torch.testing.assert_close(result["gathered"], want)
        torch.testing.assert_close(result["gradient"], torch.full((2, 2), float(sum(range(1, world_size + 1)))))
        assert result["uneven"][:, 0].tolist() == [float(r) for r in range(world_size) for _ in range(r + 1)]
        assert result["sum"].item() == sum(range(1, world_size + 1))
        assert result["seen"] == [float((rank - hop) % world_size) for hop in range(world_size)]
        assert result["home"] == rank
        largest, total = result["exponentials"]
        assert largest.tolist() == [5.0, 1e4 * (world_size - 1)] and total.tolist() == [2.0 * world_size, 1.0]


def test_one_process_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.gather(x) is x
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    torch.testing.assert_close(distributed.gather_uneven(x), x.detach())
    torch.testing.assert_close(distributed.sum_over_ranks(x), x.detach())
    assert distributed.rotate(x)[0] is x
    assert distributed.exponentials_over_ranks(x, x) == (x, x)
    distributed.barrier()


def objects_and_flags() -> dict[str, object]:
    rank, size = distributed.rank(), distributed.world_size()
    agreement = distributed.Agreement()
    # The last rank raises its flag before the third boundary.
    answers = [agreement.at_step(rank == size - 1 and step >= 2) for step in range(5)]
    agreement.close()
    late = distributed.Agreement()
    votes = [late.at_step(False), late.now(rank == 0), late.now(False)]
    late.at_step(True)
    late.close()  # with a vote under way
    return {
        "objects": distributed.gather_objects({"rank": rank, "text": "ä" * rank, "none": None}),
        "empty": distributed.gather_objects([]),
        "first": distributed.of_rank_zero([rank, object() if rank else "ö"]),
        "answers": answers,
        "votes": votes,
        "any": [distributed.any_rank(rank == 1), distributed.any_rank(False)],
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_objects_and_agree_on_flags(world_size):
    for result in run_ranks(objects_and_flags, world_size):
        assert result["objects"] == [{"rank": r, "text": "ä" * r, "none": None} for r in range(world_size)]
        assert result["empty"] == [[]] * world_size
        assert result["first"] == [0, "ö"]
        assert result["answers"] == [False, False, False, True, False]  # told one boundary later, to all at once
        assert result["votes"] == [False, True, False]
        assert result["any"] == [True, False]


def test_one_process_agrees_with_itself_at_once():
    agreement = distributed.Agreement()
    assert [agreement.at_step(False), agreement.at_step(True), agreement.now(True)] == [False, True, True]
    agreement.close()
    assert distributed.gather_objects({"step": (1, None)}) == [{"step": [1, None]}]
    with distributed.joined("cpu") as device:  # nothing to join
        assert device == torch.device("cpu") and not torch.distributed.is_initialized()
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    with pytest.raises(TypeError):
        distributed.gather_objects(object())


def test_run_id_is_slurms_job_under_slurm(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert distributed.run_id() == "slurm_77"


def test_run_id_is_one_for_all_ranks_of_torchrun(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(
        "import os, time, mmpretrain.distributed as d\n"
        "time.sleep(1.2 * int(os.environ['RANK']))\n"
        f"open(rf'{tmp_path}/' + os.environ['RANK'], 'w').write(d.run_id())\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    first, second = ((tmp_path / rank).read_text() for rank in "01")
    assert first == second and len(first) == 23


def test_only_this_file_talks_to_other_processes():
    # Sharded tensors and their wrapping are types and tools; the writer of sharded checkpoints is torch's own.
    tools = re.compile(r"torch\.distributed\.(tensor|fsdp|_composable|checkpoint|device_mesh)\b")
    package = Path(distributed.__file__).parent
    offenders = [
        f"{path.name}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.name not in ("distributed.py", "sharded.py", "sharded_state.py")
        for line in path.read_text().splitlines()
        if "torch.distributed" in line and not tools.search(line) and not re.match(r"\s*(#|\"\"\")", line)
    ]
    assert offenders == []
