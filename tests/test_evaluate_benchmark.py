"""`mmpretrain evaluate benchmark=...`: several models, ranks of torchrun, what is written, Fashion-MNIST end to end."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmpretrain.cli import main
from mmpretrain.datasets.fashion_mnist import DEBIAN, build
from tests.data.servers import Web, body
from tests.datasets.idx_files import write_idx_folder
from tests.evaluation.digits import write_digits
from tests.evaluation.suite_example import save_model, save_run
from tests.evaluation.test_report import Page
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("sets") / "digits")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "x", (10, 20))


def evaluate(*arguments: str) -> int:
    return main(["evaluate", *arguments])


def twice(*arguments: str) -> list[int]:
    return [evaluate(*arguments), evaluate(*arguments)]


def test_checkpoints_of_a_run_and_another_model(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(tmp_path / "other", 9)
    out = tmp_path / "out" / "all.json"
    arguments = [
        f"checkpoint=[{run / 'checkpoints'},{other}]",
        "benchmark=folder",
        f"benchmark_root={digits}",
        "benchmark.tasks=[zero_shot,knn]",
        f"output={out}",
    ]
    assert evaluate(*arguments, "json=true") == 0
    said = capsys.readouterr()
    content = json.loads(out.read_text())
    assert json.loads(said.out) == content and "[6/6]" in said.err
    assert [model["step"] for model in content["models"]] == [10, 20, None]
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["data_set"], row["task"]) for row in rows} == {("digits", "zero_shot"), ("digits", "knn")}
    page = Page(out.with_suffix(".html"))
    assert "Over training" in page.words and not page.all("script")
    endings = (".json", ".csv", ".html")
    before = [out.with_suffix(ending).read_bytes() for ending in endings]
    assert evaluate(*arguments) == 0  # again: all is kept
    assert "[6/6]" in (again := capsys.readouterr()).err and again.err.count("kept") == 6
    assert "digits/zero_shot/top1" in again.out
    assert [out.with_suffix(ending).read_bytes() for ending in endings] == before
    assert evaluate(*arguments, "overwrite=true") == 0
    assert "kept" not in capsys.readouterr().err
    assert json.loads(out.read_text()) == content


def test_several_models_with_evaluators(run: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    given = [f"checkpoint={run}/checkpoints/step_*", "evaluators=benchmark_zero_shot", f"data.root={digits}"]
    assert evaluate(*given, f"output={out}") == 0
    models = json.loads(out.read_text())["models"]
    alone = tmp_path / "alone.json"
    step = f"checkpoint={run}/checkpoints/step_00000020"
    assert evaluate(step, *given[1:], f"output={alone}") == 0
    assert models[1]["metrics"] == json.loads(alone.read_text())


def test_data_sets_behind_an_address(run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    near, far = tmp_path / "near.json", tmp_path / "far.json"
    given = [f"checkpoint={run}", "benchmark=folder", "benchmark.data_sets=[digits]"]
    assert evaluate(*given, f"benchmark_root={digits}", f"output={near}") == 0
    with Web() as web:
        for file in digits.rglob("*.t*"):
            web.routes[f"/wds_digits/{file.relative_to(digits)}"] = body(file.read_bytes())
        place = f"benchmark_root='{web.url}/wds_{{name}}'"
        assert evaluate(*given, place, f"output={far}") == 0
    assert json.loads(far.read_text()) == json.loads(near.read_text())


def test_ranks_write_one_models_numbers_once(run: Path, digits: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    given = ["evaluators=benchmark_zero_shot", f"data.root={digits}", f"checkpoint={run}"]
    assert evaluate(*given, f"output={alone}") == 0
    # The second time it is there, and every rank says so.
    assert run_ranks(twice, 2, *given, f"output={together}") == [[0, 2], [0, 2]]
    assert json.loads(together.read_text()) == json.loads(alone.read_text())


@pytest.mark.slow
def test_ranks_of_torchrun_write_what_one_process_writes(run: Path, digits: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    given = ["benchmark=folder", f"benchmark_root={digits}", f"checkpoint={run}"]
    assert evaluate(*given, f"output={alone}") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "mmpretrain", "evaluate", *given, f"output={together}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("written to") == 1 and done.stdout.count("95 % interval") == 1
    assert json.loads(together.read_text()) == json.loads(alone.read_text())


def test_what_cannot_be_evaluated_is_said(
    run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        ([f"checkpoint={run}", "benchmark=vtap"], "vtab"),
        ([f"checkpoint={run}", "benchmark=vtab", f"benchmark_root={digits}"], "lacks 19 of 19 data sets"),
        ([f"checkpoint={run}", "benchmark=folder", "benchmark_root=nowhere"], "lacks 1 of 1"),
        (
            [f"checkpoint={run}", "benchmark=folder", f"benchmark_root={digits}", "benchmark.tasks=[zero_shut]"],
            "zero_shot, linear_probe",
        ),
        ([f"checkpoint={run}", "benchmark=compositional", f"benchmark_root={digits}"], "data.pictures"),
        ([f"checkpoint={run}/checkpoints/step_9*", "benchmark=folder"], "matches nothing"),
        ([f"checkpoint={run}", "benchmark=folder", f"benchmark_root={tmp_path}"], "nshards.txt"),
    ):
        assert evaluate(*arguments) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and len(error.splitlines()) == 1, error
    Path("mine.json").write_text("{}")
    assert evaluate(f"checkpoint={run}", "benchmark=folder", f"benchmark_root={digits}", "output=mine.json") == 2
    assert "mine.json exists" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["csv", "html", "CSV", "parts"])
def test_an_output_that_the_table_or_the_page_would_replace_is_refused(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    out = tmp_path / f"scores.{ending}"
    arguments = [f"checkpoint={run / 'model'}", "benchmark=folder", f"benchmark_root={digits}", f"output={out}"]
    assert evaluate(*arguments) == 2
    assert "give a name that ends with .json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_output_takes_the_place_of_another(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"checkpoint={run / 'model'}", "benchmark=folder", f"benchmark_root={digits}"]
    for name in ("b.16", "b.32"):
        assert evaluate(*arguments, "benchmark.tasks=knn", f"output={tmp_path / name}") == 0
    endings = ("", ".csv", ".html", ".parts")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"b.{n}{end}" for n in (16, 32) for end in endings]
    capsys.readouterr()
    other = ["evaluators=benchmark_zero_shot", f"data.root={digits}", f"output={tmp_path / 'b.16'}"]
    assert evaluate(f"checkpoint=[{run / 'model'}]", *other) == 2
    assert "b.16 exists" in capsys.readouterr().err
    mine = tmp_path / "mine.csv"
    mine.write_text("mine")
    capsys.readouterr()
    assert evaluate(*arguments, f"output={tmp_path / 'mine.json'}") == 2
    assert "mine.csv exists" in capsys.readouterr().err and mine.read_text() == "mine"
    for alone in (arguments, [arguments[0], "evaluators=benchmark_zero_shot", f"data.root={digits}"]):
        assert evaluate(*alone, f"output={tmp_path}", "overwrite=true") == 2
        assert "is a folder" in capsys.readouterr().err


def test_fashion_mnist_from_its_files_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    real = Path(DEBIAN)
    source = real if real.is_dir() else write_idx_folder(tmp_path / "idx")
    model = save_model(tmp_path / "model")
    arguments = [
        f"checkpoint={model}",
        "benchmark=fashion_mnist",
        f"+benchmark.prepare.root={source}",
        "+benchmark.prepare.limit=300",
        "+tasks.linear_probe.max_iterations=30",
    ]
    assert evaluate(*arguments) == 0
    assert "[3/3]" in capsys.readouterr().err
    metrics = json.loads(Path("evaluation.json").read_text())["models"][0]["metrics"]
    assert metrics["fashion_mnist/zero_shot/images"] == metrics["fashion_mnist/linear_probe/train_images"] == 300
    assert metrics["fashion_mnist/zero_shot/top1/chance"] == 0.1
    for name in ("linear_probe/top1", "knn/20nn/top1"):
        assert metrics[f"fashion_mnist/{name}/ci_low"] > 0.2, name  # features of pixels, though of no training
    assert "fashion_mnist" in Page(Path("evaluation.html")).words
    shutil.rmtree(tmp_path / "cache")
    assert evaluate(*arguments[:2], "+benchmark.prepare.root=nowhere", "output=other.json") == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    assert build(source, tmp_path / "again", 300).is_dir()
