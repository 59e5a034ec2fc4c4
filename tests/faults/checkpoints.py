"""Kill saves at random moments, flip bytes in every file, fill the disk: a loadable checkpoint always remains.

`python -m tests.faults.checkpoints [--trials 200] [--seed 0]`
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmpretrain.training.checkpoint import load, newest, save
from mmpretrain.training.folder import step_of
from mmpretrain.training.manifest import DamagedCheckpoint

multiprocessing.set_forkserver_preload(["tests.preload"])
MEGABYTE = 1 << 20


def state(step: int, size: int = MEGABYTE // 4) -> dict[str, Any]:
    """A training state that is decided by its step: `size` numbers in two tensors, and some JSON."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.rand(size // 2, generator=generator)
    optimizer = {"state": {0: {"exp_avg": weight.flip(0), "step": torch.tensor(float(step))}}, "betas": (0.9, 0.98)}
    return {"state_dict": {"model.weight": weight}, "optimizer_states": [optimizer], "global_step": step}


def is_whole(path: Path, size: int = MEGABYTE // 4) -> bool:
    """Say whether a checkpoint loads and holds exactly the state of its step."""
    got, want = load(path), state(step_of(path), size)
    weights = torch.equal(got["state_dict"]["model.weight"], want["state_dict"]["model.weight"])
    mine, other = got["optimizer_states"][0], want["optimizer_states"][0]
    moments = all(torch.equal(mine["state"][0][key], other["state"][0][key]) for key in other["state"][0])
    return weights and moments and mine["betas"] == other["betas"] and got["global_step"] == want["global_step"]


def _save_for_ever(folder: str, first: int, saved: Any) -> None:
    step = first
    while True:
        save(Path(folder), state(step), step)
        saved.value = step
        step += 1


def kills(trials: int, seed: int, folder: Path) -> dict[str, int]:
    """Kill a process that saves again and again; count what was left."""
    context, chance = multiprocessing.get_context("forkserver"), random.Random(seed)
    counts = {"kills": 0, "loadable": 0, "whole": 0, "nothing promised was lost": 0, "left-overs met": 0, "saves": 0}
    promised = -1
    for _ in range(trials):
        saved = context.Value("q", promised, lock=False)
        process = context.Process(target=_save_for_ever, args=(str(folder), promised + 1, saved))
        process.start()
        while saved.value == promised and process.is_alive():  # it has come up, and saved once
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.join()
        counts["saves"] += saved.value - promised
        promised = saved.value
        found = newest(folder).path
        counts["kills"] += 1
        counts["left-overs met"] += any(folder.glob(".step_*"))
        if found is not None:
            counts["loadable"] += 1
            counts["whole"] += is_whole(found)
            counts["nothing promised was lost"] += step_of(found) >= promised
            promised = max(promised, step_of(found))
    return counts


def _flip(data: bytes, position: int, chance: random.Random) -> bytes:
    return data[:position] + bytes([data[position] ^ chance.randrange(1, 256)]) + data[position + 1 :]


def damages(trials: int, seed: int, folder: Path) -> dict[str, tuple[int, int, int]]:
    """Damage each file of a checkpoint in `trials` ways; file -> (done, refused with its name, previous one taken)."""
    chance = random.Random(seed)
    for step in (1, 2):
        save(folder, state(step, 4096), step)
    previous, last = folder / "step_00000001", folder / "step_00000002"
    counts = {}
    for path in sorted(last.iterdir()):
        whole = path.read_bytes()
        ways = [_flip(whole, chance.randrange(len(whole)), chance) for _ in range(trials)]
        ways += [whole[: chance.randrange(len(whole))], whole + b"\0", b"", None]
        refused = taken = 0
        for way in ways:
            path.unlink() if way is None else path.write_bytes(way)
            try:
                load(last)
            except DamagedCheckpoint as error:
                refused += path.name in str(error)
            found = newest(folder)
            taken += found.path == previous and len(found.refused) == 1 and path.name in found.refused[0]
        path.write_bytes(whole)
        counts[path.name] = (len(ways), refused, taken)
    assert newest(folder).path == last
    return counts


@contextmanager
def small_disk(size: int) -> Iterator[Path | None]:
    """A file system of `size` bytes, or None where this process may not mount one."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
        try:
            yield Path(folder) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path, leave: int = 0) -> None:
    """Write zeros into a file until `leave` bytes are free, or none."""
    with path.open("ab", buffering=0) as file:
        try:
            while (free := shutil.disk_usage(path.parent).free) > leave:
                file.write(bytes(min(64 << 10, free - leave)))
        except OSError:
            pass


def full_disk(trials: int, seed: int, disk: Path) -> dict[str, int]:
    """Save to a disk that is full, fills up during the save, or lacks the last pages; then with room again."""
    chance, numbers = random.Random(seed), MEGABYTE
    counts = {"failed saves": 0, "last good one loads": 0, "nothing left over": 0, "saved with room again": 0}
    folder, filler = disk / "checkpoints", disk / "filler"
    step = 0
    save(folder, state(step, numbers), step)
    for trial in range(trials):
        needed = 4 * numbers
        thread = threading.Thread(target=fill, args=(filler,))
        if trial % 3 == 0:
            fill(filler, chance.randrange(needed))
        elif trial % 3 == 1:
            fill(filler, needed + 4096 * chance.randrange(4))
        else:
            fill(filler, needed + MEGABYTE)
            threading.Timer(chance.uniform(0, 0.02), thread.start).start()
        try:
            save(folder, state(step + 1, numbers), step + 1)
            step += 1
        except OSError:
            counts["failed saves"] += 1
        if trial % 3 == 2:
            while not thread.ident:
                time.sleep(0.001)
            thread.join()
        found = newest(folder)
        counts["last good one loads"] += (
            found.path is not None
            and not found.refused
            and step_of(found.path) == step
            and is_whole(found.path, numbers)
        )
        counts["nothing left over"] += not any(folder.glob(".step_*"))
        filler.unlink()
        step += 1
        path = save(folder, state(step, numbers), step)
        counts["saved with room again"] += is_whole(path, numbers)
    return counts


def file_too_large(folder: Path) -> dict[str, int]:
    """Save under a limit of the size of files (RLIMIT_FSIZE): writes fail in the middle of a file."""
    save(folder, state(1), 1)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    failed = 0
    try:
        for limit in (10_000, 400_000, 524_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                save(folder, state(2), 2)
            except OSError:
                failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    found = newest(folder).path
    return {"tried": 3, "failed": failed, "last good one loads": 3 * (found is not None and is_whole(found))}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the long form, print a table; 1 where anything does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    holds = True
    with tempfile.TemporaryDirectory() as place:
        killed = kills(given.trials, given.seed, Path(place) / "kills")
        print("killed while saving:", ", ".join(f"{name} {count}" for name, count in killed.items()))
        holds &= {killed[name] for name in ("loadable", "whole", "nothing promised was lost")} == {given.trials}
        for name, (done, refused, taken) in damages(given.trials, given.seed, Path(place) / "flips").items():
            print(f"damaged {name}: {done} ways, refused by name {refused}, previous taken {taken}")
            holds &= done == refused == taken
        limited = file_too_large(Path(place) / "limit")
        print("limit of the file size:", ", ".join(f"{name} {count}" for name, count in limited.items()))
        holds &= set(limited.values()) == {3}
    with small_disk(20_000_000) as disk:
        if disk is None:
            print("20 MB disk: NOT RUN, this process may not mount a tmpfs; only the limit of the file size was tried")
        else:
            trials = max(3, given.trials // 4)
            filled = full_disk(trials, given.seed, disk)
            print(f"20 MB disk, {trials} times:", ", ".join(f"{name} {count}" for name, count in filled.items()))
            holds &= filled["failed saves"] >= trials // 3
            holds &= {count for name, count in filled.items() if name != "failed saves"} == {trials}
    print("holds" if holds else "DOES NOT HOLD")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
