"""Shards read from a server: with their index beside them, evicted while in use, with a secret in their address."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmpretrain import InputError
from mmpretrain.data.shards import Shard, iter_shard
from mmpretrain.data.tar import DamageError
from tests.data.servers import Web, body


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def web(shards: Path) -> Iterator[Web]:
    with Web() as server:
        server.routes["/0.tar"] = body((shards / "00000.tar").read_bytes())
        yield server


def serve_index(web: Web, shards: Path) -> None:
    Shard(shards / "00000.tar")
    web.routes["/0.tar.idx.npz"] = body((shards / "00000.tar.idx.npz").read_bytes())


def test_it_is_read_as_from_the_disk(web: Web, shards: Path) -> None:
    assert list(iter_shard(f"{web.url}/0.tar")) == list(iter_shard(shards / "00000.tar"))


def test_with_its_index_beside_it_it_is_counted_without_being_fetched(web: Web, shards: Path) -> None:
    serve_index(web, shards)
    local, remote = Shard(shards / "00000.tar"), Shard(f"{web.url}/0.tar")
    assert (len(remote), remote.keys, remote.digest, remote.events) == (len(local), local.keys, local.digest, [])
    assert web.seen == ["/0.tar.idx.npz"]
    assert pickle.loads(pickle.dumps(remote)).read(3) == local.read(3)
    assert web.seen == ["/0.tar.idx.npz", "/0.tar"]


def test_one_that_made_room_for_others_is_fetched_again(web: Web, shards: Path, cache: Path) -> None:
    Shard(f"{web.url}/0.tar")
    (found,) = cache.glob("*.tar")
    found.unlink()  # what the cache does where it needs room
    assert Shard(f"{web.url}/0.tar").read(0) == Shard(shards / "00000.tar").read(0)
    assert web.seen.count("/0.tar") == 2


def test_one_that_was_no_tar_is_fetched_again(web: Web, shards: Path, cache: Path) -> None:
    right, web.routes["/0.tar"] = web.routes["/0.tar"], body(b"<html>busy</html>" * 100)
    with pytest.raises(DamageError, match="not a tar file"):
        Shard(f"{web.url}/0.tar")
    assert not list(cache.glob("*.tar"))
    web.routes["/0.tar"] = right
    assert Shard(f"{web.url}/0.tar").read(0) == Shard(shards / "00000.tar").read(0)


def test_an_index_of_another_shard_is_named(web: Web, shards: Path) -> None:
    serve_index(web, shards)
    web.routes["/0.tar"] = body((shards / "00001.tar").read_bytes() + bytes(10240))
    with pytest.raises(InputError, match="its index is of one of"):
        Shard(f"{web.url}/0.tar").read(0)


def test_a_secret_in_the_address_is_shown_nowhere(web: Web, shards: Path) -> None:
    data = bytearray((shards / "00000.tar").read_bytes())
    data[200] ^= 0xFF  # the first header
    web.routes["/0.tar"] = body(bytes(data))
    shard = Shard(f"{web.url}/0.tar?X-Amz-Signature=hidden")
    assert "hidden" not in shard.name and shard.events
    assert not any("hidden" in str(event) for event in shard.events)
