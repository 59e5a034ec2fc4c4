"""Prefetch: the shards of the coming steps are there before they are read, and not more than that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmpretrain.data import cache as cache_module
from mmpretrain.data.cache import cache_name, fetch
from mmpretrain.data.download import Retry
from mmpretrain.data.prefetch import Prefetch
from mmpretrain.errors import InputError
from tests.data.servers import CREDENTIALS, Proxy, Web, body, in_turn, status, store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module, "RETRY", Retry(patience=8, attempts=3, first=0.02, most=0.1))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        for i in range(20):
            server.routes[f"/{i}.tar"] = body(bytes([i]) * 5000)
        yield server


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def running() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_it_runs_ahead_and_not_too_far(web: Web, cache: Path) -> None:
    def needed(step: int) -> list[str]:
        return [f"{web.url}/{step}.tar"]

    with Prefetch(needed, first_step=2, horizon=3) as prefetch:
        until(lambda: len(web.seen) == 3)
        time.sleep(0.2)
        assert sorted(web.seen) == ["/2.tar", "/3.tar", "/4.tar"]
        prefetch.advance(4)
        until(lambda: len(web.seen) == 5)
        prefetch.advance(1)  # steps do not go back
        prefetch.advance(10)
        until(lambda: (cache / cache_name(f"{web.url}/12.tar")).exists())
        time.sleep(0.2)
        assert {f"/{i}.tar" for i in (2, 3, 4, 5, 6, 10, 11, 12)} == set(web.seen)
    assert running() == 0


def test_the_reader_finds_them(web: Web, cache: Path) -> None:
    names = [f"{web.url}/{i // 4}.tar" for i in range(40)]  # four steps to a shard
    with Prefetch(lambda step: names[step : step + 1], horizon=8) as prefetch:
        for step, name in enumerate(names):
            prefetch.advance(step)
            if step >= 8 and step % 4 == 0:
                until(lambda: (cache / cache_name(name)).exists())  # noqa: B023 (called at once)
            assert fetch(name).read_bytes() == bytes([step // 4]) * 5000
    assert len(web.seen) == 10


def test_a_slow_s3_store_is_read_ahead_of(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    objects = {f"shards/{i}.tar": bytes([i]) * 50_000 for i in range(4)}
    urls = [f"s3://{name}" for name in objects]
    with store(objects) as server, Proxy(server.port) as proxy:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.pause = 0.1
        with Prefetch(lambda step: urls[step : step + 1], horizon=3) as prefetch:
            until(lambda: all((cache / cache_name(url)).exists() for url in urls[:3]))
            asked = len(proxy.gets)
            for step in range(3):
                prefetch.advance(0)
                assert fetch(urls[step]).read_bytes() == objects[f"shards/{step}.tar"]
            assert len(proxy.gets) == asked == 3  # nothing was left to wait for


def test_errors_are_left_to_the_reader(web: Web) -> None:
    web.routes["/0.tar"] = in_turn(status(404), status(404), body(b"late"))
    names = [f"{web.url}/0.tar", f"{web.url}/1.tar"]
    with Prefetch(lambda step: names[step : step + 1], horizon=2):
        until(lambda: len(web.seen) == 2)
        with pytest.raises(InputError, match="404"):
            fetch(names[0])
        assert fetch(names[0]).read_bytes() == b"late"


def test_local_shards_need_nothing(tmp_path: Path) -> None:
    looked: list[int] = []

    def needed(step: int) -> list[str]:
        looked.append(step)
        return [str(tmp_path / "none.tar"), (tmp_path / "none.tar").as_uri()]

    with Prefetch(needed, horizon=4):
        until(lambda: looked == [0, 1, 2, 3])


def test_it_asks_once_for_a_shard_of_many_steps(web: Web) -> None:
    with Prefetch(lambda _: [f"{web.url}/{i}.tar" for i in range(3)], horizon=200):
        until(lambda: len(web.seen) == 3)
        time.sleep(0.1)
    assert sorted(web.seen) == ["/0.tar", "/1.tar", "/2.tar"]


def test_it_stops_in_the_middle_of_a_download(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "RETRY", Retry(patience=60))
    web.routes["/0.tar"] = status(503, Retry_After="30")
    prefetch = Prefetch(lambda _: [f"{web.url}/0.tar"], horizon=1)
    until(lambda: len(web.seen) == 1)
    before = time.monotonic()
    prefetch.close()
    prefetch.close()
    assert time.monotonic() - before < 10  # not the seconds until the next try
    assert running() == 0
    assert list(cache.iterdir()) == []


def test_advance_does_not_wait_for_a_slow_look_ahead(web: Web) -> None:
    asked, go_on, answered = threading.Event(), threading.Event(), threading.Event()

    def needed(step: int) -> list[str]:
        asked.set()
        go_on.wait(60)
        answered.set()
        return []

    with Prefetch(needed, horizon=2) as prefetch:
        assert asked.wait(60)
        prefetch.advance(1)
        assert not answered.is_set()
        go_on.set()
