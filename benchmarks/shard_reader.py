"""Samples a second and core from one shard in memory: our reader against webdataset's.

    python -m benchmarks.shard_reader [--rounds 7] [--folder /dev/shm]

Both deliver raw bytes by field on one thread. webdataset is read in its two documented ways, `WebDataset(path,
shardshuffle=False)` without decoding and its tar stages over an open file, and the faster of the two counts. Ours also
compares a checksum of every member. Before anything is timed, all samples of both sides are compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import webdataset
import xxhash

from mmpretrain.data.shards import iter_shard

SIZES = {2_000: 4000, 20_000: 2000, 100_000: 800}  # bytes of the picture: samples


def ours(path: Path) -> Iterator[dict[str, Any]]:
    return iter_shard(path)


def whole(path: Path) -> Iterator[dict[str, Any]]:
    yield from webdataset.WebDataset(str(path), shardshuffle=False)


def stages(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        yield from webdataset.tariterators.group_by_keys(files)


SIDES: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    "ours": ours,
    "webdataset": whole,
    "webdataset stages": stages,
}


def plain(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name == "__key__" or name[:2] != "__"}


def write(path: Path, size: int, count: int) -> None:
    generator = random.Random(size)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for i in range(count):
            picture, text = generator.randbytes(size), generator.randbytes(60).hex().encode()
            writer.write({"__key__": f"{i:06}", "jpg": picture, "txt": text, "json": b'{"caption": "%s"}' % text})


def rate(side: str, path: Path) -> float:
    begin = time.perf_counter()
    count = sum(1 for _ in SIDES[side](path))
    return count / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").is_dir() else None, help="in memory")
    args = parser.parse_args()
    print(
        f"Python {platform.python_version()}, webdataset {webdataset.__version__}, xxhash {xxhash.VERSION}, "
        f"{platform.machine()}, 1 of {os.cpu_count()} cores, {args.rounds} rounds\n"
    )
    print("| picture | side | samples/s, median | smallest to largest | ours is faster |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for size, count in SIZES.items():
            path = Path(folder) / f"{size}.tar"
            write(path, size, count)
            begin = time.perf_counter()
            if len(list(ours(path))) != count:
                raise SystemExit("samples are missing")
            first = time.perf_counter() - begin
            for side in list(SIDES)[1:]:
                for mine, theirs in zip(ours(path), SIDES[side](path), strict=True):
                    if mine != plain(theirs):
                        raise SystemExit(f"{side} delivers another sample {mine['__key__']}")
            found: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(args.rounds):
                for side in SIDES:
                    found[side].append(rate(side, path))
            base = statistics.median(found["ours"])
            for side, rates in found.items():
                median = statistics.median(rates)
                cells = [f"{size // 1000} kB", side, f"{median:,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"]
                print(f"| {' | '.join(cells)} | {base / median:.1f} x |")
            cells = [f"{size // 1000} kB", "ours, first use: makes the index", f"{count / first:,.0f}", "once"]
            print(f"| {' | '.join(cells)} | |", flush=True)


if __name__ == "__main__":
    main()
