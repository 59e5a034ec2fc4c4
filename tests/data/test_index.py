"""The index of a shard: kept, checked, never believed blindly, and a witness of what was lost."""

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpretrain.data import index as tar_index
from mmpretrain.data import shards
from mmpretrain.data.events import DataEvent
from mmpretrain.data.shards import ChecksumError, Shard, iter_shard
from mmpretrain.data.tar import DamageError
from mmpretrain.errors import InputError
from tests.data.test_tar import BAD, END, member


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def parts(samples: int = 6) -> list[bytes]:
    return [member(f"{i:04}.{field}", f"{field} {i}".encode() * 30) for i in range(samples) for field in ("jpg", "txt")]


def place(path: Path, members: list[bytes]) -> Path:
    """Write a shard with a time of its own, as the file system's clock is coarse."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_bytes(b"".join(members) + END)
    os.utime(path, ns=(before + 10**9, before + 10**9))
    return path


def read(path: Path) -> tuple[list[str], list[tuple[str | None, str]]]:
    events: list[DataEvent] = []
    keys = [sample["__key__"] for sample in iter_shard(path, events)]
    return keys, [(event.key, event.cause) for event in events]


KEYS = [f"{i:04}" for i in range(6)]


# --- members, keys, duplicates ----------------------------------------------------------------------


def test_members_of_one_key_are_joined_wherever_they_lie(tmp_path: Path) -> None:
    members = parts()
    random.Random(0).shuffle(members)
    shard = Shard(place(tmp_path / "a.tar", members))
    assert sorted(shard.keys) == KEYS and shard.events == [] and shard.lost == 0
    assert shard.read(shard.keys.index("0003")) == {"jpg": b"jpg 3" * 30, "txt": b"txt 3" * 30}


def test_of_a_field_that_is_there_twice_the_first_is_read(tmp_path: Path) -> None:
    shard = Shard(place(tmp_path / "a.tar", [*parts(2), member("0000.TXT", b"again"), member("0001.__key__", b"")]))
    assert shard.read(0)["txt"] == b"txt 0" * 30
    assert shard.fields(1) == ["jpg", "txt"]
    assert [(event.key, event.cause) for event in shard.events] == [("0000", "duplicate"), ("0001", "refused")]
    assert len(shard) == 2 and shard.lost == 0


def test_fields_may_differ(tmp_path: Path) -> None:
    assert read(place(tmp_path / "a.tar", [*parts(3), member("x.jpg", b"1"), member("y.json", b"2")]))[1] == []


# --- without an index from before -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda m: [*m[:3], BAD + m[3][512:], *m[4:]], ["0001"]),  # its txt, told by what it lacks
        (lambda m: [*m[:4], bytes(512) + m[4][512:], *m[5:]], ["0002"]),
        (lambda m: [*m[:4], m[4][:9] + b"?" + m[4][10:], *m[5:]], ["0002"]),
        (lambda m: [*m[:5], BAD, *m[5:]], ["0002"]),  # between two members of one sample
        (lambda m: [*m[:4], BAD, *m[4:]], ["x" * 100]),  # between two samples: nobody's
        (lambda m: [*m[:7], bytes(512) + m[7][512:], bytes(1024), *m[9:]], ["0003", "0004"]),
    ],
)
def test_damage_at_the_first_use(tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], lost: list[str]) -> None:
    keys, events = read(place(tmp_path / "a.tar", change(parts())))
    assert [key or "x" * 100 for key, _ in events] == lost
    assert keys == [key for key in KEYS if key not in lost]
    shard = Shard(tmp_path / "a.tar")
    assert (len(shard), shard.lost) == (len(keys), len(lost))


@pytest.mark.parametrize(
    ("raw", "counted"),
    [
        (b"".join(parts()), 0),  # no end mark
        (b"".join(parts()) + parts()[0][:300], 1),  # cut inside a header
        (b"".join(parts(2)) + END + b"".join(parts()[4:]) + END, 0),  # cat a.tar b.tar
        (b"".join(parts(2)).ljust(10240, b"\0") + b"".join(parts()[4:]) + END, 0),
        (b"".join(parts(2)) + bytes(512) + b"".join(parts()[4:]) + END, 1),  # as much as an empty member takes
        (b"".join(parts(2)) + bytes(4096) + b"".join(parts()[4:]) + END, 1),  # a hole
        (b"".join(parts(2)) + bytes(512) + BAD + b"".join(parts()[4:]) + END, 1),
        (b"".join(parts(2)[:-1]) + END + b"".join(parts()[4:]) + END, 1),  # a member is gone
        (END + b"".join(parts()) + END, 1),
    ],
)
def test_an_end_mark_is_no_sample(tmp_path: Path, raw: bytes, counted: int) -> None:
    (tmp_path / "a.tar").write_bytes(raw)
    shard = Shard(tmp_path / "a.tar")
    assert len(shard.events) == 1 and shard.lost == counted
    shards._index_of.cache_clear()
    assert Shard(tmp_path / "a.tar").lost == counted


# --- an index from before is a witness --------------------------------------------------------------


def test_what_an_older_index_knew_is_missed(tmp_path: Path) -> None:
    path, members = tmp_path / "a.tar", parts()
    sound = Shard(place(path, members))
    flipped = members[6][:520] + b"?" + members[6][521:]
    place(path, [*members[:2], *members[3:6], flipped, *members[7:]])
    expected = [("0003", "checksum"), ("0001", "missing")]
    assert sorted(read(path)[1]) == sorted(expected)
    for _ in range(3):  # the witness stays as long as the damage
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
        keys, events = read(path)
        assert keys == ["0000", "0002", "0004", "0005"] and sorted(events) == sorted(expected)
    assert Shard(path).lost == 2 and Shard(path).digest != sound.digest
    assert "delete its .idx.npz" in Shard(path).events[0].detail
    place(path, members)
    assert read(path) == (KEYS, []) and Shard(path).digest == sound.digest  # repaired
    place(path, [*members[:2], *members[3:]])
    path.with_name("a.tar.idx.npz").unlink()  # accepted
    assert read(path) == (KEYS, [])


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda m: [*m, *parts(9)[12:]], [f"{i:04}" for i in range(9)]),  # grew
        (lambda m: m[4:], KEYS[2:]),  # shrank
        (lambda m: m[::2], KEYS),  # without the captions
        (lambda m: [part.replace(b"jpg ", b"JPG ").replace(b"txt ", b"TXT ") for part in m], KEYS),  # new content
        (lambda m: [part.replace(b"jpg ", b"JPG ") for part in m], KEYS),  # new pictures
        (lambda m: [part.replace(b"jpg ", b"JPG ") for part in m[:8]] + m[8:], KEYS),  # most of them
        (lambda m: [member(f"n{i}.jpg", b"x") for i in range(3)], ["n0", "n1", "n2"]),
    ],
)
def test_a_shard_written_anew_is_believed(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], keys: list[str]
) -> None:
    Shard(place(tmp_path / "a.tar", parts()))
    assert read(place(tmp_path / "a.tar", change(parts()))) == (keys, [])


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda m: [part.replace(b"jpg ", b"JPG ") for part in m[:6]] + m[6:], KEYS[:3]),  # only half of the pictures
        (lambda m: [part.replace(b"jpg ", b"JPG ").replace(b"txt 5", b"TXT 5") for part in m], KEYS[5:]),
        (lambda m: [*m[:2], BAD, *[part.replace(b"jpg ", b"JPG ") for part in m[2:]]], KEYS[1:]),  # damaged, too
    ],
)
def test_bytes_that_changed_in_part_are_lost(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], lost: list[str]
) -> None:
    members = [*parts(), *(member(f"{key}.cls", b"1") for key in KEYS)]
    path = place(tmp_path / "a.tar", members)
    Shard(path)
    keys, events = read(place(path, change(members)))
    assert keys == [key for key in KEYS if key not in lost]
    assert {key for key, cause in events if cause == "checksum"} == set(lost)


def test_a_cut_shard_names_what_it_lost(tmp_path: Path) -> None:
    path = place(tmp_path / "a.tar", parts())
    Shard(path)
    path.write_bytes(path.read_bytes()[:6000])
    keys, events = read(path)
    assert keys == KEYS[: len(keys)]
    assert sorted({key for key, _ in events if key is not None} | set(keys)) == KEYS
    assert Shard(path).lost == 6 - len(keys)


# --- bytes that change under an index ---------------------------------------------------------------


def flip(path: Path, at: int, later: int = 0) -> None:
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + later))


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("later", [0, 10**9])
def test_a_flipped_byte_costs_one_sample(tmp_path: Path, later: int, opened: bool) -> None:
    path = place(tmp_path / "a.tar", parts())
    shard = Shard(path)
    if opened:
        shard.read(3)
    flip(path, 1024 + 512 + 5, later)  # in 0000.txt
    if not later:  # else the shard has no index any more
        flip(path, 2048 + 5)  # a header: the index knows the place
    with pytest.raises(ChecksumError, match="txt has other bytes") as caught:
        shard.read(0)
    assert caught.value.event[:4] == (str(path), 1536, "0000", "checksum")
    assert pickle.loads(pickle.dumps(caught.value)).event == caught.value.event
    assert shard.read(1) == {"jpg": b"jpg 1" * 30, "txt": b"txt 1" * 30}
    assert read(path) == (KEYS[1:], [("0000", "checksum")])


def test_a_shard_cut_while_it_is_read(tmp_path: Path) -> None:
    path = place(tmp_path / "a.tar", parts())
    shard = Shard(path)
    shard.read(0)
    os.truncate(path, 3000)
    assert shard.read(0)["txt"] == b"txt 0" * 30
    with pytest.raises(InputError, match="changed since it was opened"):
        shard.read(5)
    path.unlink()
    with pytest.raises(InputError, match="does not exist"):
        shard.read(5)


# --- held and passed on cheaply ---------------------------------------------------------------------


def test_a_shard_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(tmp_path / "a.tar", parts(500))
    digest = Shard(path).digest
    monkeypatch.setattr(tar_index, "load", None)  # the counts need no more than the head
    shard = Shard(path)
    assert (len(shard), shard.lost, shard.digest) == (500, 0, digest)
    assert len(pickle.dumps(shard)) < 1000


def test_more_shards_than_indexes_in_memory(tmp_path: Path) -> None:
    found = [Shard(place(tmp_path / f"{i}.tar", parts(2))) for i in range(80)]
    assert all(list(shard.keys) == KEYS[:2] for shard in found * 2)
    assert shards._index_of.cache_info().currsize <= 64


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    a, b = place(tmp_path / "a.tar", parts()), place(tmp_path / "x" / "b.tar", parts())
    os.utime(b, ns=(5, 5))
    c = place(tmp_path / "c.tar", [*parts()[:-1], member("0005.txt", b"other")])
    assert Shard(a).digest == Shard(b).digest != Shard(c).digest


def test_the_digest_does_not_depend_on_what_was_known_before(tmp_path: Path) -> None:
    path, members = tmp_path / "a.tar", parts()
    Shard(place(path, members))
    place(path, [*members[:2], BAD, *members[3:]])  # with a witness
    known = Shard(path)
    assert known.index.lost
    path.with_name("a.tar.idx.npz").unlink()
    shards._index_of.cache_clear()
    first = Shard(path)
    assert not first.index.lost
    assert known.keys == first.keys and known.digest == first.digest


# --- the file may be damaged or forged --------------------------------------------------------------


@given(st.data())
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_index_is_made_again(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.tar"
    if not path.exists():
        Shard(place(path, parts()))
        shutil.copy(tmp_path / "a.tar.idx.npz", tmp_path / "good")
    raw = bytearray((tmp_path / "good").read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=3)):
        raw[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    (tmp_path / "a.tar.idx.npz").write_bytes(raw[:cut])
    shards._index_of.cache_clear()
    assert [sample["txt"] for sample in iter_shard(path)] == [f"txt {i}".encode() * 30 for i in range(6)]


def forge(path: Path, **changed: np.ndarray) -> None:
    with np.load(path) as file:
        arrays = {**dict(file), **changed}
    with path.open("wb") as out:
        np.savez(out, **arrays)


@pytest.mark.parametrize("name", ["head", "rows", "starts", "keys", "fields", "losses"])
def test_a_forged_index_is_not_believed(tmp_path: Path, name: str) -> None:
    path = place(tmp_path / "a.tar", parts())
    Shard(path)
    kept, stamp = tmp_path / "a.tar.idx.npz", tar_index.stamp_of(path)
    shutil.copy(kept, tmp_path / "good")
    with np.load(kept) as file:
        array = file[name]
    for forged in (array[:1], array.astype(np.int64) + 2**62, np.array(0), np.array([object()])):
        shutil.copy(tmp_path / "good", kept)
        forge(kept, **{name: forged})
        assert tar_index.load(kept, "a", stamp) is None
    deep = np.frombuffer(b"[" * 100_000, np.uint8)
    shutil.copy(tmp_path / "good", kept)
    forge(kept, **{name: deep})
    assert tar_index.load(kept, "a", stamp) is None
    shards._index_of.cache_clear()
    assert Shard(path).read(2)["txt"] == b"txt 2" * 30


def test_places_outside_the_shard_are_refused(tmp_path: Path) -> None:
    path = place(tmp_path / "a.tar", parts())
    index, stamp = Shard(path).index, tar_index.stamp_of(path)
    for column, value in ((0, 2), (1, 2**63), (2, 2**64 - 1), (2, stamp[0])):
        rows = index.rows.copy()
        rows[3, column] = value
        tar_index.save(index._replace(rows=rows), tmp_path / "forged")  # with a digest that fits
        assert tar_index.load(tmp_path / "forged", "a", stamp) is None


def test_a_packed_index_is_refused(tmp_path: Path) -> None:
    path = place(tmp_path / "a.tar", parts())
    Shard(path)
    kept = tmp_path / "a.tar.idx.npz"
    with zipfile.ZipFile(kept) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(kept, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    assert tar_index.load_head(kept, tar_index.stamp_of(path)) is None


@given(
    st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3)),
    st.binary(max_size=40),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_head_and_losses_are_read(tmp_path: Path, value: object, raw: bytes) -> None:
    path = tmp_path / "a.tar"
    if not path.exists():
        Shard(place(path, parts()))
    kept, stamp = tmp_path / "forged", tar_index.stamp_of(path)
    for losses in (json.dumps(value).encode(), json.dumps({"events": [value], "lost": {"k": value}}).encode(), raw):
        shutil.copy(tmp_path / "a.tar.idx.npz", kept)
        forge(kept, losses=np.frombuffer(losses, np.uint8))
        assert tar_index.load(kept, "a", stamp) is None
        forge(kept, head=np.frombuffer(losses, np.uint8))
        assert tar_index.load_head(kept, stamp) is None


def test_no_sample_left_keeps_the_witness(tmp_path: Path) -> None:
    path = place(tmp_path / "a.tar", parts(1))
    Shard(path)
    raw = (tmp_path / "a.tar.idx.npz").read_bytes()
    place(path, [parts(1)[0], BAD])
    with pytest.raises(DamageError, match="no sample can be read"):
        Shard(path)
    assert (tmp_path / "a.tar.idx.npz").read_bytes() == raw
