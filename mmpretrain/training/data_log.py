"""What was read and what was lost: `samples.jsonl` and `data_events.jsonl` in the run folder."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mmpretrain.data.datamodule import DataModule
from mmpretrain.data.events import CAUSES, DataEvent
from mmpretrain.data.fingerprint import check_ranks, fingerprint
from mmpretrain.data.redact import redact, redact_text
from mmpretrain.data.step import Step
from mmpretrain.distributed import gather_objects
from mmpretrain.errors import LimitReached

DETAIL = 300
"""Characters kept of an event's detail."""
REMEMBERED = 1_000_000
"""Lost samples remembered so that each has one line; past that, later epochs may list them again."""


class DataLog(Callback):
    """Write every loss of data to `data_events.jsonl` and, with `sample_log`, every step's ids to `samples.jsonl`.

    A sample that is lost has one line, at the step it was first met; what was lost when shards were indexed stands at
    step 0. Ids are the global batch in order, one source after the other. Ranks are asked for what they saw every
    `every_n_steps` (each step with `sample_log`), at every multiple of one of `saves`, and at the end, so give the
    intervals of checkpoints as `saves`, put this callback before the one that saves, and call `flush` before any other
    save: then a run that was killed and resumed ends with the files of one that never was. Raises `LimitReached`, on
    all ranks at the same step, when more rows are lost than the data module's `max_bad_fraction` and chance explain.
    """

    def __init__(
        self, folder: str | Path, sample_log: bool = False, every_n_steps: int = 10, saves: Sequence[int] = ()
    ) -> None:
        self.events, self.samples = Path(folder) / "data_events.jsonl", Path(folder) / "samples.jsonl"
        self._event_file, self._sample_file = _Pending(self.events), _Pending(self.samples)
        self.sample_log = sample_log
        self.intervals = [1] if sample_log else [n for n in (every_n_steps, *saves) if n > 0]
        self.rows = 0  # of all ranks and sources, as far as the ranks were asked
        self.bad: Counter[str] = Counter()  # rows lost, by cause
        self.lost: Counter[str] = Counter()  # samples lost, by cause; rank 0 only
        self._seen: set[int] = set()
        self._started = False
        self._order: dict[str, Any] = {}
        self._clear()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Drop the lines of steps that will be done again, and list what the indexes know to be lost."""
        self._started = True
        check_ranks(_data(trainer))
        self._order = fingerprint(_data(trainer))
        if not trainer.is_global_zero:
            return
        known = [_line(0, name, event) for name, found in _data(trainer).known_events().items() for event in found]
        kept = [line for line in _lines_until(self.events, trainer.global_step) if line["step"] > 0]
        _replace(self.events, [*known, *kept])
        for line in (*known, *kept):
            self._count(line)
        if self.samples.exists():
            _replace(self.samples, _lines_until(self.samples, trainer.global_step))

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Step, index: int
    ) -> None:
        """Keep the step's trace, and where it is time ask all ranks for theirs."""
        step = trainer.global_step
        trace = batch.trace
        self._rows += sum(map(len, trace.ids.values()))
        if self.sample_log:
            self._ids = trace.ids
        for number, (source, events) in enumerate(trace.events.items()):
            self._events += [[number, _line(step, source, event)] for event in events]
        if step == trainer.max_steps or any(step % interval == 0 for interval in self.intervals):
            self.flush(trainer)
            self.check(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write what is left where a run ends before its last step."""
        self.flush(trainer)

    def flush(self, trainer: Trainer) -> None:
        """Ask all ranks for what they saw since the last time, and write it; every rank must call it."""
        ranks = gather_objects({"rows": self._rows, "ids": self._ids, "events": self._events})
        self._clear()
        self.rows += sum(found["rows"] for found in ranks)
        # Ranks hold consecutive rows, so that this is the order of the rows in the batch for any number of ranks.
        numbered = sorted(
            (event for found in ranks for event in found["events"]), key=lambda event: (event[1]["step"], event[0])
        )
        lines = [line for _, line in numbered]
        self.bad.update(line["cause"] for line in lines)
        if not trainer.is_global_zero:
            return
        self._event_file.append([line for line in lines if self._count(line)])
        if ranks[0]["ids"]:
            ids = [name for source in ranks[0]["ids"] for found in ranks for name in found["ids"][source]]
            self._sample_file.append([{"step": trainer.global_step, "ids": ids}])

    def note(self, step: int, event: dict[str, Any]) -> None:
        """Write down what else happened at a step (a skipped one, say); called on rank 0 alone."""
        self._event_file.append([{"step": step, **event}])

    def check(self, trainer: Trainer) -> None:
        """Raise `LimitReached` where too many of the rows so far were lost."""
        limit, bad = _data(trainer).max_bad_fraction, self.bad.total()
        if too_many(bad, self.rows, limit):
            causes = ", ".join(f"{cause} {count}" for cause, count in sorted(self.bad.items()))
            raise LimitReached(
                f"stopped at step {trainer.global_step}: {bad} of the {self.rows} samples read so far were lost "
                f"({causes}), more than data.max_bad_fraction={limit:g} allows; {self.events} lists them: repair the "
                "shards, or raise data.max_bad_fraction"
            )

    def totals(self) -> dict[str, float]:
        """Return the samples lost by cause, and the share of rows lost in training, for the summary (on rank 0)."""
        if not self._started:  # resumed at the last step, where no training starts and only the file knows
            self._started = True
            for line in _lines_until(self.events, None):
                self._count(line)
        counts = {f"data/lost/{cause}": float(self.lost[cause]) for cause in CAUSES if self.lost[cause]}
        fraction = self.bad.total() / self.rows if self.rows else 0.0
        total = float(self.lost.total() - self.lost["duplicate"])  # of a doubled member the first is delivered
        return {**counts, "data/lost/total": total, "data/bad_fraction": fraction}

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the order of samples, and the counts of rows; those of samples are in the file."""
        return {"order": self._order, "rows": self.rows, **{f"bad/{cause}": count for cause, count in self.bad.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where a run was resumed; a rollback inside a run changes nothing, as the data goes on."""
        if not self._started:
            self.rows = state_dict["rows"]
            self.bad = Counter({k.removeprefix("bad/"): n for k, n in state_dict.items() if k.startswith("bad/")})

    def _clear(self) -> None:
        self._rows, self._ids, self._events = 0, dict[str, list[str]](), list[list[Any]]()

    def _count(self, line: dict[str, Any]) -> bool:
        """Count the loss that a line tells of; False where it has been counted before."""
        if "shard" not in line:  # what `note` wrote
            return True
        name = hash(tuple(line[part] for part in ("source", "shard", "offset", "key", "cause")))
        if name in self._seen:
            return False
        if len(self._seen) < REMEMBERED:
            self._seen.add(name)
        self.lost[line["cause"]] += 1
        return True


def too_many(bad: int, rows: int, fraction: float) -> bool:
    """Say whether `bad` of `rows` is more than `fraction` and chance explain: four standard deviations above it."""
    expected = fraction * rows
    return bad > expected + 4 * math.sqrt(expected)


def _data(trainer: Trainer) -> DataModule:
    data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data


def _line(step: int, source: str, event: DataEvent) -> dict[str, Any]:
    shown = event._replace(shard=redact(event.shard), detail=redact_text(event.detail)[:DETAIL])
    return {"step": step, "source": source, **shown._asdict()}


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    if lines:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


class _Pending:
    """Appends lines to a file; where the system refuses (a full disk), says so once and tries again with the next."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, list[dict[str, Any]]()

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Add lines, after those that could not be written before."""
        waiting, self.lines = self.lines, [*self.lines, *lines]
        if not self.lines:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            _append(self.path, self.lines)
            self.lines = []
        except OSError as error:
            with suppress(OSError):  # half a line is worse than none
                os.truncate(self.path, size)
            if not waiting:
                print(f"{self.path} cannot be written ({error.strerror}); its lines wait in memory", file=sys.stderr)


def _lines_until(path: Path, step: int | None) -> list[dict[str, Any]]:
    """Read the lines of steps up to `step` (None: all); a killed run may leave a torn one, which is later than that."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = [line for line in map(_parsed, file) if line is not None]
    return [line for line in lines if step is None or line["step"] <= step]


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    return value


def _replace(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    _append(temporary, list(lines))
    temporary.replace(path)
