"""Writing shards: what is written is what was given, whatever interrupts it."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpretrain.data.shards import Shard, expand, iter_shard
from mmpretrain.data.sources import list_classes, list_folder, list_table
from mmpretrain.data.write import Written, write_shards
from mmpretrain.errors import InputError


def picture(path: Path, seed: int = 0, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for i in range(10):
        picture(folder / f"{i}.png", i).with_suffix(".txt").write_text(f"picture {i}")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".jsonl")}


def write(folder: Path, out: Path, per_shard: int = 3, workers: int = 1, overwrite: bool = False) -> Written:
    return write_shards(list_folder(folder), out, {}, per_shard, workers, overwrite=overwrite)


def test_what_is_written_is_what_was_given(pictures: Path, tmp_path: Path) -> None:
    (pictures / "3.txt").unlink()
    (pictures / "3.json").write_text('{"caption": ["a", "b"]}')
    picture(pictures / "deep.er" / "x.y.jpg").with_suffix(".txt").write_text("dots")
    written = write(pictures, tmp_path / "out")
    assert written == Written([f"{i:05}.tar" for i in range(4)], 11, 0)
    samples = [sample for shard in expand(str(tmp_path / "out")) for sample in iter_shard(shard)]
    assert [sample.pop("__key__") for sample in samples] == [*map(str, range(10)), "deep_er/x_y"]
    assert samples[4] == {"png": (pictures / "4.png").read_bytes(), "txt": b"picture 4"}
    assert samples[3] == {"png": (pictures / "3.png").read_bytes(), "json": b'{"caption": ["a", "b"]}'}
    assert samples[10] == {"jpg": (pictures / "deep.er" / "x.y.jpg").read_bytes(), "txt": b"dots"}
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        names = tar.getnames()
    assert sorted(names) == ["0.png", "0.txt", "1.png", "1.txt", "2.png", "2.txt"]


def test_bad_pictures_are_listed_and_left_out(pictures: Path, tmp_path: Path) -> None:
    (pictures / "1.png").write_bytes(b"no picture")
    (pictures / "2.png").write_bytes((pictures / "2.png").read_bytes()[:-40])
    (pictures / "3.txt").unlink()
    (pictures / "4.txt").write_bytes(b"\xff\xfe\xff")
    (pictures / "5.txt").write_text(" \n")
    (pictures / "6.json").write_text("{")
    picture(pictures / "7.bmp", 1)
    (pictures / "7.png").unlink()
    picture(pictures / "8.png", 8).rename(pictures / "8.jpg")  # the content decides, not the name
    written = write(pictures, tmp_path / "out", per_shard=4)
    assert (written.samples, written.skipped) == (3, 7)
    rows = [json.loads(row) for row in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    reasons = {row["key"]: row["reason"] for row in rows}
    for key, says in {
        "1": "not a picture",
        "2": "OSError",
        "3": "no caption",
        "4": "can't decode byte 0xff",
        "5": "empty",
        "6": "property name",
        "7": "not a picture",
    }.items():
        assert says in reasons.pop(key)
    assert not reasons
    kept = [sample for shard in expand(str(tmp_path / "out")) for sample in iter_shard(shard)]
    assert [(sample["__key__"], *(set(sample) & {"png", "jpg"})) for sample in kept] == [
        ("0", "png"),
        ("8", "png"),
        ("9", "png"),
    ]


def test_parallel_and_serial_write_the_same_and_one_error_spares_the_rest(pictures: Path, tmp_path: Path) -> None:
    (pictures / "5.png").write_bytes(b"no picture")
    write(pictures, tmp_path / "serial", per_shard=2)
    out = tmp_path / "parallel"
    (out / "00001.tar" / "in the way").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot be written.*finished shards are kept"):
        write(pictures, out, per_shard=2, workers=2)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if path.is_file()}
    assert finished and not list(out.glob(".*"))
    (out / "00001.tar" / "in the way").rmdir()
    (out / "00001.tar").rmdir()
    write(pictures, out, per_shard=2, workers=2)
    assert tree(out) == tree(tmp_path / "serial")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from mmpretrain.data.sources import list_folder
from mmpretrain.data.write import write_shards
from mmpretrain.errors import InputError
folder, out, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def progress(done, kept):
    if how == "kill" and done.name == "00001.tar":
        (out / ".00002.tar.abc.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
if how == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write_shards(list_folder(folder), out, {}, 3, progress=progress)
except InputError as error:
    sys.exit(f"one line: {error}")
"""


def child(folder: Path, out: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", CHILD, str(folder), str(out), how]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_killed_run_goes_on(pictures: Path, tmp_path: Path) -> None:
    (pictures / "1.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert child(pictures, out, "kill").returncode == -signal.SIGKILL
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sorted(finished) == ["00000.tar", "00001.tar"]
    # As if it had been killed while it noted the third shard: what is not in the manifest is done again.
    (out / "00002.tar").write_bytes(b"half a shard")
    with (out / "skipped.jsonl").open("a") as file:
        file.write('{"shard": "00002.tar", "key": "7"}\n{"shard": "000')
    write(pictures, out)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    write(pictures, tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]


def test_a_full_disk_leaves_whole_shards_only(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    picture(pictures / "7.png", size=200)  # 120 kB of noise in the third shard
    ended = child(pictures, out, "full")
    assert ended.returncode == 1
    assert ended.stderr.startswith("one line: ") and ended.stderr.count("\n") == 1
    assert "the disk is full (File too large)" in ended.stderr and "run the same command again" in ended.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "00000.tar", "00001.tar", "manifest.json", "skipped.jsonl",
    ]  # fmt: skip
    assert [len(Shard(path)) for path in sorted(out.glob("*.tar"))] == [3, 3]
    assert write(pictures, out).samples == 10


def test_a_lost_shard_is_written_again(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(pictures, out)
    before = tree(out)
    (out / "00001.tar").unlink()
    (out / "00002.tar").write_bytes(b"cut")
    write(pictures, out)
    assert tree(out) == before


def test_another_source_or_other_options_are_refused(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(pictures, out)
    with pytest.raises(InputError, match="begun with samples_per_shard=3, now it is 4"):
        write(pictures, out, per_shard=4)
    before = tree(out)
    os.utime(pictures / "5.txt", ns=(0, 0))
    with pytest.raises(InputError, match=r"source .* has changed"):
        write(pictures, out)
    assert tree(out) == before
    assert write(pictures, out, per_shard=5, overwrite=True).shards == ["00000.tar", "00001.tar"]
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]


def test_overwrite_removes_nothing_else(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(pictures, out)
    for shard in expand(str(out)):
        Shard(shard)  # makes the index files
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"] |= {"../pictures/1.txt": [1, 1], "mine.txt": [1, 1]}
    (out / "00007.tar").write_bytes(b"left by a run that was killed")
    (out / "other.tar").write_bytes(b"kept")
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "mine.txt").write_text("kept")
    write(pictures, out, per_shard=10, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "00000.tar",
        "manifest.json",
        "mine.txt",
        "other.tar",
        "skipped.jsonl",
    ]
    assert (pictures / "1.txt").exists()


def test_foreign_folders_and_manifests_are_refused(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "other.tar").write_bytes(b"somebody's")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds other\.tar but no manifest\.json"):
            write(pictures, out, overwrite=overwrite)
    assert (out / "other.tar").read_bytes() == b"somebody's"
    for content in ("{", "[]", '{"version": 1, "shards": {"a": 1}}', '{"version": 9, "shards": {}}'):
        (out / "manifest.json").write_text(content)
        with pytest.raises(InputError, match="no manifest of"):
            write(pictures, out)


def test_nothing_readable_is_an_error(pictures: Path, tmp_path: Path) -> None:
    for path in pictures.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match="none of the 10 pictures"):
        write(pictures, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
        ({"workers": 0}, "workers=0"),
        ({"prefix": "a/"}, "prefix 'a/'"),
    ],
)
def test_bad_options_are_refused(pictures: Path, tmp_path: Path, options: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        write_shards(list_folder(pictures), tmp_path / "out", {}, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# --- sources --------------------------------------------------------------------------------


def test_classes(tmp_path: Path) -> None:
    for name in ("red_fox/a.png", "red_fox/more/b.png", "cat/a.jpg", ".cache/x.png", "__MACOSX/y.png"):
        picture(tmp_path / "in" / name)
    items, names = list_classes(tmp_path / "in")
    assert names == ["cat", "red fox"]
    assert [(item.key, item.texts) for item in items] == [
        ("cat/a", {"txt": "cat", "cls": "0"}),
        ("red_fox/a", {"txt": "red fox", "cls": "1"}),
        ("red_fox/more/b", {"txt": "red fox", "cls": "1"}),
    ]
    write_shards(items, tmp_path / "out", {})
    assert [sample["cls"] for sample in iter_shard(tmp_path / "out" / "00000.tar")] == [b"0", b"1", b"1"]
    picture(tmp_path / "in" / "loose.png")
    with pytest.raises(InputError, match="lies in no class folder"):
        list_classes(tmp_path / "in")


ROWS = [
    ("1.png", "eine Katze, klein", "a cat"),
    ("2.png", "", 'a "dog"'),
    ("missing.png", "x", "y"),
    ("4.png", "", ""),
]


def make_table(folder: Path, kind: str) -> Path:
    path = folder / f"table.{kind}"
    keyed = [{"id": f"k{i}", "image": image, "de": de, "en": en} for i, (image, de, en) in enumerate(ROWS)]
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(keyed), path, row_group_size=3)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in keyed))
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(keyed[0]), delimiter={"csv": ",", "tsv": "\t"}[kind])
            writer.writeheader()
            writer.writerows(keyed)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(pictures: Path, tmp_path: Path, kind: str) -> None:
    table = make_table(pictures, kind)
    written = write_shards(list_table(table, "image", ["en"], "id"), tmp_path / "one", {})
    one = list(iter_shard(tmp_path / "one" / "00000.tar"))
    assert [(sample["__key__"], sample["txt"]) for sample in one] == [("k0", b"a cat"), ("k1", b'a "dog"')]
    assert one[0]["png"] == (pictures / "1.png").read_bytes()
    assert written.skipped == 2  # a missing picture and an empty caption
    write_shards(list_table(table, "image", ["de", "en"]), tmp_path / "two", {})
    two = list(iter_shard(tmp_path / "two" / "00000.tar"))
    assert [(sample["__key__"], json.loads(sample["json"])) for sample in two] == [
        ("000000000", {"caption": {"de": "eine Katze, klein", "en": "a cat"}}),
        ("000000001", {"caption": {"en": 'a "dog"'}}),
    ]
    with pytest.raises(InputError, match="no column 'caption', only id, image, de, en"):
        list_table(table, "image", ["caption"])


def test_keys_that_meet_are_refused(pictures: Path) -> None:
    (pictures / "twice.csv").write_text("id,image,en\na.b,1.png,x\na_b,2.png,y\n")
    with pytest.raises(InputError, match="both have the key 'a_b'"):
        list_table(pictures / "twice.csv", "image", ["en"], "id")


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_with_the_pictures_bytes(pictures: Path, tmp_path: Path, struct: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = [(pictures / f"{i}.png").read_bytes() for i in range(7)]
    cells = [{"bytes": data, "path": None} if struct else data for data in raw]
    rows = [{"image": cell, "caption": [f"c{i}", "", f"d{i}"]} for i, cell in enumerate([*cells, None])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=3)
    written = write_shards(list_table(tmp_path / "t.parquet", "image", ["caption"]), tmp_path / "out", {})
    samples = list(iter_shard(tmp_path / "out" / "00000.tar"))
    assert [sample["png"] for sample in samples] == raw
    assert json.loads(samples[5]["json"]) == {"caption": ["c5", "d5"]}
    assert written.skipped == 1
    assert "no bytes in the image column" in (tmp_path / "out" / "skipped.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.jsonl", b'{"image": 1}\nnope\n', "no column 'caption'"),
        ("t.jsonl", b'{"image": "a", "caption": "b"}\nnope\n', "line 2 is not JSON"),
        ("t.jsonl", b"[]\n", "line 1 is not a JSON object"),
        ("t.csv", b"image,caption\n", "has no rows"),
        ("t.csv", b"image,caption\n\xff,a\n", "expected UTF-8"),
        ("t.parquet", b"PAR1 no", "cannot be read as parquet"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        list_table(tmp_path / name, "image", ["caption"])


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no picture"):
        list_folder(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"none of the 1 pictures .* --classes"):
        list_folder(tmp_path)
    picture(tmp_path / "a.jpg").with_suffix(".txt").write_text("x")
    with pytest.raises(InputError, match=r"a\.jpg and .*a\.png both have the key 'a'"):
        list_folder(tmp_path)
    for name in ("", "a//b", "/a", "a\nb", "__a__/b"):
        (tmp_path / "t.jsonl").write_text(json.dumps({"id": name, "image": "a.png", "caption": "x"}))
        with pytest.raises(InputError, match=r"row 1 of .* has the key"):
            list_table(tmp_path / "t.jsonl", "image", ["caption"], "id")
