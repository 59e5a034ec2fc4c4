"""From shards to steps: the same rows for any ranks and workers, damage that costs one row, clear errors at setup."""

from __future__ import annotations

import itertools
import os
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from mmpretrain.data.datamodule import DataModule, Source, Step
from mmpretrain.data.decode import Image, TextCaption
from mmpretrain.data.events import DataEvent
from mmpretrain.data.examples import short_names
from mmpretrain.data.preprocess import Augment
from mmpretrain.errors import InputError
from tests.data.pictures import data_module, fields, picture, tokenizer, write_shards
from tests.data.servers import Web, body


def steps(data: DataModule, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = 7) -> list[Step]:
    return list(data.loader(rank, world_size, start, stop))


def flat(names: list[list[str]] | tuple[list[str], ...]) -> list[str]:
    return list(itertools.chain.from_iterable(names))


def ids(found: list[Step]) -> list[list[str]]:
    return [[name for part in step.trace.ids.values() for name in part] for step in found]


def events(found: list[Step]) -> list[DataEvent]:
    return [event for step in found for part in step.trace.events.values() for event in part]


def image(step: Step, source: str = "pictures") -> torch.Tensor:
    return step.batches[source]["image"].values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    return write_shards(folder, undecodable=["0003", "0019", "0025"], silent=["0004"], bare=["0030"])


def test_ids_are_those_of_the_rows(folder: Path) -> None:
    for step in steps(data_module(folder)):
        pixels, names = image(step)[:, 0, 4, 4].tolist(), step.trace.ids["pictures"]
        assert [f"{value // 10}.tar:{value:04}" for value in pixels] == names


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than this machine's cores
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_workers_and_resuming_change_no_row(folder: Path, workers: int, world_size: int) -> None:
    want = steps(data_module(folder))
    shares = [steps(data_module(folder, num_workers=workers), rank, world_size, start=2) for rank in range(world_size)]
    for number, parts in enumerate(zip(*shares, strict=True), start=2):
        assert flat(ids(list(parts))) == ids([want[number]])[0]
        assert torch.equal(torch.cat([image(part) for part in parts]), image(want[number]))
        assert events(list(parts)) == events([want[number]])


def test_one_row_and_one_event_for_each_lost_sample(folder: Path) -> None:
    epoch = steps(data_module(folder), stop=5)  # 40 samples in batches of 8
    found = {(Path(e.shard).name, e.key): (e.cause, e.detail) for e in events(epoch)}
    assert {name: cause for name, (cause, _) in found.items()} == {
        ("0.tar", "0003"): "undecodable",
        ("1.tar", "0019"): "undecodable",
        ("2.tar", "0025"): "undecodable",
        ("0.tar", "0004"): "missing",
        ("3.tar", "0030"): "missing",
    }
    assert found["0.tar", "0004"][1] == "sample '0004' has an empty text"
    assert len(events(epoch)) == 5
    for event in events(epoch):
        name = f"{event.key}.{'txt' if event.key == '0004' else 'png'}"
        with tarfile.open(event.shard) as tar:
            assert event.offset == tar.getmember(name).offset_data
    drawn = flat(ids(epoch))
    # 0003 and 0004 are lost, so both rows take 0005; after the last sample of a shard comes its first.
    for lost, instead in {"0:0003": "0:0005", "1:0019": "1:0010", "2:0025": "2:0026", "3:0030": "3:0031"}.items():
        assert lost.replace(":", ".tar:") not in drawn
        assert drawn.count(instead.replace(":", ".tar:")) == (3 if instead == "0:0005" else 2)
    assert len(drawn) == 40


def test_flipped_bytes_are_lost_to_their_checksum(tmp_path: Path) -> None:
    write_shards(tmp_path)
    steps(data_module(tmp_path), stop=1)  # makes the indexes
    path = tmp_path / "2.tar"
    stat, data = path.stat(), bytearray(path.read_bytes())
    at = data.index(picture(23)) + 30
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (event,) = events(steps(data_module(tmp_path), stop=5))
    assert (Path(event.shard).name, event.key, event.cause) == ("2.tar", "0023", "checksum")


def test_a_shard_full_of_damage_gives_its_rows_to_the_next(tmp_path: Path) -> None:
    write_shards(tmp_path, count=3, undecodable=[f"{n:04}" for n in range(10, 20)])
    epoch = steps(data_module(tmp_path, batch=10), stop=3)
    assert len(events(epoch)) == 10 and len(flat(ids(epoch))) == 30
    taken = Counter(flat(ids(epoch)))
    assert {name: n for name, n in taken.items() if n > 1} == {f"2.tar:{n:04}": 2 for n in range(20, 30)}


def test_where_nothing_can_be_read_the_run_says_which_sample_was_first(tmp_path: Path) -> None:
    write_shards(tmp_path)
    data = data_module(tmp_path)
    data.setup()
    for source in data.sources.values():
        source.fields = {"text": TextCaption("json")}
    with pytest.raises(InputError, match=r"0\.tar: sample '0007' and all tried in its place are lost.*no field json"):
        data._examples()["pictures", (0, 7)]


def test_a_fault_of_the_config_stops_at_setup_naming_the_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, undecodable=["0000"])
    data_module(tmp_path).setup()  # the first sample is bad, the next one tried is not
    wrong = Source(str(tmp_path), {"image": Image(Augment(8), extensions=("jpg",)), "text": TextCaption()})
    with pytest.raises(InputError, match=r"none of the 8 samples tried can be used; .*/0\.tar: .*no field jpg"):
        DataModule({"pictures": wrong}, {"text": tokenizer()}, 8, seed=0).setup()
    without = DataModule({"pictures": Source(str(tmp_path), fields())}, {}, 8, seed=0)
    with pytest.raises(InputError, match="'text' is text but has no tokenizer"):
        without.setup()


def test_every_part_of_a_mixture_is_tried(tmp_path: Path) -> None:
    write_shards(tmp_path / "a")
    write_shards(tmp_path / "b", bare=[f"{n:04}" for n in range(40)])
    source = Source({"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}, fields())
    with pytest.raises(InputError, match=r"none of the 8 samples tried can be used; .*/b/0\.tar"):
        DataModule({"pictures": source}, {"text": tokenizer()}, 8, seed=0).setup()


def test_a_mixture_has_its_shares_in_every_batch(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", count=2)
    write_shards(tmp_path / "b", count=5)
    parts = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    data = DataModule(
        {"pictures": Source(parts, fields(), weights={"a": 2, "b": 1})}, {"text": tokenizer()}, 12, seed=0
    )
    whole = ids(steps(data))
    for names in whole:
        assert [sum(name.startswith(part) for name in names) for part in ("a/", "b/")] == [8, 4]
    ranks = [ids(steps(data, rank, 3)) for rank in range(3)]
    assert [flat(parts) for parts in zip(*ranks)] == whole
    assert data.sizes()["pictures"] == (7, 70)


def test_sources_come_one_after_the_other_in_every_step(tmp_path: Path) -> None:
    write_shards(tmp_path / "a"), write_shards(tmp_path / "b", undecodable=["0011"])
    sources = {name: Source(str(tmp_path / name), fields()) for name in ("b", "a")}
    found = steps(DataModule(sources, {"text": tokenizer()}, 8, seed=0), stop=5)
    assert all(list(step.batches) == list(step.trace.ids) == ["b", "a"] for step in found)
    assert [len(step.trace.events["b"]) for step in found].count(1) == 1
    assert [name for step in found for name in step.trace.ids["a"]] != [
        name for step in found for name in step.trace.ids["b"]
    ]


def test_a_limit_takes_the_first_samples_only(tmp_path: Path) -> None:
    write_shards(tmp_path, undecodable=["0012"])
    data = data_module(tmp_path, limit=13)
    drawn = {name for names in ids(steps(data, stop=20)) for name in names}
    assert drawn == {f"{n // 10}.tar:{n:04}" for n in range(12)}
    assert data.sizes()["pictures"].samples == 13
    with pytest.raises(InputError, match="7 samples in 4 shards cannot fill a global batch of 8"):
        data_module(tmp_path, limit=7).setup()


def test_more_known_losses_than_allowed_stop_at_setup(tmp_path: Path) -> None:
    write_shards(tmp_path, size=100)
    data_module(tmp_path).setup()  # the indexes know what was there before
    data = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(data[: len(data) * 9 // 10])
    with pytest.raises(InputError, match=r"truncated.*more than data.max_bad_fraction=0\.01; worst is .*/1\.tar with"):
        data_module(tmp_path).setup()
    loose = data_module(tmp_path, max_bad_fraction=0.1)
    loose.setup()
    assert {event.shard for event in loose.known_events()["pictures"]} == {str(tmp_path / "1.tar")}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": 0}, "data.limit is 0"),
        ({"max_bad_fraction": 1.5}, "data.max_bad_fraction is 1.5"),
        ({"num_workers": -1}, "data.num_workers is -1"),
    ],
)
def test_bad_numbers_are_refused(tmp_path: Path, options: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        data_module(tmp_path, **options)


def test_weights_need_parts_of_the_same_names() -> None:
    with pytest.raises(InputError, match=r"data.weights names \['x'\], data.train \['a', 'b'\]"):
        Source({"a": "a.tar", "b": "b.tar"}, fields(), weights={"x": 1})
    with pytest.raises(InputError, match=r"data.weights names \['a'\], data.train \[\]"):
        Source("a.tar", fields(), weights={"a": 1})


def test_a_batch_that_ranks_cannot_share_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="global_batch_size 8 cannot be divided over 3 ranks"):
        data_module(folder).loader(0, 3, 0, 1)


def test_short_names_are_the_same_wherever_the_shards_lie() -> None:
    assert short_names(["/x/y/0.tar", "/x/y/1.tar"]) == ["0.tar", "1.tar"]
    assert short_names(["s3://b/p/u/0.tar", "s3://b/p/v/0.tar"]) == ["u/0.tar", "v/0.tar"]
    assert short_names(["0.tar"]) == ["0.tar"]
    assert short_names(["/x/0.tar", "/x/y/0.tar"]) == ["0.tar", "y/0.tar"]


def test_the_board_names_the_sample_being_read(tmp_path: Path) -> None:
    write_shards(tmp_path)
    data = data_module(tmp_path)
    data.setup()
    seen = []

    def look(sample: object, generator: object) -> torch.Tensor:
        seen.extend((reading.source, reading.shard, reading.row) for reading in data.board.reading())
        return torch.zeros(1)

    data.sources["pictures"].fields = {"image": look}
    data._examples()["pictures", (0, 27)]
    assert seen == [(0, 2, 7)] and data.board.reading() == []


def test_one_seed_another_order(folder: Path) -> None:
    one, two = (
        DataModule({"pictures": Source(str(folder), fields())}, {"text": tokenizer()}, 8, seed=s) for s in (0, 1)
    )
    assert ids(steps(one, stop=2)) != ids(steps(two, stop=2))
    assert ids(steps(one, stop=2)) == ids(steps(one, stop=2))


def test_remote_shards_are_fetched_ahead_and_ids_keep_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "local")
    with Web() as server:
        names = [f"{server.url}/{shard}.tar?key=secret" for shard in range(4)]
        for shard in range(4):
            server.routes[f"/{shard}.tar"] = body((tmp_path / "local" / f"{shard}.tar").read_bytes())
        data = DataModule({"pictures": Source(names, fields())}, {"text": tokenizer()}, 8, seed=3)
        loader = data.loader(0, 1, 0, 7)
        assert ids(list(loader)) == ids(steps(data_module(tmp_path / "local")))
        for tar in (tmp_path / "cache" / "shards").glob("*.tar"):
            tar.unlink()
        sampler = iter(loader.batch_sampler)
        assert not list((tmp_path / "cache" / "shards").glob("*.tar"))  # nothing is fetched before the first step
        next(sampler)
        end = time.monotonic() + 20
        while len(list((tmp_path / "cache" / "shards").glob("*.tar"))) < 4:
            assert time.monotonic() < end
            time.sleep(0.01)
        sampler.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
