"""Shards over a bad connection: whole or absent, within the limit, whatever is cut, refused, slowed or killed.

Each trial: four processes fetch shards at random through one small cache, from an S3 store or a web server behind a
proxy that cuts connections in the middle of a body, refuses them for a while and is slow; one process after another
is killed (SIGKILL) and replaced, and so is the store. Every file that a process is given, and every file that lies in
the folder under a shard's name, must be that shard; the folder must stay below its limit; nothing unfinished may be
left at the end.

    python -m tests.faults.remote --trials 20
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.data.servers import CREDENTIALS, Proxy, Store, Web, ranged

SHARDS = 10
SIZE = 200_000
LIMIT = 5 * SIZE + SIZE // 2
READER = """
import random, sys
from mmpretrain.data import cache, remote, room
from mmpretrain.data.download import Retry
from tests.faults.remote import SHARDS, content
cache.RETRY, remote.BLOCK, room.GRACE = Retry(patience=30, attempts=60, first=0.05, most=0.5, stall=3), 50_000, 0.5
base, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)
for _ in range(count):
    i = draw.randrange(SHARDS)
    if cache.fetch(f"{base}/{i}.tar").read_bytes() != content(i):
        sys.exit(3)
"""


class Outcome(NamedTuple):
    """What one trial saw."""

    killed: int
    restarts: int
    cuts: int
    most: int  # bytes in the folder at any time, unfinished files included
    wrong: list[str]


def content(i: int) -> bytes:
    return random.Random(i).randbytes(SIZE + i)


def trial(seed: int, s3: bool, seconds: float = 6.0) -> Outcome:
    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="faults-remote-"))
    objects = {f"shards/{i}.tar": content(i) for i in range(SHARDS)}
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        server: Store | None = None
        if s3:
            server = Store()
            stack.callback(server.kill)
            server.start(objects)
            proxy = stack.enter_context(Proxy(server.port))
            base = "s3://shards"
        else:
            web = stack.enter_context(Web())
            web.routes.update({f"/{name}": ranged(data, f'"{name}"') for name, data in objects.items()})
            proxy = stack.enter_context(Proxy(web.port))
            base = f"{proxy.url}/shards"
        settings = {"MMPRETRAIN_CACHE": str(folder), "MMPRETRAIN_CACHE_BYTES": str(LIMIT), "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **CREDENTIALS, **settings, "AWS_ENDPOINT_URL": proxy.url}

        def start() -> subprocess.Popen[bytes]:
            command = [sys.executable, "-c", READER, base, str(draw.randrange(2**30)), "100000"]
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
            stack.callback(_end, process)
            return process

        running = [start() for _ in range(4)]
        seen, most, killed, restarts, cuts = set[str](), 0, 0, 0, 0
        wrong: list[str] = []
        _wait_for_a_shard(folder)
        end = time.monotonic() + seconds
        act = time.monotonic()
        while time.monotonic() < end:
            most = max(most, _look(folder / "shards", seen, wrong))
            for i, process in enumerate(running):
                if process.poll() is not None:
                    said = process.stderr.read().decode() if process.stderr is not None else ""
                    wrong.append(f"a process ended with {process.returncode}: {said[-300:]}")
                    running[i] = start()
            if time.monotonic() < act:
                continue
            act = time.monotonic() + 0.2
            what = draw.random()
            proxy.pause = draw.choice([0.0, 0.0, 0.002, 0.02])
            proxy.refuse = what < 0.15
            if what < 0.6:
                proxy.cuts += [draw.randrange(1, SIZE) for _ in range(3)]
                cuts += 3
            elif what < 0.8:
                i = draw.randrange(4)
                running[i].kill()
                running[i].wait()
                running[i] = start()
                killed += 1
            elif what > 0.97 and server is not None:
                server.kill()
                proxy.refuse = True  # until it has its objects again, else it would rightly say that there is none
                server.start(objects)
                restarts += 1
        for process in running:
            process.kill()
            process.wait()
        most = max(most, _look(folder / "shards", seen, wrong))
        proxy.cuts, proxy.pause, proxy.refuse = [], 0.0, False
        last = [sys.executable, "-c", READER, base, "0", "20"]  # many enough that room has to be made
        done = subprocess.run(last, env=environment, capture_output=True, timeout=120)
        if done.returncode != 0:
            wrong.append(f"not even undisturbed: {done.stderr.decode()[-300:]}")
        wrong += [f"left over: {item.name}" for item in (folder / "shards").iterdir() if item.name.startswith(".")]
    return Outcome(killed, restarts, cuts, most, wrong)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stderr is not None:
        process.stderr.close()


def _wait_for_a_shard(folder: Path) -> None:
    end = time.monotonic() + 60
    while not list(folder.glob("shards/[0-9a-f]*")) and time.monotonic() < end:
        time.sleep(0.02)


def _look(folder: Path, seen: set[str], wrong: list[str]) -> int:
    """Compare every new file that is called as a shard; returns the bytes of all."""
    for item in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            known = item.stat()
            version = f"{item.name} {known.st_ino} {known.st_mtime_ns}"
            if not item.name.startswith(".") and version not in seen:
                seen.add(version)
                if item.read_bytes() != content(int(item.name.split("-")[1].removesuffix(".tar"))):
                    wrong.append(f"{item.name} is not whole")
    # What is removed and made while the folder is listed is counted both: too much counts if it is seen again.
    for _ in range(10):
        if (total := _bytes(folder)) <= LIMIT:
            break
    return total


def _bytes(folder: Path) -> int:
    sizes = {}
    for item in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            known = item.stat()
            sizes[known.st_ino] = known.st_size
    return sum(sizes.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    print(f"{'trial':>5} {'server':>6} {'killed':>6} {'restarts':>8} {'cuts':>5} {'most bytes':>10} wrong")
    failed = False
    for number in range(options.trials):
        s3 = number % 2 == 1
        found = trial(options.seed + number, s3)
        over = found.most > LIMIT
        failed |= bool(found.wrong) or over
        says = "; ".join(found.wrong + [f"over the limit of {LIMIT}"] * over) or "nothing"
        print(
            f"{number:5} {'s3' if s3 else 'web':>6} {found.killed:6} {found.restarts:8} {found.cuts:5} "
            f"{found.most:10} {says}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
