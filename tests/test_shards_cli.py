"""`mmpretrain shards`: a folder or table in, shards and a summary out, one line on wrong input."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpretrain.data.shards import Shard, expand, iter_shard
from mmpretrain.shards_cli import main
from tests.faults.broken_sets import pack, sound

Capture = pytest.CaptureFixture[str]
NONE = {"faults": 0, "examples": []}


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for i in range(7):
        path = tmp_path / "pictures" / f"{'ab'[i % 2]}_x" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.with_suffix(".txt").write_text(f"picture {i}\x1b[31m")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pictures"


def test_write_then_list(pictures: Path, capsys: Capture) -> None:
    (pictures / "a_x" / "2.jpg").write_bytes(b"no picture")
    assert main(["write", "pictures", "out", "--samples-per-shard", "3", "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines() == [
        "6 samples in 3 shards: out/{00000..00002}.tar",
        "1 picture skipped, listed with the reason in out/skipped.jsonl",
        "train on them: mmpretrain train experiment=image_text_clip \"data.train='out/{00000..00002}.tar'\"",
    ]
    shards = expand("out/{00000..00002}.tar")  # the name it printed
    assert [len(Shard(shard)) for shard in shards] == [3 - 1, 3, 1]

    assert main(["list", "out", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["shards"][1] == {"path": "out/00001.tar", "samples": 3}
    assert about["samples"] == 6
    samples = [sample for shard in shards for sample in iter_shard(shard)]
    assert about["fields"] == {
        field: {"samples": 6, "bytes": sum(len(sample[field]) for sample in samples)} for field in ("jpg", "txt")
    }
    assert about["captions"][0] == {"key": "a_x/0", "text": "picture 0\ufffd[31m"}

    assert main(["list", "out/00002.tar"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["out/00002.tar: 1 samples", "1 samples in 1 shard"]
    assert "  txt: 1 samples, 14 B" in lines
    assert lines[-1] == "  b_x/5: picture 5\ufffd[31m"


def test_classes_and_prefix(pictures: Path, capsys: Capture) -> None:
    arguments = ["write", "pictures", "out", "--classes", "--prefix", "train-", "--workers", "1"]
    assert main(arguments) == 0
    assert "data.train='out/train-00000.tar'" in capsys.readouterr().out
    assert json.loads(Path("out/classes.json").read_text()) == ["a x", "b x"]
    samples = list(iter_shard("out/train-00000.tar"))
    assert [(sample["txt"], sample["cls"]) for sample in samples] == [(b"a x", b"0")] * 4 + [(b"b x", b"1")] * 3
    assert main(["write", "pictures", "out", "--prefix", "train-", "--workers", "1"]) == 2
    assert "begun with classes=True, now it is False" in capsys.readouterr().err
    assert main(["write", "pictures", "out", "--prefix", "new-", "--workers", "1", "--overwrite"]) == 0
    assert [path.name for path in Path("out").glob("*.tar")] == ["new-00000.tar"]


def test_table_with_two_workers(pictures: Path, capsys: Capture) -> None:
    rows = [{"p": f"{'ab'[i % 2]}_x/{i}.jpg", "en": f"e{i}", "de": f"d{i}", "id": f"k{i}"} for i in range(7)]
    (pictures / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = [
        "--image-column",
        "p",
        "--caption-column",
        "en",
        "--caption-column",
        "de",
        "--key-column",
        "id",
    ]
    options = ["--samples-per-shard", "4", "--workers", "2"]
    assert main(["write", "pictures/t.jsonl", "out", *columns, *options]) == 0
    samples = [sample for shard in expand("out") for sample in iter_shard(shard)]
    assert [sample["__key__"] for sample in samples] == [f"k{i}" for i in range(7)]
    assert json.loads(samples[6]["json"]) == {"caption": {"en": "e6", "de": "d6"}}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["write", "missing", "out"], "missing does not exist; expected a folder of pictures or a .csv"),
        (["write", "pictures/a_x/0.jpg", "out"], "is no table"),
        (["write", "pictures", "out", "--key-column", "x"], "need a table"),
        (["write", "pictures/t.csv", "out", "--classes"], "--classes needs a folder"),
        (["write", "pictures/t.csv", "out"], "no column 'image', only p, c; set --image-column"),
        (["write", "pictures", "out", "--samples-per-shard", "0"], "samples_per_shard=0"),
        (["write", "pictures", "pictures/t.csv"], "cannot be written"),
        (["list", "missing.tar"], "does not exist"),
        (["list", "pictures/t.csv"], "not a tar file"),
    ],
)
def test_wrong_input_is_one_line(pictures: Path, capsys: Capture, argv: list[str], says: str) -> None:
    (pictures / "t.csv").write_text("p,c\n" + "a,b\n" * 200)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmpretrain: error: ") and error.count("\n") == 1 and says in error


@pytest.mark.parametrize("folder", ["out", "a b", "it's", "$HOME", "back\\slash", 'quo"te'])
def test_the_printed_command_reaches_hydra_whole(pictures: Path, capsys: Capture, folder: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert main(["write", "pictures", folder, "--samples-per-shard", "4", "--workers", "1"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("train on them: ")
    shown = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    override = OverridesParser.create().parse_override(shown.stdout.splitlines()[-1])
    assert override.get_key_element() == "data.train"
    assert expand(str(override.value())) == [f"{folder}/0000{i}.tar" for i in range(2)]


def test_check_says_what_is_wrong_and_ends_with_1(tmp_path: Path, capsys: Capture) -> None:
    samples = [sound(i) for i in range(20)]
    samples[7]["png"] = b"no picture"
    samples[9]["txt"] = b"\x1b[31mred"
    pack(tmp_path / "a.tar", samples[:10])
    pack(tmp_path / "b.tar", samples[10:], first=10)
    (tmp_path / "c.tar").write_bytes(b"<html>" * 300)
    command = ["check", str(tmp_path), "--processes", "1"]
    assert main([*command, "--batch-size", "4", "--ranks", "2", "--workers", "2"]) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == "" and "\x1b" not in printed.out
    assert lines[0].startswith("20 samples in 3 shards, ") and lines[0].endswith("; lost 0")
    assert "  image: 20 decoded, 1 unreadable (5.00%)" in lines
    assert "an epoch: 5 steps of 4; smallest share of a worker (2 ranks, 2 workers each): 2 batches of 2" in lines
    problems = [line for line in lines if line.startswith("PROBLEM: ")]
    assert len(problems) == 2
    assert "1 of 3 shards cannot be read" in problems[0] and "c.tar" in problems[0]
    assert "a.tar:0007" in problems[1] and "unreadable image" in problems[1]

    assert main([*command[:1], f"{tmp_path}/a.tar", f"{tmp_path}/b.tar", "--json", "--sample", "5"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["samples"], about["undecodable"]["image"], about["problems"]) == (20, {**NONE, "of": 10}, [])


def test_check_gives_the_same_from_several_processes(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        pack(tmp_path / f"{n}.tar", [sound(i) for i in range(4)])
    monkeypatch.setattr("mmpretrain.shards_check.PATIENCE", 0)
    said = []
    for processes in "12":
        assert main(["check", str(tmp_path), "--json", "--processes", processes]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and json.loads(said[0])["duplicate_contents"]["samples"] == 8


def test_what_check_looks_for_can_be_said(tmp_path: Path, capsys: Capture) -> None:
    pack(tmp_path / "a.tar", [{"wav": b"RIFF", "json": b'{"names": {"common": "a bell"}}'}] * 2)
    assert main(["check", str(tmp_path)]) == 1
    assert "2 of 2 samples have no image" in capsys.readouterr().out
    assert main(["check", str(tmp_path), "--image", "none", "--caption", "json:names.common"]) == 0
    assert "  4-7 " in capsys.readouterr().out
    assert main(["check", str(tmp_path), "--image", "wav", "--caption", "none"]) == 1
    assert "unreadable image" in capsys.readouterr().out


def test_odd_names_are_shown_on_one_line_and_in_any_encoding(tmp_path: Path) -> None:
    """Keys, fields and file names that are no UTF-8, or hold line ends and escape codes."""
    folder = os.fsencode(tmp_path) + b"/d\xe9\n\x1b[31m"
    Path(os.fsdecode(folder)).mkdir()
    path = os.fsdecode(folder + b"/\xff.tar")
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for i, (key, field) in enumerate(((b"caf\xe9", b"txt"), (b"a\nb\x1b[31m", b"tx\n\xff"), (b"caf\xe9", b"txt"))):
            member = tarfile.TarInfo(os.fsdecode(key + b"." + field))
            member.size = 2
            tar.addfile(member, io.BytesIO(b"%2d" % i))
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"}
    words = ["list", "list --json", "index", "index --json", "check", "check --json"]
    code = (
        "import sys; from mmpretrain.shards_cli import main; "
        f"sys.exit(max([main([*words.split(), sys.argv[1]]) for words in {words!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, env=environment)
    assert done.returncode == 1 and done.stderr == b"", done.stderr.decode()  # what the tar holds twice is a fault
    lines = done.stdout.decode().splitlines()
    assert all(line.isprintable() for line in lines), lines
    objects = [json.loads(line) for line in lines if line.startswith(("{", "["))]
    assert len(objects) == 3 and all(line.isascii() for line in lines if line.startswith(("{", "[")))
    shown = f"{tmp_path}/d\ufffd\ufffd\ufffd[31m/\ufffd.tar"
    assert objects[0]["shards"][0]["path"] == objects[1][0]["shard"] == shown
    assert "tx\ufffd\ufffd" in objects[0]["fields"]


def test_index_makes_the_index_files(tmp_path: Path, capsys: Capture) -> None:
    paths = [pack(tmp_path / f"{n}.tar", [sound(i) for i in range(4)]) for n in range(2)]
    assert main(["index", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [*(f"{p}: 4 samples" for p in paths), "8 samples in 2 shards"]
    assert all(path.with_name(f"{path.name}.idx.npz").is_file() for path in paths)
    paths[1].write_bytes(b"<html>" * 300)
    assert main(["index", str(tmp_path), "--json"]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert good == {"shard": str(paths[0]), "samples": 4, "lost": 0, "causes": {}, "problem": None}
    assert str(paths[1]) in bad["problem"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["check", "nowhere.tar"], "nowhere.tar"),
        (["check", ".", "--sample", "0"], "--sample is 0"),
        (["check", ".", "--batch-size", "6", "--ranks", "4"], "cannot be divided over 4 ranks"),
        (["check", "{}", "--processes", "0"], "--processes is 0"),
        (["index", "."], "holds no *.tar"),
    ],
)
def test_wrong_input_to_check_is_one_line(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, argv: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([word.format(shards) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmpretrain: error: ") and error.count("\n") == 1 and says in error


def test_help_and_unknown_options(capsys: Capture) -> None:
    for argv, status in (
        (["--help"], 0),
        (["write", "--help"], 0),
        (["check", "--help"], 0),
        ([], 2),
        (["write", "a", "b", "--nope"], 2),
    ):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == status
    assert "usage: mmpretrain shards" in capsys.readouterr().out
