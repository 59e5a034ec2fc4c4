"""Five kills in the default run; `python -m tests.faults.resume` does fifty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.resume import Trial, finish_wholes, run_trial


@pytest.fixture(scope="module")
def wholes(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    return finish_wholes(shards, tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "trial",
    [
        Trial((0, 0), (1, 1), 1, 0.0),
        Trial((2, 1), (1, 1), 13, 0.01),
        Trial((1, 4), (1, 1), 24, 0.03),
        Trial((0, 1), (2, 1), 9, 0.0),
        Trial((1, 0), (1, 4), 17, 0.02),
    ],
    ids=str,
)
def test_a_killed_run_becomes_the_run_that_was_never_killed(trial, wholes, shards, tmp_path):
    verdict = run_trial(shards, wholes, tmp_path / "run", trial)
    assert verdict.holds, verdict
