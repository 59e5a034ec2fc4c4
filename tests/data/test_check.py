"""Checking shards: every kind of fault is found, counted and named; a sound set has none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mmpretrain.data.check import Wanted, check_shard
from mmpretrain.data.check_report import Report, share_of, summarize
from mmpretrain.data.decode import Image, JsonCaption, TextCaption
from mmpretrain.data.preflight import extensions, summary
from mmpretrain.data.shards import Shard
from tests.faults.broken_sets import headers_flipped, pack, picture, sound, twice


def check(*paths: Path, wanted: Wanted | None = None, decode: int | None = None) -> Report:
    wanted = Wanted() if wanted is None else wanted
    return summarize([check_shard(str(path), wanted, decode) for path in paths], wanted)


def test_a_sound_set_has_no_problem(shards: Path) -> None:
    paths = sorted(shards.glob("*.tar"))
    report = check(*paths)
    assert report.problems == [] and report.lost == 0
    assert (report.shards, report.samples) == (4, 64)
    assert report.fields == {"cls": 64, "json": 64, "png": 64, "txt": 64}
    assert report.bytes == sum(len(data) for p in paths for i in range(16) for data in Shard(p).read(i).values())
    assert report.undecodable["image"].of == report.undecodable["text"].of == 64
    texts = [Shard(p).read(i)["txt"].decode() for p in paths for i in range(16)]
    assert report.caption_characters == {"8-15": sum(8 <= len(text) < 16 for text in texts)}
    assert report.caption_words == {"2-3": 64}


def test_every_fault_is_counted_and_named(tmp_path: Path) -> None:
    samples = [sound(i) for i in range(20)]
    samples[1]["png"] = b"\x89PNG no picture"
    samples[2]["txt"] = b"caf\xe9"
    samples[3]["txt"] = b" \n"
    del samples[4]["txt"]
    samples[5] = {"txt": b"no picture"}
    path = pack(tmp_path / "a.tar", samples)
    report = check(path)
    assert report.samples == 20 and report.lost == 0
    assert report.undecodable["image"].faults == 1 and report.undecodable["image"].of == 19
    assert report.undecodable["text"].faults == 1 and report.undecodable["text"].of == 19
    assert report.empty_captions.faults == 1
    assert report.missing["image"].faults == report.missing["text"].faults == 1
    found = {"0001": "unreadable image", "0002": "UTF-8", "0003": "empty", "0004": "no txt or json", "0005": "only txt"}
    assert len(report.problems) == 5
    for key, words in found.items():
        (line,) = (line for line in report.problems if f"a.tar:{key}" in line)
        assert words in line


def test_duplicates_by_key_and_by_content_across_shards(tmp_path: Path) -> None:
    one = pack(tmp_path / "one.tar", [sound(i) for i in range(6)])
    two = pack(tmp_path / "two.tar", [sound(i) for i in (2, 2, 40, 41)], first=4)
    report = check(one, two)
    assert report.duplicate_keys.groups == report.duplicate_keys.samples == 2
    assert report.duplicate_keys.examples == [[f"{one}:0004", f"{two}:0004"], [f"{one}:0005", f"{two}:0005"]]
    assert (report.duplicate_contents.groups, report.duplicate_contents.samples) == (1, 2)
    assert report.duplicate_contents.examples == [[f"{one}:0002", f"{two}:0004"]]
    assert report.problems == []  # two samples may well have one picture


def test_damage_is_counted_and_does_not_end_the_check(tmp_path: Path) -> None:
    good = pack(tmp_path / "good.tar", [sound(i) for i in range(4)])
    changed = pack(tmp_path / "changed.tar", [sound(i) for i in range(4, 8)], first=4)
    none = tmp_path / "none.tar"
    none.write_bytes(headers_flipped(good.read_bytes()))
    web = tmp_path / "web.tar"
    web.write_bytes(b"<html>" * 200)
    stat, data = changed.stat(), bytearray(changed.read_bytes())
    wanted = Shard(changed).read(2)["png"]
    data[data.index(wanted) + 30] ^= 1
    changed.write_bytes(data)
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a failing disk does it: the index stays valid
    report = check(good, changed, none, web)
    assert report.samples == 8 and report.lost == 1 and report.causes == {"checksum": 1}
    assert "0006" in report.damage[0].reason or report.damage[0].key == "0006"
    assert report.unreadable_shards.faults == 2
    assert any("none.tar" in line for line in report.problems)
    assert any(
        "1 samples are lost, from 1 damaged or doubled places (checksum 1)" in line and "changed.tar:0006" in line
        for line in report.problems
    )


def test_a_key_that_a_shard_has_twice_is_a_problem_though_nothing_is_lost(tmp_path: Path) -> None:
    twice(tmp_path, lambda i: sound(i + 99))
    (line,) = check(tmp_path / "00000.tar").problems
    assert line.startswith("0 samples are lost, from 48 damaged or doubled places (duplicate 48): ")
    assert "00000.tar:0000 duplicate: a second png" in line


def test_a_flipped_header_costs_its_sample_and_is_listed(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", [sound(i) for i in range(6)])
    data = bytearray(path.read_bytes())
    data[data.index(b"0003.png")] ^= 0x11
    path.write_bytes(data)
    report = check(path)
    assert report.causes.get("header", 0) >= 1 and report.lost >= 1
    assert any("lost" in line and "a.tar" in line for line in report.problems)


def test_fields_that_most_samples_have_are_expected_of_all(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", [{**sound(i), **({"cls": b"1"} if i else {})} for i in range(5)])
    assert check(path).missing["cls"].faults == 1
    rare = pack(tmp_path / "b.tar", [{**sound(i), **({"cls": b"1"} if i > 3 else {})} for i in range(5)])
    assert check(rare).problems == []


def test_what_is_wanted_can_be_said(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", [{"wav": b"RIFF", "json": b'{"a": {"b": ["one", ""]}}'} for _ in range(3)])
    assert len(check(path).problems) == 2  # no picture, no caption at "caption"
    report = check(path, wanted=Wanted((), (JsonCaption("json", "a.b"),)))
    assert report.missing.keys() == {"text"} and report.undecodable["text"].faults == 0
    assert report.empty_captions.faults == 3 and report.caption_characters == {"0": 3, "1": 0, "2-3": 3}
    assert report.duplicate_contents.samples == 2  # without pictures, the largest field
    assert check(path, wanted=Wanted((), ())).problems == []


def test_a_sample_of_each_shard_may_do(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", [sound(i) for i in range(50)])
    report = check(path, decode=7)
    assert report.samples == 50 and report.undecodable["image"].of == 7
    assert report.missing["image"].of == 50  # what the index tells costs nothing


def test_the_share_of_a_worker() -> None:
    assert share_of(64, 8, 1, 0)[3:] == (8, 8, 8)
    assert share_of(1000, 64, 4, 8)[3:] == (15, 16, 1)
    assert share_of(1000, 64, 4, 16)[3:] == (15, 16, 0)
    report = summarize([], share=share_of(5, 8, 1, 0))
    assert report.problems == ["0 samples are fewer than one batch of 8"]


def test_checks_of_large_sets_hold_hashes_not_keys(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", [{"txt": b"a"} for _ in range(300)])
    found = check_shard(str(path))
    assert found.keys.dtype == found.contents.dtype == np.uint64 and found.keys.nbytes == 8 * 300
    assert len(found.missing["image"].examples) == 5


@pytest.mark.parametrize(("workers", "words"), [(0, "8 steps an epoch"), (4, "smallest share 2 batches of 8")])
def test_the_summary_at_the_start_of_training(shards: Path, workers: int, words: str) -> None:
    found = [Shard(path) for path in sorted(shards.glob("*.tar"))]
    fields = {"image": Image(lambda image, generator: NotImplemented), "text": TextCaption("txt")}
    (line,) = summary("image_text", found, 64, fields, 8, 1, workers)
    assert line.startswith("image_text: 64 samples in 4 shards, 8 steps an epoch") and words in line


def test_the_summary_names_what_is_missing_and_lost(tmp_path: Path) -> None:
    samples = [sound(i) for i in range(8)]
    del samples[3]["txt"]
    path = pack(tmp_path / "a.tar", samples)
    fields = {"text": TextCaption("txt"), "own": lambda sample, generator: 0}
    lines = summary("s", [Shard(path)], 8, fields, 4, 1, 0)
    assert lines[1:] == [f"s: 1 of 8 samples looked at have no txt, the first is {path}:0003"]
    data = bytearray(path.read_bytes())
    data[data.index(b"0005.png")] ^= 0x11
    path.write_bytes(data)
    shard = Shard(path)
    lines = summary("s", [shard], len(shard), fields, 4, 1, 0)
    assert any(f"{shard.lost} samples are lost to damage" in line and str(path) in line for line in lines)


def test_extensions_of_a_field() -> None:
    assert extensions(TextCaption("txt")) == ("txt",)
    assert extensions(Image(lambda image, generator: NotImplemented, ["jpg", "png"])) == ("jpg", "png")
    assert extensions(lambda sample, generator: picture(0)) == ()
