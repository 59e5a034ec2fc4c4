from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from mmpretrain.composition import register_resolvers
from mmpretrain.config import instantiate
from mmpretrain.errors import InputError
from mmpretrain.evaluation.benchmark import places, works_of
from mmpretrain.evaluation.candidates import find
from mmpretrain.evaluation.results import Results, work
from tests.evaluation.digits import write_digits
from tests.evaluation.suite_example import measure, save_model, save_run, task
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_digits(folder / "wds_digits")
    write_digits(folder / "captions", "retrieval")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(save_model(folder / name, seed)) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def alone(root: Path, models: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return measure(str(root), models, str(tmp_path_factory.mktemp("alone")))


def differing(found: list[Any], expected: list[Any]) -> list[str]:
    """Names of the metrics of which any differs by more than rounding."""
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    return [
        f"{mine[0]} {mine[1]} {name}: {mine[2].get(name)} {value}"
        for mine, theirs in zip(found, expected, strict=True)
        for name, value in theirs[2].items()
        if mine[2].get(name) != pytest.approx(value, abs=1e-12)
    ]


def test_every_model_is_measured_in_every_way(alone: list[Any]) -> None:
    tasks = ["retrieval", "zero_shot", "linear_probe", "knn"]
    assert [one[1] for one in alone] == tasks * 2
    assert alone[0][2] != alone[4][2]
    metrics = {one[1]: one[2] for one in alone[:4]}
    assert metrics["linear_probe"]["top1"] > 0.4 > 0.1 == metrics["linear_probe"]["top1/chance"]
    assert metrics["knn"]["20nn/top1/ci_low"] < metrics["knn"]["20nn/top1"] < metrics["knn"]["20nn/top1/ci_high"]
    assert metrics["retrieval"]["captions"] == 400


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_change_nothing(root: Path, models: list[str], alone: list[Any], tmp_path: Path, world_size: int) -> None:
    for found in run_ranks(measure, world_size, str(root), models, str(tmp_path)):
        assert differing(found, alone) == []
    assert len(list(tmp_path.rglob("*.json"))) == 8


@pytest.mark.parametrize(("batch_size", "num_workers"), [(7, 0), (1000, 2)])
def test_batch_size_and_workers_change_nothing(
    root: Path, models: list[str], alone: list[Any], tmp_path: Path, batch_size: int, num_workers: int
) -> None:
    assert differing(measure(str(root), models[:1], str(tmp_path), batch_size, num_workers), alone[:4]) == []


def test_what_was_stopped_goes_on_and_comes_to_the_same(
    root: Path, models: list[str], alone: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(str(root), models, str(tmp_path), stop_after=3)
    assert len(list(tmp_path.rglob("*.json"))) == 3
    capsys.readouterr()
    assert measure(str(root), models, str(tmp_path), batch_size=50) == alone
    said = capsys.readouterr().err.splitlines()
    assert [line.endswith("kept") for line in said] == [True] * 3 + [False] * 5
    assert said[0].startswith("[1/8] ") and "captions, retrieval" in said[0]
    assert measure(str(root), models, str(tmp_path), stop_after=0) == alone


def test_a_killed_process_leaves_whole_files_only(
    root: Path, models: list[str], alone: list[Any], tmp_path: Path
) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=measure, args=(str(root), models, str(tmp_path)))
    process.start()
    limit = time.monotonic() + 60
    while not list(tmp_path.rglob("*.json")) and time.monotonic() < limit:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = [path for path in tmp_path.rglob("*.json") if not path.name.startswith(".")]
    assert kept and all(json.loads(path.read_text())["metrics"] for path in kept)
    assert measure(str(root), models, str(tmp_path)) == alone


def test_only_the_same_work_on_the_same_model_is_kept(root: Path, models: list[str], tmp_path: Path) -> None:
    results, (one, two) = Results(tmp_path), find(models)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "0.tar").write_bytes(b"1")
    config = {"_target_": "x", "ks": [1], "batch_size": 3, "data": {"root": str(folder)}}
    done = work("digits", "zero_shot", config, "cpu")
    results.save(one, done, {"top1": 0.5}, 1.0)
    assert results.load(one, done) == {"top1": 0.5}
    assert results.load(one, work("digits", "zero_shot", {**config, "batch_size": 9}, "cpu")) == {"top1": 0.5}
    assert results.load(one._replace(name="renamed"), done) == {"top1": 0.5}
    others = [
        (two, done),
        (one, work("letters", "zero_shot", config, "cpu")),
        (one, work("digits", "knn", config, "cpu")),
        (one, work("digits", "zero_shot", {**config, "ks": [5]}, "cpu")),
        (one, work("digits", "zero_shot", config, "cuda:0")),
    ]
    (folder / "0.tar.idx.npz").write_bytes(b"an index, made while reading")
    assert results.load(one, work("digits", "zero_shot", config, "cpu")) == {"top1": 0.5}
    (folder / "0.tar").write_bytes(b"22")
    others.append((one, work("digits", "zero_shot", config, "cpu")))
    assert [results.load(*other) for other in others] == [None] * len(others)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"metrics": {"top1": NaN}}', "null"])
def test_a_damaged_file_is_no_result(models: list[str], tmp_path: Path, damage: str) -> None:
    results, (one, _) = Results(tmp_path), find(models)
    done = work("digits", "zero_shot", {}, "cpu")
    results.save(one, done, {"top1": 0.5}, 1.0)
    (path,) = tmp_path.rglob("*.json")
    path.write_text(damage)
    assert results.load(one, done) is None


def test_models_are_found_by_folder_run_checkpoint_and_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = save_run(tmp_path / "runs" / "x" / "first")
    model = save_model(tmp_path / "models" / "two", 5)
    assert [(one.name, one.run, one.step) for one in find("runs/x/first")] == [("runs/x/first", "runs/x/first", 30)]
    steps = find("runs/x/first/checkpoints")
    assert [one.step for one in steps] == [10, 20, 30]
    assert [one.name for one in steps] == [f"runs/x/first@{step}" for step in (10, 20, 30)]
    assert find("runs/x/*/checkpoints/step_*") == steps
    assert find(["runs/x/first/checkpoints/latest", str(run / "checkpoints" / "step_00000030")]) == steps[2:]
    assert [one.name for one in find([str(model), "runs/x/first/model"])] == ["models/two", "runs/x/first"]
    assert len({one.identity for one in [*steps, *find(str(model))]}) == 4
    again = save_model(tmp_path / "models" / "again", 5)
    assert find(str(again))[0].identity == find(str(model))[0].identity


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere", "not a model folder"),
        ("step_*", "matches nothing"),
        ("empty", "not a model folder"),
        ([], "checkpoint is empty"),
    ],
)
def test_what_is_no_model_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        find(given)


def test_data_sets_are_found_by_any_of_their_names(tmp_path: Path) -> None:
    for name in ("wds_vtab-dtd", "pets", "vtab/svhn"):
        (tmp_path / name).mkdir(parents=True)
    found = places(str(tmp_path), ["vtab/dtd", "pets", "vtab/svhn"])
    assert [Path(found[name]).name for name in found] == ["wds_vtab-dtd", "pets", "svhn"]
    assert places(str(tmp_path / "wds_{name}"), ["vtab/dtd"])["vtab/dtd"] == str((tmp_path / "wds_vtab-dtd").resolve())
    assert places(str(tmp_path / "pets"), ["."]) == {".": str((tmp_path / "pets").resolve())}
    hub = "https://huggingface.co/datasets/clip-benchmark/wds_{name}"
    assert places(hub, ["vtab/dtd"]) == {"vtab/dtd": hub.format(name="vtab-dtd")}
    with pytest.raises(InputError, match="give the folder"):
        places(hub, ["."])
    with pytest.raises(InputError, match=r"lacks 2 of 3 data sets: cars, vtab/flowers"):
        places(str(tmp_path), ["pets", "cars", "vtab/flowers"])


def test_a_benchmark_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    benchmark = {"root": str(tmp_path), "data_sets": ["digits"], "tasks": ["zero_shot"]}
    tasks = {"zero_shot": task("zero_shot")}
    (one,) = works_of(benchmark, tasks, "cpu")
    assert one.config["data"]["root"] == str((tmp_path / "digits").resolve()) and one.config["data"]["name"] == "digits"
    for change, words in (({"tasks": []}, "empty"), ({"data_sets": []}, "empty"), ({"tasks": ["x"]}, "not known")):
        with pytest.raises(InputError, match=words):
            works_of({**benchmark, **change}, tasks, "cpu")


CONFIGS = Path(str(files("mmpretrain.configs"))) / "benchmark"


def composed(*overrides: str) -> Any:
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_module("mmpretrain.configs", version_base="1.3"):
        return compose("evaluate", overrides=["checkpoint=x", *overrides])


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_shipped_benchmarks_build(tmp_path: Path, name: str) -> None:
    for data_set in ("sugar_crepe", "fashion_mnist", "x"):
        (tmp_path / data_set).mkdir()
    place = [f"benchmark_root={tmp_path}"] if name in ("compositional", "folder") else []
    place = [f"benchmark.root={tmp_path}"] if name == "fashion_mnist" else place
    config = composed(f"benchmark={name}", "data.pictures=pictures", *place)
    plain: Any = OmegaConf.to_container(config.benchmark, resolve=True, throw_on_missing=True)
    tasks: Any = OmegaConf.to_container(config.tasks, resolve=True)
    assert plain["name"] == name
    for one in works_of(plain, tasks, "cpu"):
        assert callable(instantiate(one.config))
        assert "{root}" not in str(one.config) and "{name}" not in str(one.config)
    every = works_of({**plain, "tasks": list(tasks)}, tasks, "cpu")
    assert len(every) == len(plain["data_sets"]) * len(tasks)


def test_the_data_sets_are_those_of_clip_benchmark() -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    theirs = builder.dataset_collection
    assert list(composed("benchmark=vtab").benchmark.data_sets) == theirs["vtab"]
    assert list(composed("benchmark=vtab_plus").benchmark.data_sets) == theirs["vtab+"]
    assert sorted(composed("benchmark=retrieval").benchmark.data_sets) == sorted(theirs["retrieval"])
    assert set(composed("benchmark=imagenet").benchmark.data_sets) == {"imagenet1k", *theirs["imagenet_robustness"]}
