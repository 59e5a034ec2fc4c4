"""The walk over a tar: every format, every kind of damage, and any bytes at all."""

import contextlib
import io
import pickle
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpretrain.data import tar
from mmpretrain.data.events import DataEvent
from mmpretrain.data.headers import find_header, parse, pax_records
from mmpretrain.data.shards import Shard, iter_shard
from mmpretrain.data.tar import Damage, DamageError, Member, walk


def header(size: bytes = b"00000000000\0", kind: bytes = b"0", name: bytes = b"a.txt", magic: bool = True) -> bytes:
    raw = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0"
    raw = (raw + b" " * 8 + kind).ljust(257, b"\0") + (b"ustar\00000" if magic else b"")
    return signed(raw.ljust(512, b"\0"))


def signed(raw: bytes) -> bytes:
    raw = raw[:148] + b" " * 8 + raw[156:]
    return raw[:148] + f"{sum(raw):06o}\0 ".encode() + raw[156:]


def member(name: str, content: bytes, magic: bool = True) -> bytes:
    padded = content.ljust(-(-len(content) // 512) * 512, b"\0")
    return header(b"%011o\0" % len(content), name=name.encode(), magic=magic) + padded


END = bytes(1024)
A, B, C = member("a.txt", b"a" * 700), member("b.txt", b"b" * 512), member("c.txt", b"c")
BAD = b"x" * 512


def read(data: bytes) -> tuple[list[str], list[tuple[int, int, str, str | None]]]:
    """Return the names of the members, and (offset, end, cause, name) of the damaged places."""
    found = list(walk(data, "x"))
    damages = [(d.offset, d.end, d.cause, d.name) for d in found if isinstance(d, Damage)]
    return [m.name for m in found if isinstance(m, Member)], damages


def test_sizes_in_base_256() -> None:
    data = header(size=b"\x80" + (700).to_bytes(11, "big")) + bytes(1024) + header(name=b"b.txt") + END
    assert list(walk(data, "x")) == [("a.txt", 512, 700), ("b.txt", 2048, 0)]


def test_old_headers() -> None:
    folder = header(kind=b"\0", name=b"d.x/", size=b"00000002000\0")  # v7: a folder by its slash, without bytes
    times = header(name=b"b.txt")[:345] + b"14712345670\0" * 2  # GNU keeps times where ustar has the prefix
    times = signed((times[:257] + b"ustar  \0" + times[265:]).ljust(512, b"\0"))
    assert read(folder + times + END) == (["b.txt"], [])


def test_sums_of_signed_bytes() -> None:
    raw = header(name="é.txt".encode())
    unsigned = int(raw[148:154], 8)
    assert read(raw[:148] + b"%06o\0 " % (unsigned - 512) + raw[156:] + END) == (["é.txt"], [])


LINK = header(kind=b"2", name=b"l.txt", size=b"00000002000\0")
OLD = member("old", b"1", magic=False)
SPARSE = header(b"%011o\0" % 512, kind=b"S", name=b"s.txt")


@pytest.mark.parametrize(
    ("data", "names", "damages"),
    [
        (A + B + C + END, ["a.txt", "b.txt", "c.txt"], []),
        (A + LINK + B + END, ["a.txt", "b.txt"], []),
        (A + B + bytes(512), ["a.txt", "b.txt"], []),  # half an end mark is one
        (A + B + bytes(10), ["a.txt", "b.txt"], []),
        (A + B, ["a.txt", "b.txt"], [(2560, 2560, "truncated", None)]),
        (A + B[:700], ["a.txt"], [(1536, 2236, "truncated", "b.txt")]),
        (A + B[:300], ["a.txt"], [(1536, 1836, "truncated", None)]),
        (A + BAD + C + END, ["a.txt", "c.txt"], [(1536, 2048, "header", "x" * 100)]),
        (BAD + A + END, ["a.txt"], [(0, 512, "header", "x" * 100)]),
        (A + BAD[:100] + C + END, ["a.txt", "c.txt"], [(1536, 1636, "header", "x" * 100)]),  # off the grid of blocks
        (A + bytes(512) + B[512:] + C + END, ["a.txt", "c.txt"], [(1536, 2560, "zeros", None)]),
        (bytes(512) + A[512:] + C + END, ["c.txt"], [(0, 1536, "zeros", None)]),
        (A + END + B + END, ["a.txt", "b.txt"], [(1536, 2560, "zeros", None)]),  # cat a.tar b.tar
        (A + B[:5] + b"?" + B[6:] + C + END, ["a.txt", "c.txt"], [(1536, 2560, "header", "b.txt?")]),
        (A + B[:3] + b"?" + B[4:] + END, ["a.txt"], [(1536, 3584, "header", "b.t?t")]),
        (A + header(b"-0000000512\0") + C + END, ["a.txt", "c.txt"], [(1536, 2048, "header", "a.txt")]),
        (A + header(b"\xff" * 12) + C + END, ["a.txt", "c.txt"], [(1536, 2048, "header", "a.txt")]),
        (A + header(b"77777777777\0") + C + END, ["a.txt", "c.txt"], [(1536, 2048, "header", "a.txt")]),
        (header(b"%011o\0" % 1000) + BAD + A + C + END, ["a.txt", "c.txt"], [(0, 1024, "header", "a.txt")]),
        (A + SPARSE + BAD + C + END, ["a.txt", "c.txt"], [(1536, 2560, "refused", "s.txt")]),
        (OLD + BAD + member("b", b"2", False) + END, ["old", "b"], [(1024, 1536, "header", "x" * 100)]),
    ],
)  # fmt: skip
def test_damage_costs_what_it_touches(
    data: bytes, names: list[str], damages: list[tuple[int, int, str, str | None]]
) -> None:
    assert read(data) == (names, damages)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_lost_long_name_costs_its_member(format: int, zeroed: bool) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as out:
        for name in ("a.txt", "d" * 90 + "/" + "n" * 100 + ".txt", "z.txt"):
            out.addfile(tarfile.TarInfo(name))
    raw = file.getvalue()
    block = bytes(512) if zeroed else raw[512:520] + b"?" + raw[521:1024]
    names, damages = read(raw[:512] + block + raw[1024:])
    assert names == ["a.txt", "z.txt"]
    assert damages == [(512, 2048, "zeros" if zeroed else "header", None)]
    names, damages = read(raw[:1540] + b"?" + raw[1541:])  # the name is sound, the header behind it is not
    assert names == ["a.txt", "z.txt"]
    assert [damage[3] for damage in damages] == ["d" * 90 + "/" + "n" * 100 + ".txt"]


def test_a_tar_inside_a_tar_is_bytes() -> None:
    inner = A + B + END
    assert read(member("t.tar", inner) + C + END) == (["t.tar", "c.txt"], [])


@pytest.mark.parametrize("behind", [C + END, END, END + C + END])
@pytest.mark.parametrize("hidden", [A + B, A + B + END])
def test_a_tar_hidden_in_a_picture_makes_no_sample(hidden: bytes, behind: bytes) -> None:
    names, damages = read(member("p.jpg", b"\xff" * 512 + hidden) + behind)
    assert names == ["p.jpg", "c.txt"][: 1 + (C in behind)]
    assert len(damages) == (behind == END + C + END)


def test_bytes_put_into_a_member_are_noticed() -> None:
    first, second = walk(A[:800] + b"?" * 100 + A[800:] + C + END, "x"), walk(A + b"?" * 512 + C + END, "x")
    assert [d.suspect for d in first if isinstance(d, Damage)] == ["a.txt"]
    assert [d.suspect for d in second if isinstance(d, Damage)] == [None]


@pytest.mark.parametrize(
    ("data", "offset", "says"),
    [
        (b"", 0, "empty"),
        (b"hello" * 200, 0, "not a tar file"),
        (b"\x1f\x8b" + bytes(600), 0, "gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), 0, "zstd"),
        (END, 0, "no sample can be read: files named key.field"),
        (member("README", b"x") + END, 0, "no sample can be read: files named key.field"),
        (header(b"00000002000\0") + bytes(512), 0, "no sample can be read: a member of 1024 bytes leaves the file"),
        (SPARSE + END, 0, "sparse"),
        (header(kind=b"x", size=b"00000000012\0") + b"99 path=a\n".ljust(512, b"\0") + END, 0, "pax"),
        (header(kind=b"L", size=b"00077777777\0") + bytes(1 << 24) + END, 0, "over 1048576 bytes"),
    ],
)
def test_a_shard_without_a_sample_is_refused(tmp_path: Path, data: bytes, offset: int, says: str) -> None:
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(DamageError, match=says) as caught:
        Shard(tmp_path / "bad.tar")
    assert caught.value.offset == offset
    assert f"{tmp_path / 'bad.tar'} at byte {offset}: " in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not list(tmp_path.glob("*.npz"))


def test_a_pax_size_that_is_none(tmp_path: Path) -> None:
    pax = header(kind=b"x", size=b"00000000013\0") + b"11 size=-1\n".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(A + pax + header(name=b"n.txt") + C + END)
    events: list[DataEvent] = []
    assert [sample["__key__"] for sample in iter_shard(tmp_path / "a.tar", events)] == ["a", "c"]
    assert [(event.offset, event.key, event.cause) for event in events] == [(1536, "n", "header")]


def test_damage_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "_MAX_DAMAGES", 5)
    with pytest.raises(DamageError, match="over 5 damaged places"):
        list(walk((C + BAD) * 7 + END, "x"))


@pytest.mark.parametrize("hostile", [b"ustar", b"ustar\0" + b"00", b"7" * 300 + b"ustar" + b"0" * 207, header()[:256]])
def test_hostile_bytes_take_bounded_time(hostile: bytes) -> None:
    data = A + BAD + hostile * ((4 << 20) // len(hostile)) + C + END
    begin = time.perf_counter()
    assert read(data)[0][0] == "a.txt"
    assert time.perf_counter() - begin < 20


BLOCKS = st.one_of(
    st.sampled_from([A, B, C, END, BAD, LINK, SPARSE, bytes(512), member("t.tar", A + END)]),
    st.binary(max_size=600),
    st.builds(
        lambda size, kind, name: header(size, bytes([kind]), name) + name.ljust(512, b"\0"),
        st.one_of(st.binary(min_size=12, max_size=12), st.integers(0, 5000).map(lambda n: b"%011o\0" % n)),
        st.sampled_from(b"\0" + b"0157LKxgXSV"),
        st.binary(max_size=100),
    ),
)


@given(st.lists(BLOCKS, max_size=8), st.lists(st.tuples(st.integers(0, 8000), st.integers(0, 255)), max_size=4))
@settings(max_examples=400, deadline=None)
def test_any_bytes_are_walked(parts: list[bytes], changes: list[tuple[int, int]]) -> None:
    raw = bytearray(b"".join(parts))
    for place, value in changes:
        if place < len(raw):
            raw[place] = value
    try:
        found = list(walk(bytes(raw), "x"))
    except DamageError:
        return
    ends = [0]
    for item in found:
        assert 0 <= item.offset <= len(raw)
        end = item.end if isinstance(item, Damage) else item.offset + item.size
        assert ends[-1] <= item.offset and end <= len(raw) and item.offset <= end
        ends.append(end)


@given(st.binary(max_size=600))
@settings(max_examples=300, deadline=None)
def test_any_block_is_parsed(block: bytes) -> None:
    found = parse(block)
    assert found is None or (found.size >= -1 and len(block) >= 512)
    position = find_header(block + A, 0, has_magic=False)
    assert position is not None and position <= len(block)
    with contextlib.suppress(ValueError):
        assert all(isinstance(value, str) for value in pax_records(block).values())
