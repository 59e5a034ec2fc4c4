"""Random damage to a shard of 100 samples: what our reader and webdataset deliver, and what they count.

    python -m tests.faults.mutations [--trials 1000] [--seed 0]

Each trial damages one place of a sound shard and reads it in three ways: `known`, with an index made before the
damage (what a run that has seen the shard meets); `in place`, the same with size and time of the file unchanged;
`first`, without an index. A sample is *touched* if bytes of it changed or went. What must hold: all other samples
arrive as they were; a touched one arrives unharmed or is counted under its key; nothing arrives altered. Without an
index nobody can tell flipped picture bytes or a member that is cleanly gone, so `first` shows those as `unseen`.
webdataset (`ignore_and_continue`) reads the same files; it counts nothing.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import webdataset

from mmpretrain.data.events import DataEvent
from mmpretrain.data.grouping import key_of
from mmpretrain.data.shards import iter_shard
from mmpretrain.errors import InputError

SAMPLES = 100
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
Read = dict[str, dict[str, bytes]]


class Entry(NamedTuple):
    """One member of a sound shard: its sample, and where its headers, main header, bytes and padding lie."""

    key: str
    begin: int
    header: int
    data: int
    size: int
    end: int


class Damaged(NamedTuple):
    """A damaged shard, the samples touched, and whether they must still be delivered."""

    raw: bytes
    touched: set[str]
    whole: bool = False


def sound_shard(generator: random.Random) -> tuple[bytes, list[Entry], Read]:
    """Make a shard of 100 samples; some have another set of fields, some names are longer than a header holds."""
    format, samples = generator.choice(FORMATS), {}
    for i in range(SAMPLES):
        long = "d" * 60 + "/" + "n" * 60 if format != tarfile.USTAR_FORMAT and generator.random() < 0.1 else ""
        fields = {"jpg": generator.randbytes(generator.randrange(1, 4000)), "txt": generator.randbytes(30)}
        if generator.random() < 0.9:
            fields["json"] = generator.randbytes(generator.randrange(600))
        samples[f"{long}{i:04}"] = fields
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for key, fields in samples.items():
            for field, content in fields.items():
                info = tarfile.TarInfo(f"{key}.{field}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        entries = [
            Entry(key_of(m.name)[0], m.offset, m.offset_data - 512, m.offset_data, m.size, _up(m.offset_data + m.size))  # type: ignore[index]
            for m in tar
        ]
    return file.getvalue(), entries, samples


def header_bit(raw: bytes, entries: list[Entry], generator: random.Random) -> Damaged:
    entry = generator.choice(entries)
    at = generator.choice([entry.begin, entry.header]) + generator.randrange(512)
    return Damaged(_flip(raw, at, generator), {entry.key})


def payload_bit(raw: bytes, entries: list[Entry], generator: random.Random) -> Damaged:
    entry = generator.choice([entry for entry in entries if entry.size])
    places = [*range(entry.data, entry.data + entry.size), *range(entry.begin + 512, entry.header)]  # also a long name
    return Damaged(_flip(raw, generator.choice(places), generator), {entry.key})


def truncate(raw: bytes, entries: list[Entry], generator: random.Random) -> Damaged:
    second = next(entry for entry in entries if entry.key != entries[0].key)  # without one whole sample it is refused
    cut = generator.randrange(second.begin, entries[-1].end)
    return Damaged(raw[:cut], {entry.key for entry in entries if entry.data + entry.size > cut})


def zero_block(raw: bytes, entries: list[Entry], generator: random.Random) -> Damaged:
    entry = generator.choice(entries)
    at = entry.begin + 512 * generator.randrange((entry.end - entry.begin) // 512)
    return Damaged(raw[:at] + bytes(512) + raw[at + 512 :], {entry.key})


def duplicated(raw: bytes, entries: list[Entry], generator: random.Random) -> Damaged:
    entry, place = generator.choice(entries), generator.choice(entries).begin
    return Damaged(raw[:place] + raw[entry.begin : entry.end] + raw[place:], {entry.key}, whole=True)


def missing(raw: bytes, entries: list[Entry], generator: random.Random) -> Damaged:
    entry = generator.choice(entries)
    return Damaged(raw[: entry.begin] + raw[entry.end :], {entry.key})


def swapped(raw: bytes, entries: list[Entry], generator: random.Random) -> Damaged:
    a, b = sorted(generator.sample(entries, 2), key=lambda entry: entry.begin)
    first, second = raw[a.begin : a.end], raw[b.begin : b.end]
    return Damaged(raw[: a.begin] + second + raw[a.end : b.begin] + first + raw[b.end :], set())


def wrong_size(raw: bytes, entries: list[Entry], generator: random.Random) -> Damaged:
    entry = generator.choice(entries)
    # A right checksum and a size that leads just to a header, or to the end mark, are no damage but another shard.
    begins, larger, after = {other.begin for other in entries}, 0, entry.end
    while not larger or after in begins or entries[-1].end <= after < len(raw):
        larger = generator.randrange(entry.end - entry.data + 1, len(raw))
        after = entry.data + _up(larger)
    size = generator.choice(
        [
            b"-%010o\0" % generator.randrange(1, 1 << 20),
            (-generator.randrange(1, 1 << 40)).to_bytes(12, "big", signed=True),
            b"77777777777\0",
            b"\x80" + generator.randrange(1 << 40, 1 << 80).to_bytes(11, "big"),
            b"%011o\0" % larger,
        ]
    )
    block = bytearray(raw[entry.header : entry.data])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return Damaged(raw[: entry.header] + bytes(block) + raw[entry.data :], {entry.key})


def garbage(raw: bytes, entries: list[Entry], generator: random.Random) -> Damaged:
    place = generator.randrange(entries[0].begin, entries[-1].end)
    length = generator.choice([generator.randrange(1, 5000), 512 * generator.randrange(1, 10)])
    inside = {entry.key for entry in entries if entry.begin < place < entry.end}
    return Damaged(raw[:place] + generator.randbytes(length) + raw[place:], inside)


KINDS: dict[str, Callable[[bytes, list[Entry], random.Random], Damaged]] = {
    "header bit flipped": header_bit,
    "payload bit flipped": payload_bit,
    "truncated": truncate,
    "512-block of zeros": zero_block,
    "member duplicated": duplicated,
    "member missing": missing,
    "members swapped": swapped,
    "negative or huge size": wrong_size,
    "garbage inserted": garbage,
}
# What a reader without an index cannot know.
UNSEEN = {"payload bit flipped", "truncated", "512-block of zeros", "member missing", "garbage inserted"}


class Outcome(Counter[str]):
    """Counts of one way of reading; `lost`, `altered` and `uncounted` are failures."""

    def judge(self, expected: Read, damaged: Damaged, got: Read, counted: set[str | None] | None) -> None:
        for key, fields in expected.items():
            if key in damaged.touched:
                continue
            self["beside" if counted is not None and key in counted else "lost"] += key not in got
            self["altered"] += key in got and got[key] != fields
        self["altered"] += len(got.keys() - expected.keys())
        for key in damaged.touched:
            self["touched"] += 1
            same = got.get(key) == expected[key]
            noted = counted is not None and key in counted
            if key in got and not same:
                self["altered"] += 1
            elif same and not (damaged.whole and counted is not None):
                self["unharmed"] += 1
            else:
                self["counted" if noted else "uncounted"] += 1


def ours(path: Path) -> tuple[Read, list[DataEvent]]:
    events: list[DataEvent] = []
    try:
        return {sample.pop("__key__"): sample for sample in iter_shard(path, events)}, events
    except InputError as error:
        return {}, [DataEvent(str(path), 0, None, "unreadable", str(error))]


def theirs(path: Path) -> Read | None:
    """Return what webdataset delivers, None if it does not end (CVE-2025-8194)."""

    def late(*_: Any) -> None:
        raise TimeoutError

    found: Read = {}
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        with path.open("rb") as stream:  # the stages of `WebDataset`, which leaves the file open
            source = [{"url": str(path), "stream": stream}]
            files = webdataset.tariterators.tar_file_expander(source, handler=webdataset.ignore_and_continue)
            for sample in webdataset.tariterators.group_by_keys(files, handler=webdataset.ignore_and_continue):
                found[sample["__key__"]] = {name: value for name, value in sample.items() if name[:2] != "__"}
    except TimeoutError:
        return None
    except Exception:  # what it has delivered until then counts
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return found


class Row(NamedTuple):
    """What the trials of one kind gave in each way of reading."""

    known: Outcome
    in_place: Outcome
    first: Outcome
    webdataset: Outcome


def run(kind: str, trials: int, seed: int, folder: Path) -> Row:
    row = Row(Outcome(), Outcome(), Outcome(), Outcome())
    for trial in range(trials):
        generator = random.Random(f"{seed}/{kind}/{trial}")
        if trial % 10 == 0:
            raw, entries, expected = sound_shard(generator)
        damaged = KINDS[kind](raw, entries, generator)
        path = folder / f"{trial}.tar"
        index = path.with_name(path.name + ".idx.npz")
        path.write_bytes(raw)
        assert ours(path) == (expected, [])
        stat = path.stat()
        path.write_bytes(damaged.raw)
        if len(damaged.raw) == len(raw):
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            got, events = ours(path)
            in_place = damaged if kind != "members swapped" else damaged._replace(touched=set(expected))
            row.in_place.judge(expected, in_place, got, {event.key for event in events})
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
        got, events = ours(path)
        row.known.judge(expected, damaged, got, {event.key for event in events})
        assert ours(path) == (got, events), "the index kept with its losses tells the same"
        index.unlink(missing_ok=True)
        path = path.rename(folder / f"{trial}-first.tar")
        got, events = ours(path)
        row.first.judge(expected, damaged, got, {event.key for event in events})
        if (got_theirs := theirs(path)) is None:
            row.webdataset["stuck"] += 1
        row.webdataset.judge(expected, damaged, got_theirs or {}, None)
        path.unlink()
        path.with_name(path.name + ".idx.npz").unlink(missing_ok=True)
    return row


def failures(kind: str, row: Row) -> list[str]:
    """Return what does not hold."""
    bad = [
        f"{kind}, {way}: {row_of[name]} {name}"
        for way, row_of in (("known", row.known), ("in place", row.in_place))
        for name in ("lost", "altered", "uncounted")
        if row_of[name]
    ]
    names = ["lost"] if kind in UNSEEN else ["lost", "altered", "uncounted"]
    return bad + [f"{kind}, first: {row.first[name]} {name}" for name in names if row.first[name]]


def table(rows: dict[str, Row]) -> str:
    """Return the counts as a Markdown table."""
    lines = [
        "| damage | touched | counted | unharmed | other samples lost | altered | in place: counted, lost, altered "
        "| first: counted, unseen, lost | webdataset: touched gone uncounted, others lost, altered, stuck |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, (known, place, first, peer) in rows.items():
        cells = [
            kind,
            *(str(known[name]) for name in ("touched", "counted", "unharmed", "lost", "altered")),
            f"{place['counted']}, {place['lost']}, {place['altered']}",
            f"{first['counted']}, {first['altered'] + first['uncounted']}, {first['lost']}",
            f"{peer['uncounted']}, {peer['lost']}, {peer['altered']}, {peer['stuck']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the table; 1 if anything does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="for each kind of damage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = {kind: run(kind, args.trials, args.seed, Path(folder)) for kind in KINDS}
    print(f"{args.trials} trials each, seed {args.seed}, {SAMPLES} samples, webdataset {webdataset.__version__}\n")
    print(table(rows))
    found = [line for kind, row in rows.items() for line in failures(kind, row)]
    print("\n".join(["", *found]) if found else "\nall hold")
    return 1 if found else 0


def _flip(raw: bytes, place: int, generator: random.Random) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 1 << generator.randrange(8)]) + raw[place + 1 :]


def _up(position: int) -> int:
    return -(-position // 512) * 512


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
