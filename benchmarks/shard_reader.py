"""Samples a second and core from one shard in memory: our reader against webdataset's.

    python -m benchmarks.shard_reader [--rounds 5] [--folder /dev/shm] [--json]

Both deliver raw bytes by field on one thread. webdataset is read in its two documented ways, `WebDataset(path,
shardshuffle=False)` without decoding and its tar stages over an open file, and the faster of the two counts. Ours also
compares a checksum of every member. Before anything is timed, all samples of both sides are compared.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import webdataset

from benchmarks import _harness as harness
from mmpretrain.data.shards import iter_shard

SIZES = {2_000: 4000, 20_000: 2000, 100_000: 800}  # bytes of the picture: samples


def whole(path: Path) -> Iterator[dict[str, Any]]:
    """Read by webdataset's pipeline."""
    yield from webdataset.WebDataset(str(path), shardshuffle=False)


def stages(path: Path) -> Iterator[dict[str, Any]]:
    """Read by webdataset's bare stages."""
    with path.open("rb") as stream:
        files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        yield from webdataset.tariterators.group_by_keys(files)


SIDES: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    "ours": iter_shard,
    "WebDataset": whole,
    "its tar stages": stages,
}


def plain(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample without webdataset's notes on where it came from."""
    return {name: value for name, value in sample.items() if name == "__key__" or name[:2] != "__"}


def write(path: Path, size: int, count: int) -> None:
    """Write a shard with three members a sample."""
    generator = random.Random(size)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for i in range(count):
            picture, text = generator.randbytes(size), generator.randbytes(60).hex().encode()
            writer.write({"__key__": f"{i:06}", "jpg": picture, "txt": text, "json": b'{"caption": "%s"}' % text})


def rate(side: str, path: Path) -> float:
    """Return samples/s of one reading of the shard."""
    begin = time.perf_counter()
    count = sum(1 for _ in SIDES[side](path))
    return count / (time.perf_counter() - begin)


def main() -> None:
    """Compare, measure, print."""
    made = harness.parser(__doc__, threads=1)
    made.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").is_dir() else None, help="in memory")
    given = made.parse_args()
    rows, notes, different = [], [], 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for size, count in SIZES.items():
            path = Path(folder) / f"{size}.tar"
            write(path, size, count)
            first = count / harness.seconds(lambda path=path: sum(1 for _ in iter_shard(path)))  # type: ignore[misc]
            for side in list(SIDES)[1:]:
                pairs = zip(iter_shard(path), SIDES[side](path), strict=True)
                different += sum(mine != plain(theirs) for mine, theirs in pairs)
            checked = harness.check({"samples that differ": (different, 0)})
            found = harness.alternate({side: partial(rate, side, path) for side in SIDES}, given.rounds)
            best = max(list(SIDES)[1:], key=lambda side: statistics.median(found[side]))
            name = f"pictures of {size // 1000} kB"
            rows.append(harness.Row(name, "samples/s", found["ours"], found[best], best))
            notes.append(f"The first use of the shard of {name} makes its index: {first:,.0f} samples/s, once.")
    settings = {"rounds": given.rounds, "cores used": 1}
    harness.finish(harness.Report("shard_reader", rows, checked, ["webdataset", "xxhash"], settings, notes), given.json)


if __name__ == "__main__":
    main()
