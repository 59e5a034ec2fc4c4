"""Signals to real ranks: all stop at the same step, with the status that a scheduler requeues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.training import toy

STOPPED = 75


@pytest.mark.parametrize(
    ("number", "target", "workers"),
    [(signal.SIGTERM, 1, 1), (signal.SIGUSR1, 0, 0), pytest.param(signal.SIGINT, 1, 0, marks=pytest.mark.slow)],
)
def test_a_signal_to_one_rank_stops_both_at_the_same_step(number, target, workers, tmp_path):
    ranks = toy.start(2, tmp_path, workers=workers)
    pids = toy.wait_for_step(tmp_path, 2, 4)
    sent = time.monotonic()
    os.kill(pids[target], number)
    assert toy.end(ranks, 60) == [STOPPED, STOPPED], (tmp_path / "output").read_text()
    at = {(tmp_path / f"stopped_{rank}").read_text() for rank in range(2)}
    assert at == {str(toy.steps(tmp_path, 0)[-1][0])} and toy.steps(tmp_path, 1)[-1][0] == int(at.pop())
    # The step in which the signal came ends, one more carries the vote.
    assert sum(ended > sent for _, _, ended in toy.steps(tmp_path, target)) <= 2
    output = (tmp_path / "output").read_text()
    assert f"{number.name}: stopping after a step" in output and "Traceback" not in output


def test_one_process_stops_after_the_step_though_it_is_told_twice(tmp_path):
    (process,) = toy.start(1, tmp_path, step_seconds=0.5)
    (pid,) = toy.wait_for_step(tmp_path, 1, 1)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(pid, signal.SIGINT)  # launchers pass on what the terminal sent already
    os.kill(pid, signal.SIGTERM)
    assert toy.end([process], 50) == [STOPPED]
    assert toy.steps(tmp_path, 0)[-1][0] == int((tmp_path / "stopped_0").read_text()) <= 3


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    (process,) = toy.start(1, tmp_path, step_seconds=30)
    path = tmp_path / "installed_0"
    while not path.exists() or not path.read_text():
        time.sleep(0.02)
    pid = int(path.read_text())
    time.sleep(2)  # into the first step
    os.kill(pid, signal.SIGUSR1)
    if process.exitcode is None:
        os.kill(pid, signal.SIGINT)
        time.sleep(1.2)
        os.kill(pid, signal.SIGINT)
    (status,) = toy.end([process], 20)
    output = (tmp_path / "output").read_text()
    assert (status, "the last checkpoint stays" in output) == (130, True), (status, output)


def test_before_training_a_signal_ends_the_process_at_once(tmp_path):
    (process,) = toy.start(1, tmp_path, startup=60)
    while not (tmp_path / "installed_0").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    assert toy.end([process], 50) == [STOPPED]
    assert "SIGTERM: ended before training began" in (tmp_path / "output").read_text()


def test_workers_ignore_signals_and_die_with_their_owner(tmp_path):
    (process,) = toy.start(1, tmp_path, workers=1)
    (pid,) = toy.wait_for_step(tmp_path, 1, 2)
    (worker,) = toy.children(pid)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker, number)
    now = toy.steps(tmp_path, 0)[-1][0]
    toy.wait_for_step(tmp_path, 1, now + 20)
    assert toy.children(pid) == [worker]
    process.kill()
    assert toy.ends(worker, 30)


@pytest.mark.slow
def test_lightning_does_not_kill_rank_0_when_its_child_ends(tmp_path):
    options = {"devices": 2, "linger": 7, "step_seconds": 0.1}  # it looks after its children every 5 s
    command = [sys.executable, "-m", "tests.training.toy", str(tmp_path), json.dumps(options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    pids = toy.wait_for_step(tmp_path, 2, 4)
    assert pids[0] == process.pid
    os.kill(pids[1], signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == STOPPED and "Traceback" not in error, error


@pytest.mark.slow
@pytest.mark.parametrize("to_agent", [True, False], ids=["agent", "rank"])
def test_torchrun(tmp_path, to_agent):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.training.toy", str(tmp_path), "{}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    pids = toy.wait_for_step(tmp_path, 2, 4)
    os.kill(process.pid if to_agent else pids[1], signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert {(tmp_path / f"stopped_{rank}").read_text() for rank in range(2)} == {str(toy.steps(tmp_path, 0)[-1][0])}
    assert process.returncode == 1, error  # torchrun's own; its log has the ranks'
    if not to_agent:
        assert "exitcode  : 75" in error or "exitcode: 75" in error, error


def test_lightning_still_has_what_is_kept_out():
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
    from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

    assert callable(_SignalConnector.register_signal_handlers)
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert _SubprocessScriptLauncher(None, 1, 1).procs == []
