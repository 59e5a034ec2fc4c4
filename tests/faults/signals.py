"""Signal one random rank of a real run at random moments: every rank must end cleanly, at the same step, with 75.

`python -m tests.faults.signals [--trials 100] [--seed 0]`: ranks that find each other as those of torchrun do, started
from a fork server; the last trials go through `mmpretrain train trainer.devices=2` and through torchrun itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.faults.launch import Ranks, start
from tests.shard_sets import OVERRIDES, write_pictures

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WITHIN = 10.0
"""Seconds from the signal to the end of the last rank."""
PATIENCE = 180.0  # seconds for a run to begin, and to end, on a busy machine
STOPPED_AT = re.compile(r"stopped at step (\d+) of")


class Trial(NamedTuple):
    """What is sent to which rank, when: after `step` and so many seconds."""

    ranks: int
    workers: int
    target: int
    number: signal.Signals
    step: int
    delay: float


class Verdict(NamedTuple):
    """How the run ended. `seconds`: from the signal to the last rank's end."""

    statuses: list[int | None]
    seconds: float
    signalled_at: int
    stopped_at: int | None
    saved_at: int | None
    traceback: bool

    @property
    def holds(self) -> bool:
        """Whether it was a clean end in time that cost no finished step."""
        return self.clean and self.seconds <= WITHIN

    @property
    def clean(self) -> bool:
        """The same without the clock, which on a busy machine says nothing of the run."""
        return (
            all(status == 75 for status in self.statuses)
            and not self.traceback
            and self.stopped_at is not None
            and self.saved_at == self.stopped_at
            # The step under way ends, and the next carries the vote; the log may be read a step late.
            and 0 <= self.stopped_at - self.signalled_at <= 3
        )


def command(shards: Path, folder: Path, ranks: int, workers: int) -> list[str]:
    """Return the arguments of a run that would go on for ever."""
    return [
        "train",
        *OVERRIDES,
        *([] if ranks == 1 else ["trainer=ddp_cpu", f"trainer.devices={ranks}"]),
        "trainer.max_steps=1000000",
        f"data.train={shards}",
        "evaluators=none",
        "report=false",
        f"run_dir={folder}",
        f"data.num_workers={workers}",
        "debug.sample_log=true",
        "callbacks.log_every_n_steps=10",
        "callbacks.checkpoint_every_n_steps=0",
    ]


def last_step(folder: Path) -> int:
    """Count the steps in a run's sample log."""
    path = folder / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved_step(folder: Path) -> int | None:
    """Return the step of the checkpoint that `latest` names."""
    manifest = folder / "checkpoints" / "latest" / "manifest.json"
    return int(json.loads(manifest.read_text())["step"]) if manifest.exists() else None


def wait_for_step(folder: Path, step: int, log: Path, running: Callable[[], bool]) -> None:
    """Wait until a run has done so many steps; raises AssertionError where it does not."""
    until = time.monotonic() + PATIENCE
    while last_step(folder) < step:
        going = running() and time.monotonic() < until
        assert going, log.read_text(errors="replace") if log.exists() else "nothing was printed"
        time.sleep(0.01)


def run_trial(shards: Path, folder: Path, trial: Trial) -> Verdict:
    """Run until the step, send the signal, and see how every rank ends."""
    log = folder.with_name(f"{folder.name}.log")
    run: Ranks = start(trial.ranks, command(shards, folder, trial.ranks, trial.workers), log)
    try:
        wait_for_step(folder, trial.step, log, run.running)
        time.sleep(trial.delay)
        pid = run.processes[trial.target].pid
        assert pid is not None
        signalled_at, sent = last_step(folder), time.monotonic()
        os.kill(pid, trial.number)
        while any(process.is_alive() for process in run.processes) and time.monotonic() < sent + PATIENCE:
            time.sleep(0.01)
        seconds = time.monotonic() - sent
        statuses = run.wait(0)
    finally:
        run.kill()
    return judge(folder, log.read_text(errors="replace"), statuses, seconds, signalled_at)


def judge(folder: Path, output: str, statuses: list[int | None], seconds: float, signalled_at: int) -> Verdict:
    """Compare what a run printed and left behind."""
    found = {int(step) for step in STOPPED_AT.findall(output)}
    stopped_at = found.pop() if len(found) == 1 else None
    return Verdict(statuses, seconds, signalled_at, stopped_at, saved_step(folder), "Traceback" in output)


LAUNCHERS = {
    "lightning": [sys.executable, "-m", "mmpretrain"],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "mmpretrain",
    ],
}


def run_launched(shards: Path, folder: Path, launcher: str, target: int, number: signal.Signals) -> Verdict:
    """The same through a launcher that starts and watches the ranks; torchrun turns their 75 into its own 1."""
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [*LAUNCHERS[launcher], *command(shards, folder, 2, 0)],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for_step(folder, 5, log, lambda: process.poll() is None)
        ranks = _ranks(process.pid, launcher)
        signalled_at, sent = last_step(folder), time.monotonic()
        os.kill(ranks[target], number)
        status = process.wait(PATIENCE)
        seconds = time.monotonic() - sent
    finally:
        process.kill()
        process.wait()
    output = log.read_text(errors="replace")
    if launcher == "torchrun":
        codes = [int(code) for code in re.findall(r"exitcode\s*: (\d+)", output)]
        status = 75 if status == 1 and codes and set(codes) == {75} else status
        output = output.replace("Traceback (most recent call last)", "", 1)  # torchrun's own, for any status but 0
    return judge(folder, output, [status], seconds, signalled_at)


def _ranks(launcher_pid: int, launcher: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            environment = path.with_name("environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile
            continue
        rank = next((int(v[11:]) for v in environment if v.startswith(b"LOCAL_RANK=")), None)
        if parent == launcher_pid and rank is not None:
            found.append((rank, int(path.parent.name)))
    children = [pid for _, pid in sorted(found)]
    return children if launcher == "torchrun" else [launcher_pid, *children]


def trials(count: int, seed: int) -> list[Trial]:
    """Draw trials: two and four ranks in turn, any rank, any signal, any moment."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        ranks = (2, 4)[index % 2]
        workers = draw.choice([0, 0, 1])
        target, number = draw.randrange(ranks), draw.choice(SIGNALS)
        made.append(Trial(ranks, workers, target, number, draw.randint(1, 12), draw.random() * 0.2))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials, print a table; returns 1 if one did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as scratch:
        shards = write_pictures(Path(scratch) / "shards")
        for index, trial in enumerate(trials(options.trials, options.seed)):
            folder = Path(scratch) / f"run_{index}"
            verdict = run_trial(shards, folder, trial)
            verdicts.append(verdict)
            if not verdict.holds:
                print(folder.with_name(f"{folder.name}.log").read_text(errors="replace")[-4000:])
            _row(f"{trial.number.name} to rank {trial.target} of {trial.ranks}, {trial.workers} workers", verdict)
        for index, launcher in enumerate(LAUNCHERS):
            for target, number in ((0, SIGNALS[0]), (1, SIGNALS[index])):
                folder = Path(scratch) / f"{launcher}_{target}"
                verdict = run_launched(shards, folder, launcher, target, number)
                verdicts.append(verdict)
                if not verdict.holds:
                    print(folder.with_name(f"{folder.name}.log").read_text(errors="replace")[-4000:])
                _row(f"{number.name} to rank {target} of 2, {launcher}", verdict)
    clean = sum(verdict.holds for verdict in verdicts)
    slowest = max(verdict.seconds for verdict in verdicts)
    steps = [v.stopped_at - v.signalled_at for v in verdicts if v.stopped_at is not None]
    print(f"{clean} of {len(verdicts)} clean; slowest {slowest:.1f} s; at most {max(steps, default=0)} steps after it")
    return 0 if clean == len(verdicts) else 1


def _row(name: str, v: Verdict) -> None:
    words = "clean" if v.holds else f"NOT CLEAN {v}"
    print(f"{name:45} step {v.signalled_at:4} -> {v.stopped_at} in {v.seconds:4.1f} s  {words}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
