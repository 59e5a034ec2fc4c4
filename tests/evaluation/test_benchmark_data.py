from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from mmpretrain.data import cache
from mmpretrain.data.decode import DecodeError
from mmpretrain.data.download import Retry
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.errors import InputError
from mmpretrain.evaluation import BenchmarkData, Retrieval, ZeroShotClassification
from mmpretrain.evaluation.benchmark_data import _address
from mmpretrain.evaluation.benchmark_names import benchmark_classes, benchmark_templates
from tests.data.servers import Web, body, status
from tests.evaluation.digits import NAMES, TEMPLATES, digit_model, npy, png, scans, write_digits, write_shards

TASKS = {
    "classification": "zeroshot_classification",
    "multilabel": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
}
READ = partial(BenchmarkData, transform=Preprocess(8))


@pytest.mark.parametrize("kind", TASKS)
def test_a_folder_is_read_as_clip_benchmark_reads_it(tmp_path: Path, kind: str) -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    folder = write_digits(tmp_path / "digits", kind)
    own = READ(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = builder.build_dataset(
            "wds/digits", str(folder), transform=Preprocess(8), split="test", task=TASKS[kind]
        )
        expected = list(theirs)
    assert len(own) == len(expected) == 200
    for (image, target), (their_image, their_target) in zip(own, expected, strict=True):
        assert torch.equal(image, their_image)
        assert target == (their_target.tolist() if kind == "multilabel" else their_target)
    assert own.classes == theirs.classes
    assert own.templates == (theirs.templates and [text.replace("{c}", "{}") for text in theirs.templates])


def test_what_a_folder_says(tmp_path: Path) -> None:
    data = READ(write_digits(tmp_path / "digits"), "train")
    assert (len(data), data.kind, data.classes, data[3][1]) == (400, "classification", NAMES, int(scans()[1][3]))
    assert data.templates == [text.replace("{c}", "{}") for text in TEMPLATES]
    assert READ(write_digits(tmp_path / "captions", "retrieval"))[0][1] == ["the digit one", "a scan of one."]


def test_equal_data_have_one_identity(tmp_path: Path) -> None:
    first, second = (READ(write_digits(tmp_path / name)) for name in ("a", "b"))
    assert first.identity == second.identity
    assert len({first.identity, READ(tmp_path / "a", "train").identity}) == 2
    assert READ(write_digits(tmp_path / "c", "multilabel")).identity != first.identity


def test_its_names_and_templates_classify(tmp_path: Path) -> None:
    data = partial(BenchmarkData, write_digits(tmp_path / "digits"))
    metrics = ZeroShotClassification(data)(digit_model())
    assert metrics["classes"] == 10
    assert 0.7 < metrics["top1"] < metrics["top5"] < 1
    shuffled = ZeroShotClassification(data, templates=["{} one"])(digit_model())
    assert shuffled["top1"] < metrics["top1"]


def test_retrieval_finds_captions_that_others_share(tmp_path: Path) -> None:
    data = partial(BenchmarkData, write_digits(tmp_path / "digits", "retrieval"))
    metrics = Retrieval(data, ks=(1, 5, 100))(digit_model())
    assert metrics["captions"] == 2 * metrics["images"] == 400
    # the same captions for 20 pictures tie, so none is first
    assert metrics["image_to_text/recall@1"] == 0
    assert metrics["image_to_text/recall@100"] > 0.8


def test_names_of_known_data_sets_come_from_the_package(tmp_path: Path) -> None:
    pytest.importorskip("clip_benchmark")
    folder = write_digits(tmp_path / "digits")
    (folder / "classnames.txt").unlink()
    (folder / "zeroshot_classification_templates.txt").unlink()
    assert READ(folder).classes is None and READ(folder).templates is None
    known = READ(folder, name="wds/vtab/flowers")
    assert known.classes == benchmark_classes("flowers") and known.classes[0] == "pink primrose"
    assert known.templates == benchmark_templates("flowers") == ["a photo of a {}, a type of flower."]
    assert benchmark_classes("vtab/caltech101") == benchmark_classes("caltech101_vtab")
    assert benchmark_classes("vtab/caltech101") != benchmark_classes("caltech101")
    assert benchmark_templates("vtab/caltech101") == benchmark_templates("caltech101")
    assert benchmark_templates("nothing known") == benchmark_templates("imagenet1k")
    with pytest.raises(InputError, match="no class names for 'nothing'"):
        READ(folder, name="nothing").classes  # noqa: B018
    with pytest.raises(InputError, match="give a language"):
        benchmark_classes("flowers", "xx")


def test_shards_behind_an_address(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "digits")
    with Web() as web:
        for file in folder.rglob("*.t*"):
            web.routes[f"/{file.relative_to(folder)}"] = body(file.read_bytes())
        remote = READ(f"{web.url}/", cache_dir=tmp_path / "cache")
        local = READ(folder)
        assert (remote.classes, remote.templates, len(remote)) == (local.classes, local.templates, len(local))
        assert torch.equal(remote[7][0], local[7][0])
        del web.routes["/classnames.txt"]
        assert READ(web.url, cache_dir=tmp_path / "other").classes is None
        with pytest.raises(InputError, match=r"has no val/nshards\.txt"):
            READ(web.url, "val", cache_dir=tmp_path / "cache")


def test_an_address_that_fails_is_no_address_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RETRY", Retry(patience=0.1, attempts=2, first=0.01))
    folder = write_digits(tmp_path / "digits")
    with Web() as web:
        for file in folder.rglob("*.t*"):
            web.routes[f"/{file.relative_to(folder)}"] = body(file.read_bytes())
        web.routes["/zeroshot_classification_templates.txt"] = status(503)
        data = READ(web.url, cache_dir=tmp_path / "cache")
        with pytest.raises(InputError, match="cannot fetch"):
            data.templates  # noqa: B018


def test_pages_of_the_hub_are_addresses() -> None:
    page = "https://huggingface.co/datasets/clip-benchmark/wds_cifar10"
    assert _address(page) == _address(f"{page}/") == "hf://datasets/clip-benchmark/wds_cifar10"
    assert _address(f"{page}/tree/main") == "hf://datasets/clip-benchmark/wds_cifar10@main"
    assert _address("/data/cifar10/") == "/data/cifar10"


def test_empty_lines_are_no_classes(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "digits")
    names, templates = folder / "classnames.txt", folder / "zeroshot_classification_templates.txt"
    expected = READ(folder).classes, READ(folder).templates
    for path in (names, templates):
        path.write_text(path.read_text() + "\n \n")
    assert (READ(folder).classes, READ(folder).templates) == expected
    names.write_text("zero\n\ntwo\n")
    with pytest.raises(InputError, match=r"classnames\.txt: line 2 is empty"):
        READ(folder).classes  # noqa: B018


def test_wrong_files(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "digits")
    with pytest.raises(InputError, match=r"has no val/nshards\.txt"):
        READ(folder, "val")
    (folder / "test" / "nshards.txt").write_text("many")
    with pytest.raises(InputError, match="says 'many'"):
        READ(folder)
    (folder / "test" / "nshards.txt").write_text("2")
    with pytest.raises(InputError, match=r"says 2, but there is 2\.tar"):
        READ(folder)
    (folder / "test" / "nshards.txt").write_text("9")
    with pytest.raises(InputError, match=r"3\.tar"):
        READ(folder)
    (folder / "dataset_type.txt").write_text("video")
    with pytest.raises(InputError, match="says 'video'"):
        READ(folder)


@pytest.mark.parametrize(
    ("kind", "sample", "message"),
    [
        ("classification", {"cls": b"cat"}, "'cat' is no class number"),
        ("classification", {"txt": b"1"}, "no field cls"),
        ("multilabel", {"npy": npy([0, 2])}, "expected a 0 or 1"),
        ("multilabel", {"npy": npy([[0, 1]])}, "expected a 0 or 1"),
        ("multilabel", {"cls": b"1"}, "no field npy"),
        ("retrieval", {"txt": b" \n \n"}, "no caption"),
    ],
)
def test_wrong_targets(tmp_path: Path, kind: str, sample: dict[str, bytes], message: str) -> None:
    write_shards(tmp_path / "test", [{"png": png(scans()[0][0]), **sample}])
    (tmp_path / "dataset_type.txt").write_text(kind)
    with pytest.raises(DecodeError, match=message):
        READ(tmp_path)[0]


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    caption = "a cat\u2028on a mat\x0b\x85here"
    write_shards(
        tmp_path / "test", [{"png": png(scans()[0][0]), "txt": f"{caption}\r\nsecond\n".encode(), "cls": b"0"}]
    )
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    assert READ(tmp_path)[0][1] == [caption, "second"]
    (tmp_path / "dataset_type.txt").write_text("classification")
    (tmp_path / "classnames.txt").write_bytes(f"{caption}\r\ndog\n".encode())
    assert READ(tmp_path).classes == [caption, "dog"]
