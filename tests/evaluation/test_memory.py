"""What the evaluators take beside the embeddings hardly grows with their number, measured in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import normalize

from mmpretrain.evaluation.choice import own_similarities
from mmpretrain.evaluation.knn import nearest
from mmpretrain.evaluation.multi_label import _order
from mmpretrain.evaluation.retrieval import rank_of_best
from mmpretrain.evaluation.zero_shot import class_hits

MB = 2**20
CHUNK = 256


def neighbours(rows: torch.Tensor) -> None:
    for chunk in torch.split(rows[: 8 * CHUNK], CHUNK):  # the others would be as these
        nearest(chunk, rows, 20)


def hits(rows: torch.Tensor) -> None:
    class_hits(rows, rows[:100], torch.arange(len(rows)) % 100, (1,))


WORK: dict[str, Callable[[torch.Tensor], object]] = {
    "retrieval": lambda rows: rank_of_best(rows[: 8 * CHUNK], rows, [[i] for i in range(8 * CHUNK)][: len(rows)]),
    "neighbours": neighbours,
    "classes": hits,
    "choice": lambda rows: own_similarities(rows, rows, torch.ones(len(rows), dtype=torch.int64)),
    "multi_label": lambda rows: _order(rows, rows[0], rows[:, 0] > 0),
}


def measure() -> dict[str, list[float]]:
    """For each function the MB by which the peak of this process grew at 1,000, 20,000 and 100,000 rows."""
    torch.set_num_threads(1)
    grown: dict[str, list[float]] = {}
    for name, run in WORK.items():
        run(normalize(torch.randn(100, 8), dim=-1))  # what is loaded on first use is no growth
        grown[name] = []
        for count in (1_000, 20_000, 100_000):
            rows = normalize(torch.randn(count, 8), dim=-1)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            run(rows)
            grown[name].append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / MB)
    return grown


def test_memory_is_flat_from_1000_to_100000_embeddings() -> None:
    code = "import json; from tests.evaluation.test_memory import measure; print(json.dumps(measure()))"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True, timeout=120
    )
    grown = json.loads(done.stdout.splitlines()[-1])
    assert set(grown) == set(WORK)
    # A matrix of 20,000 x 20,000 similarities has 1,526 MB; two tiles and what the allocator keeps are under 100.
    for name, sizes in grown.items():
        assert max(sizes) < 192, (name, sizes)
