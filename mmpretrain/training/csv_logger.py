"""`metrics.csv` in the run folder: one row for each logged step, kept when a run is resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsCsv(Logger):
    """Writes `<folder>/metrics.csv` whole at each logged step, through a temporary file.

    Lightning's own CSV logger deletes what an earlier run of the same folder wrote; this one goes on with it, dropping
    only rows after the step that training resumes from.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.rows: dict[int, dict[str, float]] = {}
        if self.path.exists():
            with self.path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self.rows[int(row["step"])] = {k: float(v) for k, v in row.items() if v and k != "step"}

    @property
    def name(self) -> str:
        """Name of this logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Version of this logger's output; the run folder already is one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Leave hyper-parameters to `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Add values to the row of `step` and write the file."""
        step = 0 if step is None else step
        self.rows = {s: row for s, row in self.rows.items() if s <= step}
        self.rows.setdefault(step, {}).update({k: float(v) for k, v in metrics.items()})
        columns = ["step", *dict.fromkeys(k for row in self.rows.values() for k in row)]
        temporary = self.path.with_suffix(".csv.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({"step": s, **row} for s, row in self.rows.items())
        temporary.replace(self.path)
