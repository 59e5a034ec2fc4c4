"""Memory over 20,000 samples with damage in them, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_memory_stays_flat_over_20_000_samples_with_damage_in_them() -> None:
    command = [sys.executable, "-m", "tests.faults.memory", "--trials", "1", "--samples", "20000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
