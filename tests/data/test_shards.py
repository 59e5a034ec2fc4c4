"""Shards: found by pattern, fetched, and read exactly as webdataset reads them."""

import io
import os
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpretrain.data import index as tar_index
from mmpretrain.data.events import DataEvent
from mmpretrain.data.shards import ChecksumError, Shard, expand, iter_shard
from mmpretrain.data.tar import DamageError
from mmpretrain.errors import InputError

LONG = "d" * 90 + "/" + "e" * 120 + "/" + "k" * 200  # beyond ustar's 100 + 155
FILES = {
    "b/0001.jpg": b"\xff\xd8picture",
    "b/0001.txt": b"a cat",
    "b/0001.seg.PNG": b"x" * 1500,
    "b/0002.jpg": b"",
    "b/0002.json": b"{}" * 256,  # exactly one block
    "a.x/ü 3.txt": "ünï".encode(),
    "top.cls": b"7",
    "README": b"no field",
    ".hidden": b"no key",
    "__meta__/x.txt": b"skipped",
    "b/0001.txt.again": b"same key again, not beside the first",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def by_webdataset(path: Path) -> list[dict[str, Any]]:
    """Group a tar as webdataset does, without decoding."""
    with path.open("rb") as stream:
        source = wds.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        return [
            {name: value for name, value in sample.items() if name != "__url__"}
            for sample in wds.tariterators.group_by_keys(source)
        ]


def joined(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join samples of one key, as we do wherever their members lie."""
    found: dict[str, dict[str, Any]] = {}
    for sample in samples:
        found.setdefault(sample["__key__"], {}).update(sample)
    return list(found.values())


def write(path: Path, files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def small(path: Path, samples: int = 3) -> Path:
    files = {f"{i:04}.{field}": f"{field} {i}".encode() for i in range(samples) for field in ("jpg", "txt")}
    return write(path, files)


# --- reading: every writer's files equal webdataset's own reading ---------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_of_pythons_tarfile(tmp_path: Path, format: int) -> None:
    long = {} if format == tarfile.USTAR_FORMAT else {LONG + ".jpg": b"1", LONG + ".txt": b"2"}
    ustar = {"p" * 80 + "/" + "q" * 90 + ".txt": b"uses the prefix field"}
    path = write(tmp_path / "a.tar", {**FILES, **ustar, **long}, format)
    assert list(iter_shard(path)) == joined(by_webdataset(path))
    assert len(by_webdataset(path)) == len(Shard(path)) + 1  # webdataset makes two of b/0001
    assert len(Shard(path)) == 5 + (format != tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_files_of_gnu_tar(tmp_path: Path, format: str) -> None:
    names = [name for name in FILES if not (format == "v7" and name.startswith("__"))]
    if format in ("gnu", "oldgnu", "posix"):
        names += [LONG + ".jpg"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(FILES.get(name, b"long"))
    (tmp_path / "in" / "link.jpg").symlink_to("top.cls")
    os.link(tmp_path / "in" / "top.cls", tmp_path / "in" / "zzz.hard")
    path = tmp_path / "a.tar"
    subprocess.run(["tar", f"--format={format}", "--sort=name", "-cf", path, "-C", tmp_path / "in", "."], check=True)
    read = list(iter_shard(path))
    assert read == by_webdataset(path)
    assert {"./b/0002", "./top", "./a.x/ü 3"} <= {sample["__key__"] for sample in read}


def test_files_of_webdatasets_writer(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(20):
            writer.write({"__key__": f"x/{i:03}", "jpg": bytes([i]) * i * 100, "json": {"n": i}, "txt": "ö"})
    read = list(iter_shard(tmp_path / "a.tar"))
    assert read == by_webdataset(tmp_path / "a.tar")
    assert len(read) == 20


# Hidden files are where we differ, see the next test.
NAMES = st.text(st.sampled_from("ab./_AÖ"), min_size=1, max_size=12).filter(
    lambda name: name[-1] != "/" and name.rpartition("/")[2][0] != "."
)


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=600)), max_size=12, unique_by=lambda file: file[0]),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_names_group_as_in_webdataset(tmp_path: Path, files: list[tuple[str, bytes]], format: int) -> None:
    path = write(tmp_path / "h.tar", dict(files), format)
    with tarfile.open(path) as tar:
        keys = [(m.name.rpartition("/")[0], m.name.rpartition("/")[2].split(".")[0]) for m in tar if "." in m.name]
    try:
        expected = by_webdataset(path)
    except ValueError:  # webdataset refuses a field that comes twice
        events: list[DataEvent] = []
        assert len(list(iter_shard(path, events))) <= len(set(keys))
        assert {event.cause for event in events} == {"duplicate"}
        return
    try:
        assert list(iter_shard(path)) == joined(expected)
    except DamageError as error:
        assert expected == [] and "no sample can be read: files named key.field" in str(error)


def test_hidden_files_are_no_samples(tmp_path: Path) -> None:
    files = {"a/.DS_Store": b"", "a/1.jpg": b"1", "a/._1.txt": b"Mac", "a/1.txt": b"2", ".x.jpg": b""}
    path = write(tmp_path / "a.tar", files)
    assert list(iter_shard(path)) == [{"__key__": "a/1", "jpg": b"1", "txt": b"2"}]
    assert len(by_webdataset(path)) == 4


def test_pax_sizes_and_global_headers(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hello"}) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 700
        info.pax_headers = {"size": "700", "mtime": "1.5"}
        tar.addfile(info, io.BytesIO(b"z" * 700))
        tar.addfile(tarfile.TarInfo("b.txt"))
    assert list(iter_shard(tmp_path / "a.tar")) == by_webdataset(tmp_path / "a.tar")


# --- Shard and its index --------------------------------------------------------------------------


def test_random_access(tmp_path: Path) -> None:
    shard = Shard(small(tmp_path / "a.tar"))
    assert len(shard) == 3
    assert list(shard.keys) == ["0000", "0001", "0002"]
    assert shard.fields(2) == ["jpg", "txt"]
    assert shard.sizes(2) == {"jpg": 5, "txt": 5}
    assert shard.read(2) == {"jpg": b"jpg 2", "txt": b"txt 2"}
    for i in (3, -1):
        with pytest.raises(IndexError):
            shard.read(i)


def test_more_shards_than_file_descriptors(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    shards = [Shard(small(tmp_path / f"{i}.tar", 2)) for i in range(150)]
    for _ in range(2):
        assert all(shard.read(1)["txt"] == b"txt 1" for shard in shards)
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 100


def read_one(shard: Shard) -> dict[str, bytes]:
    return shard.read(1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_shards_cross_process_borders(tmp_path: Path, method: str) -> None:
    shard = Shard(small(tmp_path / "a.tar"))
    expected = shard.read(1)
    with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
        assert list(pool.map(read_one, [shard] * 4)) == [expected] * 4


def test_the_index_is_kept_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", {**FILES, "caf\udce9.txt": b"not UTF-8"})
    first = Shard(path)
    assert (tmp_path / "a.tar.idx.npz").is_file()
    monkeypatch.setattr(tar_index, "build", None)  # a second walk would fail
    second = Shard(path)
    assert list(second.keys) == list(first.keys)
    assert [second.read(i) for i in range(len(second))] == [first.read(i) for i in range(len(first))]


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_shard_gets_a_new_index(tmp_path: Path, change: str) -> None:
    path = small(tmp_path / "a.tar", 3)
    old = Shard(path)
    before = path.stat()
    small(path, 30 if change == "size" else 2)
    if change == "size":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size != before.st_size
    else:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert path.stat().st_size == before.st_size
    assert len(Shard(path)) == (30 if change == "size" else 2)
    if change == "size":
        with pytest.raises(InputError, match="changed since it was opened"):
            old.read(0)
    else:  # the checksums tell, sample by sample
        assert old.read(0) == {"jpg": b"jpg 0", "txt": b"txt 0"}
        with pytest.raises(ChecksumError, match="has other bytes"):
            old.read(2)


def test_a_read_only_folder_gets_its_index_in_the_cache(tmp_path: Path, cache: Path) -> None:
    path = small(tmp_path / "a.tar")
    (tmp_path / "a.tar.idx.npz").mkdir()  # root may write anywhere, but nobody replaces a folder by a file
    assert len(Shard(path)) == 3
    assert [item.name.split("-", 1)[1] for item in cache.iterdir()] == ["a.tar.idx.npz"]
    assert not [item for item in tmp_path.iterdir() if item.name.endswith(".tmp")]
    assert len(Shard(path)) == 3
    assert len(Shard(path, cache_dir=tmp_path / "other")) == 3
    assert len(list((tmp_path / "other").iterdir())) == 1


# --- expand ---------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for i in (2, 0, 1):
        small(tmp_path / f"{i:05}.tar", 1)
    (tmp_path / "notes.txt").write_text("no shard")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_expand_finds_local_shards(three: Path) -> None:
    names = [f"{i:05}.tar" for i in range(3)]
    full = [str(three / name) for name in names]
    assert expand("{00000..00002}.tar") == names
    assert expand("0000{2,0}.tar") == ["00002.tar", "00000.tar"]
    assert expand("*.tar") == expand("0000?.tar") == expand("[0-9]*.tar") == names
    assert expand(str(three)) == expand(f"{three}/*.tar") == full
    assert expand(["00001.tar", f"{three}/{{00000,00001}}.tar"]) == ["00001.tar", *full[:2]]
    assert expand(full[0]) == full[:1]


def test_expand_keeps_urls(three: Path) -> None:
    assert expand("s3://bucket/{00..02}.tar") == [f"s3://bucket/{i:02}.tar" for i in range(3)]
    assert expand("https://host/a.tar?x=1*2") == ["https://host/a.tar?x=1*2"]
    assert expand(f"file://{three}/{{00000..00001}}.tar") == [f"file://{three}/0000{i}.tar" for i in range(2)]


def test_a_name_with_braces_is_found(tmp_path: Path) -> None:
    odd = small(tmp_path / "a{0..1}[x].tar")
    assert expand(str(odd)) == [str(odd)]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("pipe:touch ran.txt", "scheme 'pipe'"),
        ("PIPE:cat x", "scheme 'pipe'"),
        (["00000.tar", "ftp://bucket/a.tar"], "scheme 'ftp'"),
        ("simplecache::s3://bucket/a.tar", "scheme 'simplecache"),
        ("file://host/a.tar", "names the host 'host'"),
        ("missing.tar", "'missing.tar' does not exist"),
        ("{00000..00007}.tar", "'00003.tar' does not exist"),
        ("nothing*.tar", "does not exist"),
        ("s3://bucket/*.tar", "remote glob"),
        ("{00..01.tar", "unbalanced braces"),
        ("", "empty shard name"),
        ([], "no shards"),
    ],
)
def test_expand_refuses(three: Path, spec: str | list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        expand(spec)
    assert not (three / "ran.txt").exists()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \*\.tar"):
        expand(str(tmp_path / "empty"))
