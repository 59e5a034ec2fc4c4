"""Embeddings of a data set as files: equal to the model's own, resumable, the same for any split of the work."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmpretrain import InputError, load, save
from mmpretrain.cli import main
from mmpretrain.config import instantiate
from mmpretrain.data.shards import Shard
from mmpretrain.embedding.index import iter_embeddings
from mmpretrain.embedding.parts import LOST, MANIFEST, Store
from tests.shard_sets import write_pictures
from tests.test_pretrained import CONFIG, MODEL


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("model") / "model", instantiate(MODEL), CONFIG)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """23 pictures of odd sizes in two folders, one of them damaged."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(23):
        folder = root / ("a" if i % 2 else "b/c")
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((17 + i, 40 - i), 10 * i + 5).convert("RGB").save(folder / f"{i:02}.png")
    (root / "a" / "13.png").write_bytes((root / "a" / "13.png").read_bytes()[:60])
    return root


def rows_of(out):
    parts = list(iter_embeddings(out))
    return [key for rows in parts for key in rows.keys], np.concatenate([rows.embeddings for rows in parts])


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_each_row_is_what_the_model_gives_and_a_damaged_picture_costs_itself(model, pictures, tmp_path, capsys, form):
    out = tmp_path / "out"
    arguments = ["embed", str(model), str(pictures), str(out), "--format", form]
    arguments += ["--part-size", "5", "--batch-size", "3"]
    assert main(arguments) == 0
    keys, embeddings = rows_of(out)
    files = sorted(path for path in pictures.rglob("*.png") if path.name != "13.png")
    assert keys == [path.relative_to(pictures).as_posix() for path in files]
    network, preprocess, _ = load(model)
    pixels = torch.stack([preprocess(Image.open(path)) for path in files])
    assert np.allclose(embeddings, network.embed("image", pixels).detach().numpy(), atol=1e-6)
    assert "22 of 23 embedded, 16 numbers each" in capsys.readouterr().out
    (skipped,) = [json.loads(line) for path in out.glob("*.skipped.jsonl") for line in path.read_text().splitlines()]
    assert skipped["key"] == "a/13.png" and "not a picture" in skipped["reason"]


def test_the_result_does_not_depend_on_batches_workers_parts_or_processes(model, pictures, tmp_path):
    ways = {"one": [], "batches": ["--batch-size", "4", "--workers", "2"], "parts": ["--part-size", "7"]}
    ways["processes"] = ["--part-size", "4", "--device", "cpu", "--processes", "2"]
    found = {}
    for name, options in ways.items():
        assert main(["embed", str(model), str(pictures), str(tmp_path / name), *options]) == 0
        found[name] = rows_of(tmp_path / name)
    for keys, embeddings in found.values():
        assert keys == found["one"][0]
        assert np.allclose(embeddings, found["one"][1], atol=1e-6)


def test_shards_and_tables_of_pictures_or_texts(model, tmp_path):
    shards = write_pictures(tmp_path / "shards")
    network, _, tokenizer = load(model)
    assert main(["embed", str(model), str(shards), str(tmp_path / "text"), "--modality", "text"]) == 0
    (rows,) = iter_embeddings(tmp_path / "text")
    assert len(rows.texts) == 64 and rows.texts[0].startswith("red left") and rows.paths[0].endswith("00000.tar#0")
    assert np.allclose(rows.embeddings, network.embed("text", tokenizer(rows.texts)).detach().numpy(), atol=1e-6)
    assert main(["embed", str(model), str(shards), str(tmp_path / "image"), "--dtype", "float16"]) == 0
    assert rows_of(tmp_path / "image")[1].dtype == np.float16
    table = tmp_path / "table.csv"
    Image.effect_noise((20, 20), 60).save(tmp_path / "x.png")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "image", "caption"], ["one", "x.png", "a cat"], ["two", "gone.png", ""]])
    assert main(["embed", str(model), str(table), str(tmp_path / "t1"), "--key-column", "id"]) == 0
    assert rows_of(tmp_path / "t1")[0] == ["one"]
    arguments = ["embed", str(model), str(table), str(tmp_path / "t2"), "--modality", "text", "--key-column", "id"]
    assert main(arguments) == 0
    assert rows_of(tmp_path / "t2")[0] == ["one"]


def test_a_killed_run_goes_on_and_makes_no_part_twice(model, pictures, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mmpretrain", "embed", str(model), str(pictures), str(out), "--part-size", "2"]
    with subprocess.Popen(command) as process:
        until = time.monotonic() + 60
        while not list(out.glob("part-*.parquet")) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert before
    assert main(command[3:]) == 0
    assert all(path.stat().st_mtime_ns == time_then for path, time_then in before.items())
    assert not Store.open(out).missing and not list(out.glob(".*.tmp"))
    assert len(rows_of(out)[0]) == 22


def test_a_folder_of_other_embeddings_is_not_mixed_with(model, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["embed", str(model), str(pictures), str(out)]) == 0
    assert main(["embed", str(model), str(pictures), str(out), "--dtype", "float16"]) == 2
    assert "holds other embeddings (dtype 'float32', now 'float16')" in capsys.readouterr().err
    assert main(["embed", str(model), str(pictures), str(out), "--dtype", "float16", "--overwrite"]) == 0
    assert json.loads((out / MANIFEST).read_text())["dtype"] == "float16"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    assert main(["embed", str(model), str(pictures), str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--modality", "text"], "is a folder of pictures; text comes from a table or from shards"),
        (["--column", "x"], "is no table"),
        (["--batch-size", "0"], "--batch-size is 0; give at least 1"),
        (["--workers", "-1"], "--workers is -1; give at least 0"),
        (["--device", "nothing"], "device 'nothing' cannot be used"),
    ],
)
def test_wrong_input_is_said_before_anything_is_written(model, pictures, tmp_path, capsys, options, said):
    assert main(["embed", str(model), str(pictures), str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_pictures_and_shards_is_not_guessed_at(model, pictures, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(pictures, mixed)
    (mixed / "0.tar").write_bytes(b"")
    assert main(["embed", str(model), str(mixed), str(tmp_path / "out")]) == 2
    assert "holds pictures and shards; give" in capsys.readouterr().err


def test_paths_mean_the_same_in_every_folder(model, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures)
    assert main(["embed", os.path.relpath(model), ".", str(tmp_path / "out"), "--part-size", "9"]) == 0
    first = rows_of(tmp_path / "out")
    next((tmp_path / "out").glob("part-00001.*")).unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["embed", str(model), os.path.relpath(pictures), "out", "--part-size", "9"]) == 0
    again = rows_of(tmp_path / "out")
    assert again[0] == first[0] and np.array_equal(again[1], first[1])
    assert all(Path(path).is_file() for rows in iter_embeddings(tmp_path / "out") for path in rows.paths)


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_a_damaged_part_is_said_to_be_one(model, pictures, tmp_path, form):
    out = tmp_path / "out"
    assert main(["embed", str(model), str(pictures), str(out), "--format", form]) == 0
    part = out / f"part-00000.{form}"
    whole = part.read_bytes()
    part.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=r"part-00000.* is damaged .*remove it and run"):
        list(iter_embeddings(out))
    if form == "npy":  # numbers and names that are not of one run
        part.write_bytes(whole)
        names = part.with_suffix(".jsonl")
        names.write_text("".join(names.read_text().splitlines(keepends=True)[:-1]))
        with pytest.raises(InputError, match=r"\(22, 16\) numbers for 21 samples"):
            list(iter_embeddings(out))


def test_parquet_without_its_package_is_refused_at_once(model, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main(["embed", str(model), str(pictures), str(tmp_path / "out")]) == 2
    assert "pip install 'mmpretrain-contrastive[parquet]', or --format npy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_was_skipped_before_a_kill_is_not_counted_once_it_is_read(model, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["embed", str(model), str(pictures), str(out), "--part-size", "5"]
    assert main(command) == 0
    (out / "part-00000.parquet").unlink()
    (out / "part-00000.skipped.jsonl").write_text('{"key": "b/c/00.png", "path": "", "reason": "busy"}\n')
    assert main(command) == 0
    assert capsys.readouterr().out.count("22 of 23 embedded") == 2


def test_a_folder_without_embeddings_is_said_to_be_one(tmp_path):
    with pytest.raises(InputError, match="holds no embeddings"):
        Store.open(tmp_path)


def test_what_damage_took_from_a_shard_is_counted(model, tmp_path, capsys):
    shards = write_pictures(tmp_path / "shards")
    for shard in sorted(shards.glob("*.tar"))[1:]:
        shard.unlink()
    tar = shards / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    assert main(["embed", str(model), str(shards), str(tmp_path / "out")]) == 0
    assert "damage to the shards took samples besides" in capsys.readouterr().err
    assert (tmp_path / "out" / LOST).read_text()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_shard_that_cannot_be_fetched_stops_the_run_and_costs_no_sample(
    model, tmp_path, monkeypatch, capsys, workers
):
    shards = write_pictures(tmp_path / "shards")
    command = ["embed", str(model), str(shards), str(tmp_path / "out"), "--part-size", "16", "--workers", workers]
    read = Shard.read

    def unreachable(self, i):
        if self.name.endswith("00002.tar"):
            raise OSError("cannot fetch: no route to host")
        return read(self, i)

    monkeypatch.setattr(Shard, "read", unreachable)
    assert main(command) == 2
    assert "no route to host; run the same command again" in capsys.readouterr().err
    assert Store.open(tmp_path / "out").missing == [2, 3]
    monkeypatch.undo()
    assert main(command) == 0
    assert "64 of 64 embedded" in capsys.readouterr().out


def test_other_pictures_of_the_same_name_are_another_source(model, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("image\nx.png\n")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.png")
    assert main(["embed", str(model), str(table), str(tmp_path / "out")]) == 0
    Image.effect_noise((30, 30), 50).save(tmp_path / "x.png")
    assert main(["embed", str(model), str(table), str(tmp_path / "out")]) == 2
    assert "holds other embeddings (digest" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_texts_with_odd_line_ends_stay_one_row(model, tmp_path, form):
    table = tmp_path / "table.jsonl"
    texts = ["a\u2028dog", "a\x85cat", "bird"]
    table.write_text("".join(json.dumps({"caption": text}) + "\n" for text in texts))
    out = tmp_path / "out"
    assert main(["embed", str(model), str(table), str(out), "--modality", "text", "--format", form]) == 0
    (rows,) = iter_embeddings(out)
    assert rows.texts == texts


def test_a_model_whose_preprocessing_changed_is_another_model(model, pictures, tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    assert main(["embed", str(copy), str(pictures), str(tmp_path / "out")]) == 0
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text() + "# touched\n")
    assert main(["embed", str(copy), str(pictures), str(tmp_path / "out")]) == 2
    assert "model_digest" in capsys.readouterr().err


def test_a_name_that_is_not_utf8_is_said_before_any_work(model, tmp_path, capsys):
    folder = tmp_path / "p"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "a.png").rename(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))
    assert main(["embed", str(model), str(folder), str(tmp_path / "out")]) == 2
    assert "has a name that is not UTF-8; rename it" in capsys.readouterr().err


def test_what_a_killed_start_leaves_is_no_obstacle(model, pictures, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".embeddings.json.x.tmp").write_text("")
    assert main(["embed", str(model), str(pictures), str(tmp_path / "out")]) == 0
