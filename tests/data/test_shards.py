"""Shards: found by pattern, fetched, and read exactly as webdataset reads them."""

import functools
import http.server
import io
import os
import pickle
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpretrain.data import index as tar_index
from mmpretrain.data.cache import fetch
from mmpretrain.data.shards import Shard, expand, iter_shard
from mmpretrain.data.tar import DamageError, walk
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
    assert list(iter_shard(path)) == by_webdataset(path)
    assert len(Shard(path)) == 6 + (format != tarfile.USTAR_FORMAT)


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
    try:
        expected = by_webdataset(path)
    except ValueError:  # webdataset refuses a field that comes twice
        with pytest.raises(DamageError, match="second member"):
            Shard(path)
    else:
        assert list(iter_shard(path)) == expected


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


def header(size: bytes = b"00000000000\0", kind: bytes = b"0", name: bytes = b"a.txt") -> bytes:
    raw = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0"
    raw = (raw + b" " * 8 + kind).ljust(257, b"\0") + b"ustar\00000"
    raw = raw.ljust(512, b"\0")
    return raw[:148] + f"{sum(raw):06o}\0 ".encode() + raw[156:]


END = bytes(1024)


def test_sizes_in_base_256() -> None:
    data = header(size=b"\x80" + (700).to_bytes(11, "big")) + bytes(1024) + header(name=b"b.txt") + END
    assert [member[:3] for member in walk(data, "x")] == [("a.txt", 512, 700), ("b.txt", 2048, 0)]


def test_old_headers() -> None:
    folder = header(kind=b"\0", name=b"d.x/", size=b"00000002000\0")  # v7: a folder by its slash, without bytes
    times = header(name=b"b.txt")[:345] + b"14712345670\0" * 2  # GNU keeps times where ustar has the prefix
    times = times[:257] + b"ustar  \0" + times[265:].ljust(247, b"\0")
    times = times[:148] + b" " * 8 + times[156:]
    times = times[:148] + f"{sum(times):06o}\0 ".encode() + times[156:]
    assert [member.name for member in walk(folder + times + END, "x")] == ["b.txt"]


# --- damage: an error with shard and offset, never a hang or a wrong sample -----------------------


@pytest.mark.parametrize(
    ("data", "offset", "says"),
    [
        (b"", 0, "empty"),
        (b"hello" * 200, 0, "not a tar file"),
        (b"\x1f\x8b" + bytes(600), 0, "gzip"),
        (header() + b"x" * 512, 512, "damaged header"),
        (header(), 512, "no end mark"),
        (header() + bytes(100), 512, "inside a header"),
        (header(size=b"00000002000\0") + bytes(512), 0, "leaves the file"),
        (header(size=b"\xff" * 11 + b"\x00") + END, 0, "no valid size"),
        (header(size=b"-0000000512\0") + END, 0, "no valid size"),
        (header(size=b"\x80" + b"\xff" * 11) + END, 0, "leaves the file"),
        (header() + header(name=b"a.txt") + END, 512, "second member"),
        (header() + END + header(name=b"b.txt") + END, 512, "bytes behind the end mark"),
        (header(kind=b"S") + END, 0, "sparse"),
        (header(kind=b"x", size=b"00000000012\0") + b"99 path=a\n".ljust(512, b"\0") + END, 0, "pax"),
        (
            header(kind=b"x", size=b"00000000013\0") + b"11 size=-1\n".ljust(512, b"\0") + header() + END,
            1024,
            "size",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, data: bytes, offset: int, says: str) -> None:
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(DamageError, match=says) as caught:
        Shard(tmp_path / "bad.tar")
    assert caught.value.offset == offset
    assert f"{tmp_path / 'bad.tar'} at byte {offset}: " in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not list(tmp_path.glob("*.npz"))


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_change_gives_a_shard_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(small(tmp_path / "a.tar", 2).read_bytes()[: 9 * 512])
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 4607), st.integers(0, 255)), max_size=4)):
        if place < len(raw):
            raw[place] = value
    try:
        index = tar_index.build(bytes(raw), "x", (len(raw), 0))
    except InputError:
        return
    assert (index.offset + index.size <= len(raw)).all()


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
    with pytest.raises(InputError, match="changed since it was opened"):
        old.read(0)


def test_a_read_only_folder_gets_its_index_in_the_cache(tmp_path: Path, cache: Path) -> None:
    path = small(tmp_path / "a.tar")
    (tmp_path / "a.tar.idx.npz").mkdir()  # root may write anywhere, but nobody replaces a folder by a file
    assert len(Shard(path)) == 3
    assert [item.name.split("-", 1)[1] for item in cache.iterdir()] == ["a.tar.idx.npz"]
    assert not [item for item in tmp_path.iterdir() if item.name.endswith(".tmp")]
    assert len(Shard(path)) == 3
    assert len(Shard(path, cache_dir=tmp_path / "other")) == 3
    assert len(list((tmp_path / "other").iterdir())) == 1


@given(st.data())
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_index_is_made_again(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.tar"
    if not path.exists():
        small(path)
        Shard(path)
        shutil.copy(tmp_path / "a.tar.idx.npz", tmp_path / "good")
    raw = bytearray((tmp_path / "good").read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=3)):
        raw[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    (tmp_path / "a.tar.idx.npz").write_bytes(raw[:cut])
    assert [sample["txt"] for sample in iter_shard(path)] == [b"txt 0", b"txt 1", b"txt 2"]


@pytest.mark.parametrize("name", ["offset", "size", "field", "starts", "keys", "fields"])
def test_a_forged_index_is_not_believed(tmp_path: Path, name: str) -> None:
    path = small(tmp_path / "a.tar")
    Shard(path)
    place = tmp_path / "a.tar.idx.npz"
    with np.load(place) as file:
        arrays = dict(file)
    for forged in (
        arrays[name][:1],
        arrays[name].astype(np.int64) + 2**62,
        np.array(0),
        np.array([object()]),
    ):
        with place.open("wb") as out:
            np.savez(out, **{**arrays, name: forged})
        assert tar_index.load(place, tar_index.stamp_of(path)) is None
    assert Shard(path).read(2)["txt"] == b"txt 2"


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
        (["00000.tar", "gs://bucket/a.tar"], "scheme 'gs'"),
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


# --- fetch ----------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        if "shrunk" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
        else:
            super().do_HEAD()

    def do_GET(self) -> None:
        if "shrunk" in self.path:  # replaced by a shorter one between the two requests
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * 100)
            return
        if "short" in self.path:  # promises more than it sends, as a server that dies does
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
            self.close_connection = True
            return
        self.requests.append(self.path)
        super().do_GET()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, list[str], Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    requests: list[str] = []
    handler = type("Handler", (Quiet,), {"requests": requests})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests, folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_over_http_once(web: tuple[str, list[str], Path], cache: Path) -> None:
    address, requests, folder = web
    small(folder / "a.tar", 50)
    path = fetch(f"{address}/a.tar")
    assert path.parent == cache and path.read_bytes() == (folder / "a.tar").read_bytes()
    assert fetch(f"{address}/a.tar") == path
    assert requests == ["/a.tar"]
    assert list(iter_shard(f"{address}/a.tar")) == by_webdataset(folder / "a.tar")
    assert sorted(item.name for item in cache.iterdir()) == [path.name, path.name + ".idx.npz"]


def test_urls_with_one_base_name_do_not_meet(web: tuple[str, list[str], Path], tmp_path: Path) -> None:
    address, _, folder = web
    for i in range(2):
        (folder / str(i)).mkdir()
        small(folder / str(i) / "a.tar", i + 1)
    assert [len(Shard(f"{address}/{i}/a.tar", cache_dir=tmp_path / "c")) for i in range(2)] == [1, 2]


def test_concurrent_fetches_of_one_url(web: tuple[str, list[str], Path], cache: Path) -> None:
    address, requests, folder = web
    content = write(folder / "a.tar", {f"{i}.bin": os.urandom(300_000) for i in range(10)}).read_bytes()
    gate = threading.Barrier(8)

    def go(_: int) -> bytes:
        gate.wait()
        return fetch(f"{address}/a.tar").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(got == content for got in pool.map(go, range(8)))
    assert len(requests) > 1  # they did race
    assert len(list(cache.iterdir())) == 1
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        fresh = [f"{address}/a.tar?again"] * 2
        assert {path.read_bytes() for path in processes.map(fetch, fresh)} == {content}


@pytest.mark.parametrize("name", ["missing.tar", "short.tar", "shrunk.tar"])
def test_a_failed_download_leaves_nothing(web: tuple[str, list[str], Path], cache: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"cannot fetch {web[0]}/{name}"):
        fetch(f"{web[0]}/{name}")
    assert list(cache.iterdir()) == []


def test_fetch_of_local_files(tmp_path: Path) -> None:
    path = small(tmp_path / "a b.tar")
    assert fetch(path) == fetch(str(path)) == fetch(path.as_uri()) == path
    with pytest.raises(InputError, match="does not exist"):
        fetch(tmp_path / "no.tar")
    with pytest.raises(InputError, match="scheme 'pipe'"):
        fetch("pipe:cat a.tar")


def test_fetch_from_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    from botocore.session import get_session
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            monkeypatch.setenv(name, value)
        client = get_session().create_client("s3")
        client.create_bucket(Bucket="shards")
        for i in range(2):
            content = small(tmp_path / f"{i}.tar", i + 1).read_bytes()
            client.put_object(Bucket="shards", Key=f"deep/{i}.tar", Body=content)
        shards = [Shard(url) for url in expand("s3://shards/deep/{0..1}.tar")]
        assert [len(shard) for shard in shards] == [1, 2]
        assert shards[1].read(1) == {"jpg": b"jpg 1", "txt": b"txt 1"}
        with pytest.raises(InputError, match=r"cannot fetch s3://shards/deep/2\.tar"):
            fetch("s3://shards/deep/2.tar")
    finally:
        server.stop()


def test_without_s3fs_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    pytest.importorskip("fsspec")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(InputError, match=r"pip install 'mmpretrain-contrastive\[s3\]'"):
        fetch("s3://bucket/a.tar")
