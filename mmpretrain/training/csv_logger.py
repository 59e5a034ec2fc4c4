"""`metrics.csv` in the run folder: one row for each logged step, kept when a run is resumed."""

from __future__ import annotations

import csv
import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsCsv(Logger):
    """Writes `<folder>/metrics.csv`: a new step is one more line.

    The whole file is written, through a temporary one, only where a column is new, a step gets further values, or rows
    are dropped. Lightning's own CSV logger deletes what an earlier run of the same folder wrote; this one goes on with
    it, without the lines that a kill or a full disk has cut, and without rows after the step that training resumes
    from. A file that cannot be written does not end the training: rows wait in memory for the next logged step.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.rows: dict[int, dict[str, float]] = {}  # in order of steps
        self._columns: list[str] = []  # of the file
        self._sound = False  # whether the file holds the rows and no more
        self._failed = False  # whether the last writing did
        if self.path.exists():
            self._read()

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
        """Add values to the row of `step` and to the file; rows of later steps are dropped."""
        step = 0 if step is None else step
        values = {k: float(v) for k, v in metrics.items()}
        newer = not self.rows or step > next(reversed(self.rows))
        if not newer:
            self.rows = {s: row for s, row in self.rows.items() if s <= step}
        self.rows.setdefault(step, {}).update(values)
        append = newer and self._sound and values.keys() <= set(self._columns)
        self._sound = False  # until it is written
        try:
            if append:
                self._append(step)
            else:
                self._write()
        except OSError as error:
            if not self._failed:
                said = f"{self.path} cannot be written ({error.strerror}); training goes on, the next step tries again"
                print(f"mmpretrain: warning: {said}", file=sys.stderr)
            self._failed = True
        else:
            self._sound, self._failed = True, False

    def _append(self, step: int) -> None:
        line = io.StringIO()
        csv.DictWriter(line, self._columns).writerow({"step": step, **self.rows[step]})
        with self.path.open("r+", newline="", encoding="utf-8") as file:  # a file that is gone is no place for a line
            file.seek(0, io.SEEK_END)
            file.write(line.getvalue())

    def _write(self) -> None:
        self._columns = ["step", *dict.fromkeys(k for row in self.rows.values() for k in row)]
        temporary = self.path.with_suffix(".csv.tmp")
        try:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows({"step": s, **row} for s, row in self.rows.items())
            temporary.replace(self.path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _read(self) -> None:
        """Take over the rows of the file; a line that was cut, or that is none of numbers, is dropped."""
        text = self.path.read_bytes().decode(errors="replace")
        whole = text[: text.rfind("\n") + 1]
        header, *lines = whole.splitlines() or [""]
        self._columns = next(csv.reader([header]), [])
        found = {}
        for line in lines:
            with suppress(ValueError, KeyError, csv.Error):
                values = dict(zip(self._columns, next(csv.reader([line]), []), strict=True))
                found[int(values["step"])] = {k: float(v) for k, v in values.items() if v and k != "step"}
        self.rows = dict(sorted(found.items()))
        in_order = list(found) == list(self.rows) and len(found) == len(lines)
        self._sound = whole == text and in_order and "step" in self._columns
