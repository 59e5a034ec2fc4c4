"""Three signals in the default run; `python -m tests.faults.signals` sends a hundred."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.signals import Trial, run_launched, run_trial


@pytest.mark.parametrize(
    "trial",
    [Trial(2, 1, 1, signal.SIGTERM, 3, 0.0), Trial(2, 0, 0, signal.SIGINT, 1, 0.05)],
    ids=str,
)
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(trial, shards: Path, tmp_path: Path):
    verdict = run_trial(shards, tmp_path / "run", trial)
    assert verdict.clean, (verdict, (tmp_path / "run.log").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_launchers(launcher, shards: Path, tmp_path: Path):
    verdict = run_launched(shards, tmp_path / "run", launcher, 1, signal.SIGUSR1)
    assert verdict.clean, (verdict, (tmp_path / "run.log").read_text())
