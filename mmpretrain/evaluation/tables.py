"""What a suite measured as JSON, and as a CSV of one row for each number."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmpretrain.evaluation.results import Measured

FORMAT = 1
_SIBLINGS = ("ci_low", "ci_high", "chance")


class Row(NamedTuple):
    """One number: the model, what was measured on which data set, its 95 % interval and chance level where known."""

    model: str
    run: str | None
    step: int | None
    identity: str
    data_set: str
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    chance: float | None


def rows_of(measured: Sequence[Measured]) -> list[Row]:
    """List every number, each metric with its siblings `/ci_low`, `/ci_high` and `/chance` in one row."""
    rows = []
    for candidate, work, metrics in measured:
        about = (candidate.name, candidate.run, candidate.step, candidate.identity, work.data_set, work.task)
        for name, value in metrics.items():
            parent, _, last = name.rpartition("/")
            if last in _SIBLINGS and parent in metrics:
                continue
            low, high, chance = (metrics.get(f"{name}/{sibling}") for sibling in _SIBLINGS)
            rows.append(Row(*about, name, value, low, high, chance))
    return rows


def csv_text(rows: Sequence[Row]) -> str:
    """Write rows as CSV under a line of column names; what is not known is left empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return file.getvalue()


def json_text(benchmark: str, measured: Sequence[Measured]) -> str:
    """Write the metrics of each model, flat as one evaluation gives them: `<data set>/<task>/<metric>`."""
    models: dict[str, dict[str, Any]] = {}
    for candidate, work, metrics in measured:
        about = {"run": candidate.run, "step": candidate.step, "identity": candidate.identity}
        model = models.setdefault(candidate.name, {"name": candidate.name, **about, "metrics": {}})
        model["metrics"] |= flat(work.data_set, work.task, metrics)
    document = {"format": FORMAT, "benchmark": benchmark, "models": list(models.values())}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def flat(data_set: str, task: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Put data set and task before the name of each metric."""
    return {"/".join(filter(None, (data_set, task, name))): value for name, value in metrics.items()}
