"""Real runs that stand still: who and where is said, and all ranks end with the watchdog's status in seconds."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from mmpretrain.errors import InputError
from mmpretrain.training.watchdog import Watchdog
from tests.training import toy

STALLED, LIMIT = 76, 3.0
WITHIN = 60.0  # on a busy machine; a process that hangs would take for ever


def test_a_stuck_worker_is_named_by_both_ranks(tmp_path):
    ranks = toy.start(2, tmp_path, workers=1, seconds=LIMIT, stuck=[1, 0, 4])
    pids = toy.wait_for_step(tmp_path, 2, 3)
    (worker,) = toy.children(pids[1])
    assert toy.end(ranks, LIMIT + WITHIN) == [STALLED, STALLED], (tmp_path / "output").read_text()
    output = (tmp_path / "output").read_text()
    assert re.search(
        r"mmpretrain: stalled: nothing moved for \d+ s on rank [01] \(\S+, pid \d+, \S.*, last step 4\)", output
    )
    assert re.search(r"worker 0 \(pid \d+\) reads image_text: shards/00007.tar row 4 for \d+ s", output)
    assert "behind: rank 1 (" in output or "on rank 1 (" in output
    assert "most recent call first" in output  # the stacks
    assert toy.ends(worker, 30)


def test_a_main_thread_that_hangs_in_c_is_ended(tmp_path):
    (process,) = toy.start(1, tmp_path, seconds=1.0, hang=[0, 3])
    toy.wait_for_step(tmp_path, 1, 3)
    assert toy.end([process], 1.0 + WITHIN) == [STALLED]
    output = (tmp_path / "output").read_text()
    assert "running the step, last step 3" in output and "training_step" in output


def test_a_stopped_rank_is_named_by_the_other(tmp_path):
    ranks = toy.start(2, tmp_path, seconds=LIMIT)
    pids = toy.wait_for_step(tmp_path, 2, 3)
    os.kill(pids[1], signal.SIGSTOP)
    assert toy.end(ranks[:1], LIMIT + WITHIN) == [STALLED]
    toy.end(ranks[1:], 0)
    assert re.search(r"on rank 0 |rank 1 has given no sign of life", (tmp_path / "output").read_text())


def test_a_killed_worker_is_one_line_that_names_it(tmp_path):
    (process,) = toy.start(1, tmp_path, workers=2, seconds=60.0)
    (pid,) = toy.wait_for_step(tmp_path, 1, 3)
    worker = toy.children(pid)[1]
    os.kill(worker, signal.SIGKILL)
    assert toy.end([process], WITHIN) == [1]
    output = (tmp_path / "output").read_text()
    (line,) = [line for line in output.splitlines() if "mmpretrain: error" in line] or [output]
    assert f"error: worker 1 (pid {worker}) " in line and "memory" in line
    assert "Traceback" not in output


def test_the_clock_stands_still_in_a_pause_and_the_folder_goes_at_the_end(tmp_path):
    options = {"seconds": 1.0, "pause_at": 3, "pause": 3.0, "max_steps": 30}
    assert toy.end(toy.start(1, tmp_path, **options), 60) == [0], (tmp_path / "output").read_text()
    assert not (tmp_path / "heartbeats").exists()


def test_a_run_that_was_suspended_as_a_whole_goes_on(tmp_path):
    (process,) = toy.start(1, tmp_path, seconds=2.0, step_seconds=0.2)
    (pid,) = toy.wait_for_step(tmp_path, 1, 2)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(6)
    os.kill(pid, signal.SIGCONT)
    toy.wait_for_step(tmp_path, 1, toy.steps(tmp_path, 0)[-1][0] + 15)
    os.kill(pid, signal.SIGTERM)
    assert toy.end([process], WITHIN) == [75]


def test_the_limit_is_checked(tmp_path):
    with pytest.raises(InputError, match="positive"):
        Watchdog(0, tmp_path)
