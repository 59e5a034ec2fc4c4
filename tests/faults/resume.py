"""Kill a run with SIGKILL at random steps, resume it with other workers and ranks, compare it with one never killed.

`python -m tests.faults.resume [--trials 50] [--seed 0]`
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from tests.faults.launch import start
from tests.shard_sets import OVERRIDES, write_pictures

STEPS, EVERY, BATCH = 30, 4, 8
PATIENCE = 180.0  # seconds for a run of STEPS steps on a busy machine


class Trial(NamedTuple):
    """What is done to one run: (workers, ranks) before and after the kill, and the step it comes at."""

    workers: tuple[int, int]
    ranks: tuple[int, int]
    step: int
    delay: float  # seconds into the step

    @property
    def drop(self) -> float:
        """Share of patches dropped at random: each rank draws its own, so other ranks are another run."""
        return 0.5 if self.ranks == (1, 1) else 0.0


class Verdict(NamedTuple):
    """How the resumed run compares with the whole one."""

    killed_at: int  # lines of the sample log at the kill
    samples: bool
    losses: bool
    weights: bool
    exact: bool  # compared bit for bit, because every part ran on one rank

    @property
    def holds(self) -> bool:
        """Whether all of it is the same."""
        return self.samples and self.losses and self.weights


def command(shards: Path, folder: Path, workers: int, drop: float) -> list[str]:
    """Return the arguments of a small run that has everything a resume must bring back."""
    return [
        "train",
        *OVERRIDES,
        f"data.train={shards}",
        "evaluators=none",
        "report=false",
        f"run_dir={folder}",
        f"data.num_workers={workers}",
        f"data.global_batch_size={BATCH}",
        f"trainer.max_steps={STEPS}",
        f"callbacks.checkpoint_every_n_steps={EVERY}",
        "callbacks.ema.decay=0.9",
        "scheduler.warmup_steps=5",
        f"model.encoders.image.model_args.patch_drop_rate={drop}",
        "data.image_size=32",
        "model.encoders.image.model_args.img_size=32",
        "debug.sample_log=true",
    ]


def for_ranks(ranks: int) -> list[str]:
    """Return the overrides that make a run one of several ranks."""
    if ranks == 1:
        return []
    same = ["trainer.precision=32-true", f"trainer.max_steps={STEPS}"]
    return ["trainer=ddp_cpu", f"trainer.devices={ranks}", *same]


def run_trial(shards: Path, wholes: Mapping[float, Path], folder: Path, trial: Trial) -> Verdict:
    """Start a run, kill it, resume it to its end, and compare it with the whole one of the same patch dropout."""
    whole = wholes[trial.drop]
    first = [*command(shards, folder, trial.workers[0], trial.drop), *for_ranks(trial.ranks[0])]
    run = start(trial.ranks[0], first, folder.with_name(f"{folder.name}.first.log"))
    until = time.monotonic() + PATIENCE
    while lines(folder) < trial.step and run.running():
        if time.monotonic() > until:
            run.kill()
            raise AssertionError(f"{trial}: no step {trial.step} in {PATIENCE:.0f} s\n{run.output()}")
        time.sleep(0.002)
    time.sleep(trial.delay)
    run.kill()
    killed_at = lines(folder)
    second = [*command(shards, folder, trial.workers[1], trial.drop), *for_ranks(trial.ranks[1]), "resume=auto"]
    run = start(trial.ranks[1], second, folder.with_name(f"{folder.name}.second.log"))
    statuses = run.wait(PATIENCE)
    if any(statuses) and not (folder / "model").exists():
        run.kill()
        raise AssertionError(f"{trial}: the resumed run ended with {statuses}\n{run.output()}")
    exact = trial.ranks == (1, 1)
    return Verdict(
        killed_at,
        same_samples(whole, folder),
        same_losses(whole, folder, exact),
        same_weights(whole, folder, exact),
        exact,
    )


def lines(folder: Path) -> int:
    """Count the steps in a run's sample log."""
    path = folder / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same_samples(a: Path, b: Path) -> bool:
    """Compare the sample logs, byte for byte."""
    ours, theirs = ((folder / "samples.jsonl").read_bytes() for folder in (a, b))
    return ours == theirs and ours.count(b"\n") == STEPS


def same_losses(a: Path, b: Path, exact: bool) -> bool:
    """Compare the loss at every step."""
    ours, theirs = (losses(folder) for folder in (a, b))
    if list(ours) != list(theirs) or list(ours) != list(range(1, STEPS + 1)):
        return False
    if exact:
        return ours == theirs
    return all(abs(float(ours[s]) - float(theirs[s])) <= 2e-4 * abs(float(ours[s])) for s in ours)


def losses(folder: Path) -> dict[int, str]:
    """Read step -> loss as it was written."""
    text = (folder / "metrics.csv").read_text()
    return {int(row["step"]): row["loss/total"] for row in csv.DictReader(io.StringIO(text)) if row["loss/total"]}


def same_weights(a: Path, b: Path, exact: bool) -> bool:
    """Compare the final weights (those of the moving average, which the model folder holds)."""
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    if ours.keys() != theirs.keys():
        return False
    if exact:
        return all(torch.equal(ours[name], theirs[name]) for name in ours)
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4) for name in ours)


def trials(count: int, seed: int) -> list[Trial]:
    """Draw trials; every number of workers and of ranks comes up."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        ranks = ((1, 1), (1, 1), (2, 1), (1, 2), (4, 2), (2, 2), (1, 4), (4, 4), (4, 1), (2, 4))[i % 10]
        workers = (draw.randint(0, 4), i % 5)
        if max(ranks) == 4:  # 4 ranks of 4 workers each would be 20 processes on the two cores of a laptop
            workers = (min(1, workers[0]), min(2, workers[1]))
        found.append(Trial(workers, ranks, draw.randint(1, STEPS - 1), draw.random() * 0.05))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials and print a table; exit status 1 if any does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    good = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shards = write_pictures(root / "shards")
        wholes = finish_wholes(shards, root)
        print("trial  workers  ranks   killed at  samples  losses  weights  compared")
        for i, trial in enumerate(trials(args.trials, args.seed)):
            verdict = run_trial(shards, wholes, root / f"run{i}", trial)
            good += verdict.holds
            words = [("same" if part else "OTHER") for part in (verdict.samples, verdict.losses, verdict.weights)]
            print(
                f"{i:5}  {trial.workers[0]} -> {trial.workers[1]}   {trial.ranks[0]} -> {trial.ranks[1]}  "
                f"{verdict.killed_at:9}  {words[0]:7}  {words[1]:6}  {words[2]:7}  "
                f"{'bit for bit' if verdict.exact else 'to tolerance, samples exactly'}",
                flush=True,
            )
    print(f"{good} of {args.trials} resumed runs are the run that was never killed")
    return int(good != args.trials)


def finish_wholes(shards: Path, root: Path) -> dict[float, Path]:
    """Make the runs that nothing kills, with patch dropout and without."""
    folders = {drop: root / f"whole_{drop}" for drop in (0.0, 0.5)}
    for drop, folder in folders.items():
        run = start(1, command(shards, folder, 0, drop), folder.with_name(f"{folder.name}.log"))
        if run.wait(PATIENCE) != [0]:
            run.kill()
            raise AssertionError(f"the whole run failed\n{run.output()}")
    return folders


if __name__ == "__main__":
    raise SystemExit(main())
