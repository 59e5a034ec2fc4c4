"""The watchdog: where nothing moves, it says what stands still on which rank, and ends the run.

It is a thread, so that it still runs where the main thread hangs in a collective or a read. Ranks know of each other
through small files in the run folder, because a collective that hangs cannot carry the news of it.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mmpretrain.distributed import barrier, rank, world_size
from mmpretrain.errors import EXIT_STALLED, InputError
from mmpretrain.training.workers import note_dead_workers, readings

DATA, STEP = "waiting for data", "running the step"
ALARM = "stalled.json"
NAMED = 8
"""Ranks named at most in one report."""
BEAT = 1.0
"""Seconds between two looks."""
GRACE = 3.0
"""Seconds a rank that found a stall waits for the others to end with the same status."""


class Watchdog(Callback):
    """Ends the run with `EXIT_STALLED` where a step, its data included, takes longer than `seconds` (None: never).

    `folder`: the run folder; `folder/heartbeats` holds a file of each rank while it trains. Put it last in the list of
    callbacks. Inside `paused` (evaluations, saves) no time counts; a rank that gives no sign of life for `seconds` is
    found there, too.
    """

    def __init__(self, seconds: float | None, folder: Path) -> None:
        if seconds is not None and not seconds > 0:
            raise InputError(f"the watchdog's limit is {seconds} seconds; give a positive number, or null for none")
        self.seconds, self.folder = seconds, folder / "heartbeats"
        self.rank = 0
        self._phase, self._step, self._moved, self._paused = DATA, 0, time.monotonic(), 0
        self._data: Any = None
        self._children: list[Any] = []
        self._seen: tuple[Any, float] = (None, 0.0)
        self._beats = 0
        self._said = ""
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start to watch."""
        self.rank, self._data = rank(), trainer.datamodule  # type: ignore[attr-defined]
        if self.seconds is None:
            return
        self._children = list(getattr(trainer.strategy.launcher, "procs", []))  # ranks that Lightning started
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        barrier()  # nobody may meet the files of a run that ended here before
        self._move(DATA, trainer.global_step)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        """The data has come."""
        self._move(STEP, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """The step is over."""
        self._move(DATA, trainer.global_step)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop watching."""
        self.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Stop watching; where another rank's watchdog ended it and a collective failed for that, end as it did."""
        note_dead_workers(exception, self._data)
        if self._thread is not None and self._alarm() is not None:
            self._thread.join(GRACE + 5 * BEAT)
        self.close()

    def close(self) -> None:
        """Stop watching and take this rank's file away."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(2 * BEAT)
        self._thread = None
        self._file(self.rank).unlink(missing_ok=True)
        with suppress(OSError):  # the last rank to leave takes the folder
            self.folder.rmdir()

    @contextmanager
    def pause(self, phase: str) -> Iterator[None]:
        """Let the clock stand still while something without a known length runs, an evaluation or a save."""
        before = self._phase
        self._paused += 1
        self._move(phase, self._step)
        try:
            yield
        finally:
            self._paused -= 1
            self._move(before, self._step)

    def _move(self, phase: str, step: int) -> None:
        self._phase, self._step, self._moved = phase, step, time.monotonic()

    # What follows runs in the watchdog's thread.

    def _watch(self) -> None:
        assert self.seconds is not None
        last = time.monotonic()
        while not self._stop.wait(min(BEAT, self.seconds / 4)):
            now = time.monotonic()
            if now - last > 5 * BEAT:  # the whole process was stopped, which is nobody's fault
                self._moved += now - last
                self._seen = (None, now)
            last = now
            if self._paused == 0 and now - self._moved > self.seconds:  # this needs no file, and no disk that answers
                self._end(self._report(f"nothing moved for {now - self._moved:.0f} s"), GRACE)
            try:
                self._beat()
                if (alarm := self._alarm()) is not None:
                    own = readings(self._data) if self._phase == DATA else []
                    self._end([f"rank {self.rank} ({self._where()}) ends, because {alarm}", *own], 0.0)
                if (lost := self._lost(now)) is not None:
                    self._end(self._report(f"rank {lost} has given no sign of life for {self.seconds:.0f} s"), GRACE)
            except OSError as error:  # a full or vanished disk is no stall, and others will speak of it
                said = f"the watchdog cannot use {self.folder}: {error}"
                if said != self._said:
                    _say([said])
                self._said = said

    def _beat(self) -> None:
        self._beats += 1
        beat = {
            "rank": self.rank,
            "where": self._where(),
            "beat": [os.getpid(), self._beats],
            "phase": self._phase,
            "step": self._step,
            "seconds": round(time.monotonic() - self._moved, 1),
            "workers": readings(self._data),
        }
        _write(self._file(self.rank), beat)

    def _alarm(self) -> str | None:
        found = _read(self.folder / ALARM)
        return None if found is None else str(found["why"])

    def _lost(self, now: float) -> int | None:
        """Look at the next rank's file: each rank watches one other, so that none reads thousands of files."""
        assert self.seconds is not None
        other = (self.rank + 1) % world_size()
        if other == self.rank:
            return None
        beat = _read(self._file(other))
        if beat is None:  # not begun, ended cleanly, or on a disk that is not shared
            self._seen = (None, now)
        elif beat["beat"] != self._seen[0]:
            self._seen = (beat["beat"], now)
        return other if self._seen[0] is not None and now - self._seen[1] > self.seconds else None

    def _report(self, what: str) -> list[str]:
        beats = list[dict[str, Any]]()
        with suppress(OSError):
            beats = [beat for beat in map(_read, self.folder.glob("rank_*.json")) if beat is not None]
        # Ranks that wait in a collective have begun the step; those they wait for have not.
        first = min(((int(beat["step"]), beat["phase"] != DATA) for beat in beats), default=None)
        behind = [beat for beat in beats if (int(beat["step"]), beat["phase"] != DATA) == first]
        lines = [f"stalled: {what} on rank {self.rank} ({self._where()})", *(f"  {x}" for x in readings(self._data))]
        if len(behind) == len(beats):
            return lines  # all stand at the same place
        for beat in sorted(behind, key=lambda beat: int(beat["rank"]))[:NAMED]:
            lines.append(f"  behind: rank {beat['rank']} ({beat['where']}), for {beat['seconds']} s")
            lines += [f"    {line}" for line in beat["workers"]]
        return lines

    def _where(self) -> str:
        return f"{socket.gethostname()}, pid {os.getpid()}, {self._phase}, last step {self._step}"

    def _end(self, lines: list[str], grace: float) -> None:
        with suppress(OSError):
            if grace:
                _write(self.folder / ALARM, {"why": f"rank {self.rank} reports: {lines[0]}"})
        _say(lines)
        if grace or self._phase == DATA:  # elsewhere it is a rank that waits for another
            faulthandler.dump_traceback(2)
        time.sleep(grace)
        for child in [*self._children, *multiprocessing.active_children()]:
            child.kill()  # a rank or worker that is stopped or hangs would outlive this process
        os._exit(EXIT_STALLED)

    def _file(self, of_rank: int) -> Path:
        return self.folder / f"rank_{of_rank}.json"


def paused(trainer: Trainer, phase: str) -> AbstractContextManager[None]:
    """Let the trainer's watchdog, if there is one, stand still while `phase` ("evaluating", "saving") lasts."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, Watchdog)]  # type: ignore[attr-defined]
    return found[0].pause(phase) if found else nullcontext()


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found


def _say(lines: list[str]) -> None:
    # Not through sys.stderr, whose lock the main thread may hold.
    os.write(2, ("mmpretrain: " + "\n".join(lines) + "\n").encode())
