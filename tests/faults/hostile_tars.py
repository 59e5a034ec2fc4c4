"""Hostile tar files: sizes that lie, members that are no files, names that are paths, archives that are bombs."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmpretrain.data.events import DataEvent
from mmpretrain.data.shards import Shard, iter_shard
from tests.faults.hostile import Case
from tests.faults.hostile_bytes import array
from tests.faults.hostile_shards import PEERS, events_of, pickled, picture

BLOCK = 512
END = bytes(2 * BLOCK)


def header(name: bytes, size: bytes, kind: bytes = b"0", link: bytes = b"", magic: bytes = b"ustar\x0000") -> bytes:
    """A tar header with a right checksum; `size` is its 12 bytes as they are."""
    block = bytearray(BLOCK)
    block[0 : len(name[:100])] = name[:100]
    block[100:124] = b"0000644\x000000000\x000000000\x00"
    block[124 : 124 + len(size)] = size
    block[136:148] = b"00000000000\x00"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257 : 257 + len(magic)] = magic
    block[148:156] = f"{sum(block):06o}".encode() + b"\0 "
    return bytes(block)


def octal(size: int) -> bytes:
    return f"{size:011o}".encode() + b"\0"


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, octal(len(data)), kind) + data + bytes(-len(data) % BLOCK)


def pax(**values: str) -> bytes:
    records = b""
    for key, value in values.items():
        text = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(text) + 1
        while len(str(length)) + len(text) != length:
            length = len(str(length)) + len(text)
        records += str(length).encode() + text
    return member(b"pax", records, b"x")


def base256(size: int) -> bytes:
    return (size & (1 << 96) - 1 | (1 << 95 if size >= 0 else 0)).to_bytes(12, "big")


SOUND = member(b"b.png", picture()) + member(b"b.txt", b"a cat")
LINKS = {b"1": "hard link", b"2": "symbolic link", b"3": "character device", b"4": "block device", b"6": "pipe"}


def gzip_bomb() -> bytes:
    return gzip.compress(bytes(2**26), 9)


def many_empty() -> bytes:
    one = b"".join(header(f"{i:06}.txt".encode(), octal(0)) for i in range(1000))
    return one * 60 + END


def sparse_claim() -> bytes:
    block = bytearray(header(b"a.png", octal(BLOCK), b"S", magic=b"ustar  \x00"))
    block[483:495] = base256(1 << 60)  # the size it would have unpacked
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}".encode() + b"\0 "
    return bytes(block) + bytes(BLOCK) + SOUND + END


TARS: dict[str, Callable[[], bytes]] = {
    "a negative size (base 256)": lambda: header(b"a.png", base256(-BLOCK)) + SOUND + END,
    "a size of -1 in digits": lambda: header(b"a.png", b"-0000000001\0") + SOUND + END,
    "a size of 2^60": lambda: header(b"a.png", base256(1 << 60)) + SOUND + END,
    "a size of 8 GiB in digits": lambda: header(b"a.png", b"77777777777\0") + SOUND + END,
    "a size of 2^63 - 1": lambda: header(b"a.png", base256((1 << 63) - 1)) + SOUND + END,
    "a pax size of 10^18": lambda: pax(size="1" + "0" * 18) + member(b"a.png", picture()) + SOUND + END,
    "a negative pax size": lambda: pax(size="-512") + member(b"a.png", picture()) + SOUND + END,
    "a pax size of 100,000 digits": lambda: pax(size="9" * 100_000) + member(b"a.png", picture()) + SOUND + END,
    "a sparse member of 2^60 bytes": sparse_claim,
    "a pax sparse member": lambda: (
        pax(GNU__sparse__map="0,1", GNU__sparse__size=f"{1 << 60}") + member(b"a.png", picture()) + SOUND + END
    ),
    "a pax header of 2 MiB": lambda: pax(path="a" * 2**21) + member(b"a.png", picture()) + SOUND + END,
    "a GNU name of 2 MiB": lambda: member(b"L", b"a" * 2**21, b"L") + member(b"a.png", picture()) + SOUND + END,
    "a long name that is 2^60 bytes": lambda: header(b"L", base256(1 << 60), b"L") + SOUND + END,
    "a gzip bomb": gzip_bomb,
    "no tar at all": lambda: b"\x80\x04cos\nsystem\n(S'touch marker'\ntR." * 100,
    "60,000 members of the same names": many_empty,
}

NAMES = {
    "../": b"../../marker",
    "an absolute name": b"/tmp/marker",
    "a name with a line break": b"a\nmarker",
    "a name with a command": b"$(touch marker)",
    "a name that is not UTF-8": b"\xff\xfe",
    "a name like ours": b"__key__",
}


def read(folder: Path) -> str:
    """Read both ways: in order, and through the index. What is lost must be an event."""
    path = folder / "x.tar"
    found: list[DataEvent] = []
    samples = sum(1 for _ in iter_shard(path, found))
    shard = Shard(path, folder / "cache")
    for i in range(len(shard)):
        shard.read(i)
    assert len(shard) == samples
    return events_of(found) or f"read: {samples} samples"


def write(make: Callable[[], bytes], folder: Path) -> None:
    (folder / "x.tar").write_bytes(make())


def name(text: bytes) -> bytes:
    return member(text + b".png", picture()) + member(text + b".txt", b"a cat") + SOUND + END


def link(kind: bytes, folder: Path) -> None:
    (folder / "secret").write_text('{"caption": "secret"}')
    head = header(b"b.json", octal(0), kind, str(folder / "secret").encode()[:90])
    write(lambda: head + SOUND + END, folder)


def linked(folder: Path) -> str:
    """Only links beside sound members: they are passed over, and what they point to is not read."""
    found: list[DataEvent] = []
    for sample in iter_shard(folder / "x.tar", found):
        assert "secret" not in str(sample)
    return events_of(found) or "read: without it"


CASES = [
    *(Case(f"tar: {name}", read, PEERS, prepare=partial(write, make)) for name, make in TARS.items()),
    *(
        Case(f"tar: {title}", read, harmless=True, prepare=partial(write, partial(name, text)))
        for title, text in NAMES.items()
    ),
    *(
        Case(f"tar: a {title} member", linked, harmless=True, prepare=partial(link, kind))
        for kind, title in LINKS.items()
    ),
]


def forge(make: Callable[[Path], bytes], folder: Path) -> None:
    """A sound shard, and beside it an index that is not ours, newer than the shard."""
    write(lambda: SOUND + END, folder)
    (folder / "x.tar.idx.npz").write_bytes(make(folder))


def lying_index(folder: Path) -> bytes:
    """A zip of one array whose header announces a terabyte."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("head", "keys", "table"):
            file.writestr(f"{name}.npy", array("(137438953472,)"))
    return data.getvalue()


def index_bomb(folder: Path) -> bytes:
    """A zip of 512 MiB of zeros in 512 KiB."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file, file.open("head.npy", "w") as entry:
        entry.write(array("(67108864,)")[:-48])
        for _ in range(512):
            entry.write(bytes(2**20))
    return data.getvalue()


INDEXES: dict[str, Callable[[Path], bytes]] = {
    "a pickled index": lambda folder: pickled(folder / "marker", "npz"),
    "a pickle as an index": lambda folder: pickled(folder / "marker"),
    "an index that announces a terabyte": lying_index,
    "an index that is a bomb": index_bomb,
}
CASES += [
    Case(f"tar: {name} beside it", read, harmless=True, prepare=partial(forge, make)) for name, make in INDEXES.items()
]
