"""`mmpretrain reproduce` and `mmpretrain diff` on real small runs."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mmpretrain.cli import main
from mmpretrain.diff import compare_logs, compare_samples
from mmpretrain.errors import InputError
from mmpretrain.provenance import read
from mmpretrain.reproduce import resolved

Capture = pytest.CaptureFixture[str]
STEPS = "trainer.max_steps=4"


@pytest.fixture(scope="module")
def run(tiny: list[str], shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on shards of its own, started inside the folder they lie in."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(shards, place / "data")
    options = ["data.train=data", "evaluators=none", STEPS, "debug.sample_log=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["train", *tiny, *options, f"run_dir={place / 'run'}"]) == 0
    return place / "run"


def test_a_run_is_reproduced_from_its_manifest(run: Path, tmp_path: Path, capsys: Capture) -> None:
    overrides = read(run)["command"]["overrides"]
    assert "data.train=data" in overrides and STEPS in overrides
    assert main(["reproduce", str(run), f"run_dir={tmp_path / 'again'}"]) == 0  # from another working folder
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "loss/total: identical in 4 steps" in lines and "sample ids: identical in 4 steps" in lines
    assert lines[-1] == f"reproduced: {run} by {tmp_path / 'again'}"
    assert "warning" not in printed.err
    assert main(["diff", str(run), str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "config, shards, packages, git and hardware are the same"


def test_a_run_with_another_value_is_not_reproduced(run: Path, capsys: Capture) -> None:
    assert main(["reproduce", str(run), "seed=1"]) == 1
    out = capsys.readouterr().out
    assert "loss/total: differs from step 1 on: " in out and "sample ids: differ from step 1 on" in out
    again = (run / "reproduced" / "latest").resolve()
    assert out.splitlines()[-1] == f"NOT reproduced: {run} by {again}"

    assert main(["diff", str(run), str(again)]) == 1
    out = capsys.readouterr().out
    assert "config:" in out and "  seed: 0 -> 1" in out and "loss/total: differs from step 1 on" in out
    assert "packages" not in out and "hardware" not in out
    assert main(["diff", str(run), str(again), "--json"]) == 1
    about = json.loads(capsys.readouterr().out)
    assert about["changed"]["config.seed"] == [0, 1] and about["samples"] == {"steps": 4, "step": 1, "alone": [0, 0]}
    assert {"column": "lr", "steps": 4, "step": None, "values": None, "alone": [0, 0]} in about["columns"]


def test_a_changed_shard_is_named(run: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(run.parent, tmp_path / "copy")
    manifest = read(run)
    manifest["command"]["folder"] = str(tmp_path / "copy")
    (tmp_path / "copy" / "run" / "manifest.json").write_text(json.dumps(manifest))
    shard = tmp_path / "copy" / "data" / "00002.tar"
    shard.write_bytes(shard.read_bytes().replace(b"left", b"LEFT"))
    assert main(["reproduce", str(tmp_path / "copy" / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mmpretrain: error: ") and "data/00002.tar is not the one" in error
    shard.unlink()
    assert main(["reproduce", str(tmp_path / "copy" / "run")]) == 2
    assert "00002.tar" in capsys.readouterr().err


def test_what_has_changed_since_is_warned_of(run: Path, tmp_path: Path, capsys: Capture) -> None:
    manifest = read(run)
    manifest["packages"]["torch"] = "1.0"
    manifest["hardware"]["cpu"] = "abacus"
    manifest["config"]["model"]["embed_dim"] = 12
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(run / "metrics.csv", tmp_path / "old")
    assert main(["reproduce", str(tmp_path / "old"), STEPS]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    for words in (
        "packages.torch was '1.0'",
        "hardware.cpu was 'abacus'",
        "config.model.embed_dim was 12, now it is 16",
    ):
        assert sum(words in line for line in warnings) == 1, warnings


def test_a_hidden_secret_must_be_given_again(run: Path, tmp_path: Path, capsys: Capture) -> None:
    manifest = read(run)
    manifest["command"]["overrides"].append("+logger.api_key=***")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert main(["reproduce", str(tmp_path)]) == 2
    assert "give it: +logger.api_key=..." in capsys.readouterr().err


def test_config_folders_of_the_user_are_found_again(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "mine.yaml").write_text("warmup_steps: 1\nown: 123\n")
    overrides = ["experiment=image_text_clip", f"data.train={shards}", "scheduler=mine"]
    assert resolved(overrides, [str(tmp_path)])["scheduler"]["own"] == 123


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reproduce", "{empty}"], "holds no manifest.json"),
        (["diff", "{empty}", "{run}"], "holds no manifest.json"),
        (["reproduce", "{run}", "--rtol", "-1"], "--rtol is -1"),
    ],
)
def test_wrong_input_is_one_line(run: Path, tmp_path: Path, capsys: Capture, arguments: list[str], words: str) -> None:
    assert main([argument.format(empty=tmp_path, run=run) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmpretrain: error: ") and error.count("\n") == 1 and words in error


def cut(path: Path, count: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


@pytest.mark.parametrize("part", ["metrics.csv", "samples.jsonl", "column", "metrics.json", "no metrics.json"])
def test_runs_that_are_not_shown_to_be_equal_differ(run: Path, tmp_path: Path, capsys: Capture, part: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other, symlinks=True)
    assert main(["diff", str(run), str(other)]) == 0
    log, final = other / "metrics.csv", other / "metrics.json"
    if part == "column":
        log.write_text(log.read_text().replace("loss/total", "loss/other"))
    elif part == "metrics.json":
        final.write_text(json.dumps({name: value + 1 for name, value in json.loads(final.read_text()).items()}))
    elif part == "no metrics.json":
        final.unlink()
    else:
        cut(other / part, 3 if part == "metrics.csv" else 2)  # a header and two steps, two steps
    capsys.readouterr()
    assert main(["diff", str(run), str(other)]) == 1
    words = {
        "metrics.csv": "loss/total: identical in 2 steps; 2 steps only in the first run",
        "samples.jsonl": "sample ids: identical in 2 steps; 2 steps only in the first run",
        "column": "loss/other: identical in 0 steps; 4 steps only in the second run",
        "metrics.json": "train/bad_steps: 0.0 -> 1.0",
        "no metrics.json": "train/bad_steps: 0.0 -> None",
    }
    assert words[part] in capsys.readouterr().out


def test_a_log_that_lacks_steps_or_columns_of_the_run_does_not_reproduce_it(run: Path, capsys: Capture) -> None:
    assert main(["reproduce", str(run), "callbacks.log_every_n_steps=2"]) == 1
    out = capsys.readouterr().out
    assert "loss/total: identical in 2 steps; 2 steps only in the first run" in out and "\nNOT reproduced: " in out
    assert "sample ids: identical in 4 steps\n" in out


def test_a_run_that_logs_more_reproduces_it(run: Path, tmp_path: Path, capsys: Capture) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old, symlinks=True, ignore=shutil.ignore_patterns("reproduced"))
    log = old / "metrics.csv"
    cut(log, 3)
    log.write_text(f"{log.read_text()}3,0.")  # killed in the middle of a line
    assert main(["reproduce", str(old)]) == 0
    assert "loss/total: identical in 2 steps; 2 steps only in the second run" in capsys.readouterr().out


def test_moved_shards_are_compared_with_those_the_run_has_read(run: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(run.parent, tmp_path / "copy", symlinks=True)
    old, moved = tmp_path / "copy" / "run", tmp_path / "moved"
    manifest = read(run)
    manifest["command"]["folder"] = str(tmp_path / "copy")
    (old / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "copy" / "data").rename(moved)
    assert main(["reproduce", str(old)]) == 2
    assert main(["reproduce", str(old), f"data.train={moved}"]) == 0
    shard = moved / "00002.tar"
    shard.write_bytes(shard.read_bytes().replace(b"left", b"LEFT"))
    shard.with_name("00002.tar.idx.npz").unlink()  # else the new bytes are damage
    capsys.readouterr()
    assert main(["reproduce", str(old), f"data.train={moved}"]) == 1
    out = capsys.readouterr().out
    assert f"image_text: shard {shard} is not data/00002.tar as the run has read it (16 samples" in out
    shard.unlink()
    assert main(["reproduce", str(old), f"data.train={moved}"]) == 1
    assert "image_text: the run has read 4 shards, this one 3" in capsys.readouterr().out


def test_shards_behind_a_signature_are_compared_after_the_run(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    overrides = [o for o in read(run)["command"]["overrides"] if not o.startswith(("data.train=", "run_dir="))]
    with serving(run.parent / "data") as place:
        url = f"data.train='http://{place}/{{00000..00003}}.tar?signature=hunter2'"
        assert main(["train", *overrides, url, f"run_dir={tmp_path / 'r'}"]) == 0
        assert "hunter2" not in (tmp_path / "r" / "manifest.json").read_text()
        assert main(["reproduce", str(tmp_path / "r")]) == 2
        assert "data.train" in capsys.readouterr().err
        assert main(["reproduce", str(tmp_path / "r"), url]) == 0
        monkeypatch.setenv("SHARDS", f"http://{place}/{{00000..00003}}.tar?signature=hunter2")
        assert main(["train", *overrides, "data.train=${oc.env:SHARDS}", f"run_dir={tmp_path / 's'}"]) == 0
        assert "data.train=${oc.env:SHARDS}" in read(tmp_path / "s")["command"]["overrides"]
        assert main(["reproduce", str(tmp_path / "s")]) == 0  # the names in the manifest cannot be opened


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder to those who give the signature."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if "signature=hunter2" in self.path:
                super().do_GET()
            else:
                self.send_error(403)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def log(folder: Path, *rows: str) -> Path:
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,loss/total,samples_per_second\n" + "".join(f"{row}\n" for row in rows))
    return folder


def test_logs_are_compared_on_the_steps_both_have(tmp_path: Path) -> None:
    a = log(tmp_path / "a", "1,2.0,100", "2,nan,90", "3,1.0,80", "4,0.5,")
    b = log(tmp_path / "b", "2,nan,9", "3,1.0000001,8", "5,0.1,")
    (column,) = compare_logs(a, b)
    assert column.steps == 2 and column.step == 3 and column.values == (1.0, 1.0000001) and column.alone == (2, 1)
    (close,) = compare_logs(a, b, rtol=1e-6)
    assert close.step is None and math.isnan(compare_logs(a, log(tmp_path / "c", "2,1.0,9"))[0].values[0])
    assert compare_samples(a, b) is None
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match=r"holds no metrics\.csv"):
        compare_logs(a, tmp_path / "d")
    (tmp_path / "d" / "metrics.csv").write_text("step,loss/total\none,two\n")
    with pytest.raises(InputError, match="no table of numbers"):
        compare_logs(a, tmp_path / "d")


def test_samples_are_compared_step_by_step(tmp_path: Path) -> None:
    for name, last in (("a", ["x", "y"]), ("b", ["y", "x"])):
        lines = [{"step": 1, "ids": ["s:1", "s:2"]}, {"step": 2, "ids": last}]
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "id'  # cut short by a kill
        (tmp_path / name / "samples.jsonl").write_text(text)
    assert compare_samples(tmp_path / "a", tmp_path / "b") == (2, 2, (0, 0))
    assert compare_samples(tmp_path / "a", tmp_path / "a") == (2, None, (0, 0))
    (tmp_path / "c").mkdir()
    assert compare_samples(tmp_path / "a", tmp_path / "c") == (0, None, (2, 0))
    assert compare_samples(tmp_path / "c", tmp_path / "c") is None
