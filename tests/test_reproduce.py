"""`mmpretrain reproduce` and `mmpretrain diff` on real small runs."""

from __future__ import annotations

import json
import math
import shutil
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
    assert about["changed"]["config.seed"] == [0, 1] and about["samples"] == {"steps": 4, "step": 1}
    assert {"column": "lr", "steps": 4, "step": None, "values": None} in about["columns"]


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


def log(folder: Path, *rows: str) -> Path:
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,loss/total,samples_per_second\n" + "".join(f"{row}\n" for row in rows))
    return folder


def test_logs_are_compared_on_the_steps_both_have(tmp_path: Path) -> None:
    a = log(tmp_path / "a", "1,2.0,100", "2,nan,90", "3,1.0,80", "4,0.5,")
    b = log(tmp_path / "b", "2,nan,9", "3,1.0000001,8", "5,0.1,")
    (column,) = compare_logs(a, b)
    assert column.steps == 2 and column.step == 3 and column.values == (1.0, 1.0000001)
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
    assert compare_samples(tmp_path / "a", tmp_path / "b") == (2, 2)
    assert compare_samples(tmp_path / "a", tmp_path / "a") == (2, None)
