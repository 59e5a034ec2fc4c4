"""No hostile input runs code, hangs or takes more than 1 GiB; each ends in a counted event or a clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.faults.hostile import MEMORY, SECONDS, cases

NAMES = [case.name for case in cases()]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Any]:
    """Run all of ours in one process that forks: this one has threads."""
    path = tmp_path_factory.mktemp("hostile") / "outcomes.json"
    command = [sys.executable, "-m", "tests.faults.hostile", "--json", str(path)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=600)
    return dict(json.loads(path.read_text()))


def test_the_corpus_is_as_large_as_promised():
    assert len(NAMES) == len(set(NAMES)) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_input_does_no_harm(name, outcomes):
    held, kind, detail, seconds, mebibytes = outcomes[name]
    assert held, (kind, detail)
    assert seconds < SECONDS and mebibytes << 20 < MEMORY
