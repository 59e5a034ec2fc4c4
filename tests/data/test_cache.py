"""The cache of remote shards: whole files or none, whatever servers and processes do."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpretrain.data import cache as cache_module
from mmpretrain.data import remote, room
from mmpretrain.data.cache import cache_name, fetch, fetch_index
from mmpretrain.data.download import Cancelled, Retry
from mmpretrain.data.redact import redact, redact_text
from mmpretrain.data.web import is_public
from mmpretrain.errors import InputError
from tests.data.servers import (
    CREDENTIALS,
    Proxy,
    Store,
    Web,
    body,
    certificate,
    in_turn,
    ranged,
    redirect,
    send,
    status,
    store,
)

CONTENT = random.Random(0).randbytes(700_001)
S3 = {f"shards/{i}.tar": random.Random(i).randbytes(400_000) for i in range(6)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module, "RETRY", Retry(patience=8, attempts=6, first=0.02, most=0.1, stall=1))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


@pytest.fixture(scope="module")
def moto() -> Iterator[Store]:
    with store(S3) as server:
        yield server


@pytest.fixture
def proxy(moto: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the S3 store, which s3:// leads to; small blocks, so that a shard takes several."""
    monkeypatch.setattr(remote, "BLOCK", 100_000)
    with Proxy(moto.port) as server:
        lead_s3_to(server, monkeypatch)
        yield server


def lead_s3_to(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps the endpoint of the test before


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


# --- S3 ---------------------------------------------------------------------------------------------


def test_s3(proxy: Proxy, cache: Path) -> None:
    path = fetch("s3://shards/0.tar")
    assert path.read_bytes() == S3["shards/0.tar"]
    assert names(cache) == [path.name]
    assert len(proxy.gets) == 4
    assert fetch("s3://shards/0.tar") == path
    assert len(proxy.gets) == 4


def test_s3_slowed(proxy: Proxy) -> None:
    proxy.pause = 0.1
    assert fetch("s3://shards/1.tar").read_bytes() == S3["shards/1.tar"]


def test_s3_cut_in_the_middle_of_the_body(proxy: Proxy, cache: Path) -> None:
    proxy.cuts = [50_000, 30_000, 70_000, 1000, 90_000]
    assert fetch("s3://shards/2.tar").read_bytes() == S3["shards/2.tar"]
    assert proxy.cuts == []
    assert len(names(cache)) == 1


def test_s3_refusing_for_a_while(proxy: Proxy) -> None:
    proxy.refuse = True
    threading.Timer(1.0, lambda: setattr(proxy, "refuse", False)).start()
    assert fetch("s3://shards/3.tar").read_bytes() == S3["shards/3.tar"]


@pytest.mark.parametrize("url", ["s3://shards/none.tar", "s3://nothing/0.tar"])
def test_s3_missing_is_said_at_once(proxy: Proxy, cache: Path, url: str) -> None:
    with pytest.raises(InputError, match=f"cannot fetch {url}: FileNotFoundError"):
        fetch(url)
    assert len(proxy.gets) <= 1  # the store's client looks for a folder of that name
    assert names(cache) == []


def test_s3_without_credentials(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"Unable to locate credentials$"):
        fetch("s3://shards/0.tar")


def test_s3_killed_and_restarted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 50_000)
    monkeypatch.setattr(cache_module, "RETRY", Retry(patience=60, first=0.1, most=0.5))
    with store(S3) as server, Proxy(server.port) as proxy:
        lead_s3_to(proxy, monkeypatch)
        with ThreadPoolExecutor(1) as pool:
            proxy.pause = 0.1
            path = pool.submit(fetch, "s3://shards/4.tar")
            while proxy.passed < 100_000:
                time.sleep(0.01)
            server.kill()
            proxy.pause = 0.0
            assert not path.done()
            proxy.refuse = True  # until it has its objects again, else it would rightly say that there is none
            server.start(S3)
            proxy.refuse = False
            assert path.result(timeout=60).read_bytes() == S3["shards/4.tar"]
    assert len(names(cache)) == 1


# --- http -------------------------------------------------------------------------------------------


def test_http(web: Web, cache: Path) -> None:
    web.routes["/a.tar"] = body(CONTENT, Last_Modified="Wed, 21 Oct 2015 07:28:00 GMT")
    path = fetch(f"{web.url}/a.tar")
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mtime == 1445412480  # so that an index made before an eviction still holds
    assert fetch(f"{web.url}/a.tar") == path
    assert web.seen == ["/a.tar"]


def test_names_are_quoted_and_stay_in_the_folder(web: Web, cache: Path) -> None:
    web.routes["/a%20b/%C3%BC.tar"] = body(b"1")
    assert fetch(f"{web.url}/a b/ü.tar").read_bytes() == b"1"
    web.routes["/..%2F..%2Fx"] = body(b"2")
    assert fetch(f"{web.url}/..%2F..%2Fx").parent == cache
    assert len(cache_name("http://h/" + "ü" * 400)) < 150


@pytest.mark.parametrize("code", [500, 502, 503, 429, 408])
def test_what_can_get_better_is_tried_again(web: Web, code: int) -> None:
    web.routes["/a.tar"] = in_turn(status(code), status(code), body(CONTENT))
    assert fetch(f"{web.url}/a.tar").read_bytes() == CONTENT
    assert len(web.seen) == 3


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 416])
def test_what_cannot_is_not(web: Web, cache: Path, code: int) -> None:
    web.routes["/a.tar"] = status(code)
    with pytest.raises(InputError, match=f"cannot fetch {web.url}/a.tar: StatusError: the server answered {code} "):
        fetch(f"{web.url}/a.tar")
    assert len(web.seen) == 1
    assert names(cache) == []


def test_a_server_that_asks_for_time_gets_it(web: Web) -> None:
    web.routes["/a.tar"] = in_turn(status(503, Retry_After="1"), body(b"x"))
    before = time.monotonic()
    fetch(f"{web.url}/a.tar")
    assert time.monotonic() - before >= 1


def test_attempts_are_bounded(web: Web, cache: Path) -> None:
    web.routes["/a.tar"] = body(b"x" * 100, Content_Length="5000")  # promises more than it sends
    with pytest.raises(InputError, match=r"OSError: 100 of 5000 bytes arrived \(tried 6 times\)"):
        fetch(f"{web.url}/a.tar")
    assert 6 <= len(web.seen) <= 7
    assert names(cache) == []


def test_a_server_that_stalls(web: Web) -> None:
    over = threading.Event()

    def stalls(handler: object) -> None:
        send(handler, 200, CONTENT[:1000], Content_Length=str(len(CONTENT)))  # type: ignore[arg-type]
        over.wait(20)

    web.routes["/a.tar"] = in_turn(stalls, body(CONTENT))
    assert fetch(f"{web.url}/a.tar").read_bytes() == CONTENT
    over.set()


def test_nobody_answers(cache: Path) -> None:
    with Web() as gone:
        pass
    with pytest.raises(InputError, match="ConnectionRefusedError"):
        fetch(f"{gone.url}/a.tar")
    assert names(cache) == []


def test_a_cut_download_goes_on_where_it_was(web: Web) -> None:
    web.routes["/a.tar"] = in_turn(*[ranged(CONTENT, '"1"', 300_000)] * 2, ranged(CONTENT, '"1"'))
    assert fetch(f"{web.url}/a.tar").read_bytes() == CONTENT
    assert [headers.get("Range") for headers in web.headers] == [None, "bytes=300000-", "bytes=600000-"]


def test_a_file_that_changed_meanwhile_is_fetched_from_its_beginning(web: Web) -> None:
    new = bytes(len(CONTENT) - 5)
    web.routes["/a.tar"] = in_turn(ranged(CONTENT, '"1"', 300_000), ranged(new, '"2"'))
    assert fetch(f"{web.url}/a.tar").read_bytes() == new


def test_a_file_without_a_length_is_refused(web: Web) -> None:
    def endless(handler: object) -> None:
        handler.send_response(200)  # type: ignore[attr-defined]
        handler.end_headers()  # type: ignore[attr-defined]
        handler.wfile.write(b"x" * 100)  # type: ignore[attr-defined]

    web.routes["/a.tar"] = endless
    with pytest.raises(InputError, match="serve it with a Content-Length"):
        fetch(f"{web.url}/a.tar")


# --- redirects --------------------------------------------------------------------------------------


def test_redirects_on_the_named_host_are_followed(web: Web) -> None:
    web.routes["/a.tar"] = redirect("/b.tar")
    web.routes["/b.tar"] = redirect(f"{web.url}/c.tar?x=1", 307)
    web.routes["/c.tar"] = body(CONTENT)
    assert fetch(f"{web.url}/a.tar").read_bytes() == CONTENT
    assert web.seen == ["/a.tar", "/b.tar", "/c.tar?x=1"]


@pytest.mark.parametrize(
    "to",
    [
        "http://127.0.0.1:{other}/secret",  # another port of the same machine
        "http://127.0.0.2:{other}/secret",
        "http://localhost:{other}/secret",
        "http://2130706433:{other}/secret",  # 127.0.0.1 as a number
        "http://0x7f.1:{other}/secret",
        "http://0.0.0.0:{other}/secret",
        "http://[::1]:{other}/secret",
        "http://[::ffff:127.0.0.1]:{other}/secret",
        "http://169.254.169.254/latest/meta-data/",
        "//169.254.169.254/latest/meta-data/",
        "https://10.0.0.1/x",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "ftp://127.0.0.1/x",
        "s3://bucket/x",
        "gopher://127.0.0.1:{other}/x",
        "data:text/plain,x",
        "pipe:touch ran",
        "http://[::1/x",
        "http://127.0.0.1:port/",
    ],
)
def test_redirects_elsewhere_are_refused(web: Web, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Web("0.0.0.0") as other:
        other.routes["/secret"] = body(b"secret")
        web.routes["/a.tar"] = redirect(to.format(other=other.port))
        with pytest.raises(InputError, match=r"refused|valid host|names no host") as caught:
            fetch(f"{web.url}/a.tar")
        assert other.seen == []
    assert "\n" not in str(caught.value)
    assert len(web.seen) == 1
    assert not (tmp_path / "ran").exists()


def test_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted = certificate(tmp_path / "server.pem")
    with Web(certificate=trusted) as web, Web() as plain:
        web.routes["/a.tar"] = redirect("/b.tar")
        web.routes["/b.tar"] = body(CONTENT)
        web.routes["/down.tar"] = redirect(f"{plain.url}/c.tar")
        plain.routes["/up.tar"] = redirect(f"{web.url}/b.tar")
        with pytest.raises(InputError, match=r"SSLCert.*self-signed certificate \(\S+\)$"):
            fetch(f"{web.url}/a.tar")  # not tried again
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        assert fetch(f"{web.url}/a.tar").read_bytes() == CONTENT
        with pytest.raises(InputError, match="would not be encrypted"):
            fetch(f"{web.url}/down.tar")
        with pytest.raises(InputError, match="not a public address"):
            fetch(f"{plain.url}/up.tar")
        with pytest.raises(InputError, match="SSLCertVerificationError"):
            fetch(f"https://localhost:{web.port}/b.tar")  # the certificate is for the address
        assert plain.seen == ["/up.tar"]


def test_redirects_end(web: Web) -> None:
    web.routes["/a.tar"] = redirect("/a.tar?again")
    with pytest.raises(InputError, match="more than 5 redirects"):
        fetch(f"{web.url}/a.tar")
    assert len(web.seen) == 6


def test_a_redirect_to_a_name_of_a_private_address_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "localhost"  # the one name that surely resolves here, to what the named host is too
    web.routes["/a.tar"] = redirect(f"http://{name}:{web.port}/b.tar")
    with pytest.raises(InputError, match="not a public address"):
        fetch(f"{web.url}/a.tar")
    assert web.seen == ["/a.tar"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("198.18.0.1", False),
        ("240.0.0.1", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


# --- secrets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/data/a?b.tar", "/data/a?b.tar"),
        ("https://h/a.tar", "https://h/a.tar"),
        ("https://me:pw@h:8080/a/b.tar?X-Amz-Signature=pw#pw", "https://h:8080/a/b.tar"),
        ("https://h?token=pw", "https://h"),
        ("https://me:p/w@h/a.tar", "https://..."),
        ("https://me:p?w@h/a.tar", "https://..."),
        ("https://me@pw@h/a.tar", "https://h/a.tar"),
        ("s3://key:pw@bucket/a.tar?versionId=pw", "s3://bucket/a.tar"),
        ("hf://datasets/me/set@main/a.tar", "hf://datasets/me/set@main/a.tar"),
        ("http://[::1]:80/a.tar?pw", "http://[::1]:80/a.tar"),
    ],
)
def test_redact(name: str, shown: str) -> None:
    assert redact(name) == shown
    assert redact(shown) == shown


@given(st.text(st.characters(blacklist_characters="/?#@", blacklist_categories=["Cs"]), min_size=3))
def test_no_password_is_shown(password: str) -> None:
    secret = f"zq{password}qz"
    for url in (f"https://me:{secret}@host/a.tar", f"https://host/a.tar?t={secret}", f"s3://b/a.tar#{secret}"):
        assert secret not in redact(url)


def test_messages_of_others_are_redacted() -> None:
    said = "ClientError: GET 'https://me:pw@h/a.tar?sig=pw' and url='/a.tar?X-Amz-Signature=pw&x=pw' and https://h/b?pw"
    assert redact_text(said) == "ClientError: GET 'https://h/a.tar' and url='/a.tar' and https://h/b"


def test_no_secret_in_any_message(web: Web, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    host = f"127.0.0.1:{web.port}"
    web.routes["/moved.tar"] = redirect("http://10.0.0.1/x?token=hunter2")
    web.routes["/ftp.tar"] = redirect("ftp://me:hunter2@host/x?token=hunter2")
    web.routes["/a.tar"] = in_turn(status(503), body(b"x"))
    path = fetch(f"http://me:hunter2@{host}/a.tar?X-Amz-Signature=hunter2")
    assert "hunter2" not in path.name
    urls = [f"http://me:hunter2@{host}/{name}?signature=hunter2" for name in ("none.tar", "moved.tar", "ftp.tar")]
    urls += [
        "http://me:hunter2@h:port/a.tar?hunter2",
        "https://me:hunter2@?hunter2",
        "ftp://me:hunter2@h/a.tar?hunter2",
    ]
    for url in urls:
        with pytest.raises(InputError) as caught:
            fetch(url)
        assert "hunter2" not in str(caught.value), url
        assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or not caught.value.__context__)
    assert "hunter2" not in "".join(capfd.readouterr())


def test_a_password_goes_to_the_named_host_only(web: Web) -> None:
    web.routes["/a.tar"] = redirect(f"http://me:other@127.0.0.1:{web.port}/b.tar")
    web.routes["/b.tar"] = body(b"x")
    fetch(f"http://me:p%40ss@127.0.0.1:{web.port}/a.tar")
    assert {headers["Authorization"] for headers in web.headers} == {"Basic bWU6cEBzcw=="}


# --- one folder, many processes ---------------------------------------------------------------------


def test_two_processes_download_once(proxy: Proxy, cache: Path) -> None:
    proxy.pause = 0.02
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.3, 0.3]))  # both are there
        paths = list(pool.map(fetch, ["s3://shards/5.tar"] * 2))
    assert [path.read_bytes() for path in paths] == [S3["shards/5.tar"]] * 2
    assert len(proxy.gets) == 1
    assert len(names(cache)) == 1


def test_threads_download_once(web: Web) -> None:
    web.routes["/a.tar"] = body(CONTENT)
    with ThreadPoolExecutor(8) as pool:
        assert all(path.read_bytes() == CONTENT for path in pool.map(fetch, [f"{web.url}/a.tar"] * 8))
    assert len(web.seen) == 1


def test_when_one_fails_the_next_tries(web: Web) -> None:
    web.routes["/a.tar"] = in_turn(status(404), body(CONTENT))
    with ThreadPoolExecutor(2) as pool:
        tries = [pool.submit(fetch, f"{web.url}/a.tar") for _ in range(2)]
        failed = [attempt.exception() for attempt in tries]
    assert sum(error is None for error in failed) == 1


def test_a_file_system_without_locks(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    web.routes["/a.tar"] = body(CONTENT)
    with ThreadPoolExecutor(4) as pool:
        assert all(path.read_bytes() == CONTENT for path in pool.map(fetch, [f"{web.url}/a.tar"] * 4))
    assert len(names(cache)) == 1


KILLED = """
import sys
from mmpretrain.data.cache import fetch
fetch(sys.argv[1])
"""


def test_a_kill_leaves_nothing_that_is_taken_for_a_shard(web: Web, cache: Path) -> None:
    got, over = threading.Event(), threading.Event()

    def half(handler: object) -> None:
        send(handler, 200, CONTENT[:350_000], Content_Length=str(len(CONTENT)))  # type: ignore[arg-type]
        got.set()
        over.wait(30)

    web.routes["/a.tar"] = in_turn(half, body(CONTENT))
    web.routes["/b.tar"] = body(b"another")
    process = subprocess.Popen([sys.executable, "-c", KILLED, f"{web.url}/a.tar"])
    assert got.wait(30)
    part = cache / f".{cache_name(f'{web.url}/a.tar')}.part"
    while part.read_bytes()[:350_000] != CONTENT[:350_000]:
        time.sleep(0.01)
    fetch(f"{web.url}/b.tar")  # another process's running download is left alone
    assert part.exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    over.set()
    assert part.stat().st_size == len(CONTENT)  # the whole size is reserved, so size alone would prove nothing
    assert not (cache / cache_name(f"{web.url}/a.tar")).exists()
    web.routes["/c.tar"] = body(b"a third")
    fetch(f"{web.url}/c.tar")
    assert not part.exists()  # what the killed one left is cleaned up
    assert fetch(f"{web.url}/a.tar").read_bytes() == CONTENT


def test_a_killed_download_is_taken_over(web: Web, cache: Path) -> None:
    web.routes["/a.tar"] = body(CONTENT)
    cache.mkdir(parents=True)
    (cache / f".{cache_name(f'{web.url}/a.tar')}.part").write_bytes(b"junk" * 1_000_000)
    assert fetch(f"{web.url}/a.tar").read_bytes() == CONTENT
    assert len(names(cache)) == 1


def test_a_download_that_hangs_elsewhere_is_not_waited_for(
    web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.routes["/a.tar"] = body(CONTENT)
    cache.mkdir(parents=True)
    monkeypatch.setattr(room, "STALE", 0.5)
    with (cache / f".{cache_name(f'{web.url}/a.tar')}.part").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert fetch(f"{web.url}/a.tar").read_bytes() == CONTENT


def test_cancelled(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "RETRY", Retry(patience=60))
    web.routes["/a.tar"] = status(503, Retry_After="30")
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    before = time.monotonic()
    with pytest.raises(Cancelled):
        fetch(f"{web.url}/a.tar", cancelled=cancelled)
    assert time.monotonic() - before < 10  # not the seconds until the next try
    assert names(cache) == []


# --- the limit --------------------------------------------------------------------------------------


def held(folder: Path) -> int:
    sizes = {}
    with room._locked(folder):  # nobody makes room meanwhile: what was removed and what came after it are not both seen
        for item in folder.iterdir():
            with suppress(FileNotFoundError):  # it has got its final name, under which it may be seen again
                status = item.stat()
                sizes[status.st_ino] = 0 if item.name.endswith(".npz") else status.st_size
    return sum(sizes.values())


def test_the_folder_stays_below_its_limit(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPRETRAIN_CACHE_BYTES", "250000")
    monkeypatch.setattr(room, "GRACE", 0.0)
    for i in range(12):
        web.routes[f"/{i}.tar"] = body(bytes([i]) * 60_000)
    (cache).mkdir(parents=True)
    (cache / "mine.txt").write_bytes(b"not ours to remove" * 1000)
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            with contextlib.suppress(FileNotFoundError):
                most = max(most, held(cache) - 18_000)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(12):
        path = fetch(f"{web.url}/{i}.tar")
        assert path.read_bytes() == bytes([i]) * 60_000
        path.with_name(path.name + ".idx.npz").write_bytes(b"an index")
        fetch(f"{web.url}/0.tar")  # used all the time
    over.set()
    watcher.join()
    assert 0 < most <= 250_000
    assert web.seen.count("/0.tar") == 1
    kept = [name.split("-")[1] for name in names(cache) if name.endswith(".tar")]
    assert sorted(kept) == ["0.tar", "10.tar", "11.tar", "9.tar"]
    assert sum(name.endswith(".npz") for name in names(cache)) == 12
    assert (cache / "mine.txt").exists()


def test_many_processes_stay_below_the_limit(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPRETRAIN_CACHE_BYTES", "250000")
    monkeypatch.setattr(room, "GRACE", 0.1)
    for i in range(16):
        web.routes[f"/{i}.tar"] = body(bytes([i]) * 60_000)
    for turn in range(12):  # a shard that got its name while another process counted was missed in one of six
        folder = tmp_path / str(turn) / "shards"
        folder.mkdir(parents=True)
        monkeypatch.setenv("MMPRETRAIN_CACHE", str(folder.parent))
        with ThreadPoolExecutor(8) as pool:
            sizes = pool.map(lambda i: (fetch(f"{web.url}/{i}.tar"), held(folder))[1], range(16))  # noqa: B023
            assert max(sizes) <= 250_000
        assert held(folder) == 240_000


def test_a_shard_just_used_is_removed_last(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPRETRAIN_CACHE_BYTES", "100000")
    monkeypatch.setattr(room, "GRACE", 1.0)
    for i in range(2):
        web.routes[f"/{i}.tar"] = body(bytes(60_000))
    fetch(f"{web.url}/0.tar")
    before = time.monotonic()
    fetch(f"{web.url}/1.tar")  # nothing but the first can make room
    assert time.monotonic() - before >= 0.9
    assert held(cache) == 60_000


def test_an_evicted_shard_that_is_mapped_reads_on(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmap

    monkeypatch.setenv("MMPRETRAIN_CACHE_BYTES", str(len(CONTENT) + 10))
    monkeypatch.setattr(room, "GRACE", 0.0)
    web.routes["/a.tar"] = web.routes["/b.tar"] = body(CONTENT)
    path = fetch(f"{web.url}/a.tar")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    fetch(f"{web.url}/b.tar")
    assert not path.exists()
    assert mapped[:] == CONTENT


def test_a_shard_larger_than_the_limit(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPRETRAIN_CACHE_BYTES", "1000")
    web.routes["/a.tar"] = body(CONTENT)
    with pytest.raises(InputError, match=r"700001 bytes are more than the cache may hold \(1000\)"):
        fetch(f"{web.url}/a.tar")
    assert names(cache) == []


@pytest.mark.parametrize("given", ["100 GB", "-1", "1e9", "²"])
def test_a_limit_that_is_no_number(web: Web, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("MMPRETRAIN_CACHE_BYTES", given)
    web.routes["/a.tar"] = body(CONTENT)
    with pytest.raises(InputError, match="expected a number of bytes"):
        fetch(f"{web.url}/a.tar")


def test_the_limit_is_never_more_than_the_disk_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = room.limit(tmp_path)
    monkeypatch.setenv("MMPRETRAIN_CACHE_BYTES", "9" * 30)
    assert 0 < half < room.limit(tmp_path) < 9 * 10**20


def test_a_cache_that_cannot_be_made(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    web.routes["/a.tar"] = body(CONTENT)
    with pytest.raises(InputError, match="set MMPRETRAIN_CACHE"):
        fetch(f"{web.url}/a.tar", tmp_path / "file")


# --- indexes ------------------------------------------------------------------------------------------


def test_an_index_is_fetched_where_the_reader_looks_for_it(web: Web, cache: Path) -> None:
    web.routes["/a.tar"] = body(CONTENT)
    web.routes["/a.tar.idx.npz"] = body(b"index")
    index = fetch_index(f"{web.url}/a.tar")
    assert index is not None and index.read_bytes() == b"index"
    path = fetch(f"{web.url}/a.tar")
    assert index == path.with_name(f"{path.name}.idx.npz") == fetch_index(f"{web.url}/a.tar")
    assert web.seen == ["/a.tar.idx.npz", "/a.tar"]
    assert fetch_index(f"{web.url}/b.tar") is None
    assert fetch_index(f"{web.url}/a.tar?sig=1") is None
    assert len(web.seen) == 3


def test_a_huge_index_is_refused(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MOST_INDEX", 1000)
    web.routes["/a.tar.idx.npz"] = body(CONTENT)
    assert fetch_index(f"{web.url}/a.tar") is None
    assert names(cache) == []


# --- schemes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("hf", "huggingface_hub"), ("s3", "s3fs")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str) -> None:
    import fsspec  # noqa: F401 (loads its registry)

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(InputError, match=rf"pip install 'mmpretrain-contrastive\[{scheme}\]'"):
        fetch(f"{scheme}://bucket/a.tar")


@pytest.mark.parametrize("url", ["ftp://h/a.tar", "pipe:cat x", "simplecache::s3://b/a.tar", "github://a:b@c/x.tar"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="has the scheme"):
        fetch(url)
