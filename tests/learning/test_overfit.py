"""The smallest proof that model, losses and data fit together: 64 samples can be learned by heart."""

from __future__ import annotations

import csv

import pytest

from mmpretrain.cli import main

pytestmark = pytest.mark.learning


@pytest.mark.filterwarnings("default")
def test_the_demo_learns_64_samples_by_heart(tmp_path):
    assert main(["train", "debug=overfit", f"run_dir={tmp_path / 'run'}", "report=false"]) == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss/total"]) for row in csv.DictReader(file)]
    assert losses[0] > 1 and losses[-1] < 0.05
