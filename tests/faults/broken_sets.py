"""Broken sets of shards, given to the real command: each ends in one clear sentence naming the shard, within 10 s.

`python -m tests.faults.broken_sets [--trials N] [--seed S]` prints what each set ends in. The sets that are only odd
(one shard for four workers) must train.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import tests.preload  # noqa: F401  # no set waits for imports
from mmpretrain.cli import main as command
from mmpretrain.data.shards import Shard
from tests.shard_sets import OVERRIDES

SECONDS = 10.0
SAMPLES = 24

Sample = dict[str, bytes]


class Case(NamedTuple):
    """What to make in a folder, overrides, exit status, and words that the one line must hold."""

    make: Callable[[Path], object]
    overrides: tuple[str, ...] = ()
    status: int = 2
    words: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What the command came to: exit status, seconds, and its lines of error."""

    status: int
    seconds: float
    errors: list[str]


def picture(i: int, kind: str = "PNG") -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (20, 20), (i * 9 % 256, i * 5 % 256, 255 - i)).save(data, kind)
    return data.getvalue()


def sound(i: int) -> Sample:
    return {"png": picture(i), "txt": f"colour {i}".encode()}


def pack(path: Path, samples: Sequence[Sample], first: int = 0) -> Path:
    """Write a shard of samples called 0000, 0001 ..."""
    import webdataset

    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
        for i, sample in enumerate(samples, first):
            writer.write({"__key__": f"{i:04}", **sample})
    return path


def shards(folder: Path, of: Callable[[int], Sample] = sound, count: int = 3) -> list[Path]:
    """Write `count` shards of `SAMPLES` samples in all."""
    each = SAMPLES // count
    return [
        pack(folder / f"{n:05}.tar", [of(i) for i in range(n * each, (n + 1) * each)], n * each) for n in range(count)
    ]


def without(folder: Path, field: str, **others: bytes) -> None:
    shards(folder, lambda i: {name: data for name, data in {**sound(i), **others}.items() if name != field})


def spoiled(folder: Path, content: Callable[[bytes], bytes]) -> None:
    """Write sound shards and change the bytes of the second."""
    path = shards(folder)[1]
    path.write_bytes(content(path.read_bytes()))


def headers_flipped(data: bytes) -> bytes:
    """Damage every header of a shard: none of its samples can be found."""
    blocks = [bytearray(data[i : i + 512]) for i in range(0, len(data), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[0] ^= 0x55
    return b"".join(blocks)


def payloads_flipped(folder: Path) -> None:
    """Damage all pictures after the index was made, keeping size and time, as a failing disk does."""
    for path in shards(folder):
        shard, stat = Shard(path), path.stat()
        data = bytearray(path.read_bytes())
        for i in range(len(shard)):
            place = data.index(shard.read(i)["png"])
            data[place + 20] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def twice(folder: Path, second: Callable[[int], Sample]) -> None:
    """Every key is there twice in a row, as a writer makes that was restarted again and again."""
    import webdataset

    with (folder / "00000.tar").open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
        for i in range(SAMPLES):
            writer.write({"__key__": f"{i:04}", **sound(i)})
            writer.write({"__key__": f"{i:04}", **second(i)})


JSON_CAPTIONS = ("data.captions._target_=mmpretrain.data.decode.JsonCaption", "data.captions.extension=json")
FIRST = "00000.tar"

CASES: dict[str, Case] = {
    "no caption field": Case(lambda f: without(f, "txt"), words=(FIRST, "no field txt", "png")),
    "captions in another field": Case(
        lambda f: without(f, "txt", caption=b"a colour"), words=(FIRST, "no field txt", "caption, png")
    ),
    "no pictures": Case(lambda f: without(f, "png"), words=(FIRST, "jpg", "only txt")),
    "fewer samples than a batch": Case(
        lambda f: pack(f / FIRST, [sound(i) for i in range(5)]), words=("5 samples", "batch of 8", "{folder}")
    ),
    "one shard for four workers": Case(
        lambda f: shards(f, count=1), ("data.num_workers=4", "+data.module.prefetch_factor=1"), 0
    ),
    "one empty shard": Case(lambda f: pack(shards(f)[1], []), words=("00001.tar", "no sample")),
    "no tar": Case(lambda f: spoiled(f, lambda _: b"<html>404</html>" * 100), words=("00001.tar", "not a tar")),
    "gzip": Case(lambda f: spoiled(f, gzip.compress), words=("00001.tar", "gzip", "decompress")),
    "truncated to nothing": Case(lambda f: spoiled(f, lambda _: b""), words=("00001.tar", "empty")),
    "all pictures undecodable": Case(
        lambda f: shards(f, lambda i: {**sound(i), "png": b"\x89PNG no"}), words=(FIRST, "0000", "png")
    ),
    "pictures of a format that is not read": Case(
        lambda f: shards(f, lambda i: {"png": picture(i, "BMP"), "txt": b"a"}), words=(FIRST, "JPEG, PNG, WEBP, GIF")
    ),
    "all samples of a shard damaged": Case(lambda f: spoiled(f, headers_flipped), words=("00001.tar",)),
    "all pictures changed on disk": Case(payloads_flipped, words=(FIRST, "other bytes")),
    "a shard of the range is missing": Case(
        lambda f: shards(f)[1].unlink(), ("data.train='{folder}/{{00000..00002}}.tar'",), 2, ("00001.tar", "not exist")
    ),
    "wrong JSON key": Case(
        lambda f: shards(f, lambda i: {"png": picture(i), "json": json.dumps({"title": f"colour {i}"}).encode()}),
        (*JSON_CAPTIONS, "+data.captions.key=caption"),
        words=(FIRST, "'caption'", "title"),
    ),
    "empty captions everywhere": Case(
        lambda f: shards(f, lambda i: {**sound(i), "txt": b" \n"}), words=(FIRST, "empty")
    ),
    "captions that are no UTF-8": Case(
        lambda f: shards(f, lambda i: {**sound(i), "txt": b"caf\xe9"}), words=(FIRST, "UTF-8")
    ),
    "every sample twice, the same": Case(lambda f: twice(f, sound), status=0),
    "every key twice, with other bytes": Case(lambda f: twice(f, lambda i: sound(i + 99)), status=0),
    "a folder without shards": Case(lambda f: (f / "a.txt").write_text("a"), words=("{folder}", "no *.tar")),
}


def run(case: Case, folder: Path) -> Outcome:
    """Make the set and train on it for two steps, in this process."""
    data = folder / "set"
    data.mkdir(parents=True)
    case.make(data)
    overrides = [f"data.train={data}", "evaluators=none", "report=false", "trainer.max_steps=2"]
    overrides += [override.format(folder=data) for override in case.overrides]
    output = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
        status = command(["train", *OVERRIDES, *overrides, f"run_dir={folder / 'run'}"])
    errors = [line for line in output.getvalue().splitlines() if "error" in line.lower() or "Traceback" in line]
    return Outcome(status, time.perf_counter() - start, errors)


def faults(case: Case, outcome: Outcome, folder: Path) -> list[str]:
    """Say what is wrong with an outcome."""
    found = []
    if outcome.status != case.status:
        found.append(f"exit status {outcome.status}, expected {case.status}")
    if outcome.seconds > SECONDS:
        found.append(f"{outcome.seconds:.1f} s")
    if len(outcome.errors) != (case.status != 0):
        found.append(f"{len(outcome.errors)} lines of error")
    text = " ".join(outcome.errors)
    found += [f"{word!r} is not said" for word in case.words if word.format(folder=folder / "set") not in text]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.broken_sets")
    parser.add_argument("--trials", type=int, default=1, help="times that every set is tried")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which they are")
    args = parser.parse_args(argv)
    names = [name for name in CASES for _ in range(args.trials)]
    random.Random(args.seed).shuffle(names)
    bad = 0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(CASES[name], Path(folder))
            wrong = faults(CASES[name], outcome, Path(folder))
            said = outcome.errors[-1].replace(folder, "") if outcome.errors else ""
        bad += bool(wrong)
        print(f"{'ok ' if not wrong else 'BAD'} {outcome.seconds:5.2f} s  status {outcome.status}  {name}: {said}")
        for line in wrong:
            print(f"      {line}")
    print(f"{len(names) - bad} of {len(names)} sets end as they should")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
