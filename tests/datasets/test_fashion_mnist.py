"""Fashion-MNIST's files in CLIP_benchmark's layout: every picture and label, the same bytes each time, wrong input."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpretrain.data.shards import iter_shard
from mmpretrain.datasets import fashion_mnist
from mmpretrain.datasets.fashion_mnist import CLASSES, DEBIAN, build, read_idx
from mmpretrain.errors import InputError
from mmpretrain.evaluation import BenchmarkData
from tests.datasets.idx_files import idx, write_idx_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idx_folder(tmp_path_factory.mktemp("idx") / "files")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_picture_and_label_is_there_in_order(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "SAMPLES_PER_SHARD", 500)
    out = build(source, tmp_path / "out")
    for split, first, count in (("train", "train", 1200), ("test", "t10k", 597)):
        images = read_idx(source / f"{first}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{first}-labels-idx1-ubyte.gz").tolist()
        shards = int((out / split / "nshards.txt").read_text())
        data = BenchmarkData(out, split, transform=lambda image, generator=None: np.array(image))
        assert (len(data), shards) == (count, -(-count // 500))
        assert data.classes == list(CLASSES) and all("{}" in template for template in data.templates or [""])
        assert [data[i][1] for i in range(count)] == labels
        for i in (0, 499, count - 1):
            assert np.array_equal(data[i][0][..., 0] if data[i][0].ndim == 3 else data[i][0], images[i])
    sample = next(iter_shard(out / "test" / "0.tar"))
    assert sample["__key__"] == "s0000000" and set(sample) == {"__key__", "png", "cls"}


def test_the_same_files_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    first = content(build(source, tmp_path / "a", limit=40))
    assert content(build(write_idx_folder(tmp_path / "plain", packed=False), tmp_path / "b", limit=40)) == first
    assert build(source / "gone", tmp_path / "a", limit=40) == tmp_path / "a"  # complete: nothing is read
    with pytest.raises(InputError, match="limit=40"):
        build(source, tmp_path / "a")


def test_wrong_input_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        build(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match="at least 1"):
        build(source, tmp_path / "out", limit=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(InputError, match="no build of Fashion-MNIST"):
        build(source, tmp_path / "full")
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "full" / "card.json").write_text(damaged)
        with pytest.raises(InputError, match="is damaged"):
            build(source, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    ("name", "damaged", "words"),
    [
        ("train-images-idx3", b"", "no IDX file"),
        ("train-images-idx3", idx(np.zeros((3, 2, 2)))[:-1], "but 11 follow"),
        ("train-labels-idx1", idx(np.zeros((3, 2))), "labels"),
        ("train-labels-idx1", idx(np.zeros(7)), "labels"),
        ("t10k-labels-idx1", idx(np.full(597, 10)), "not those of 10 classes"),
        ("t10k-labels-idx1", b"\0\0\x0d\1" + bytes(8), "no IDX file"),
    ],
)
def test_damaged_files_are_said(tmp_path: Path, name: str, damaged: bytes, words: str) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(damaged))
    with pytest.raises(InputError, match=words):
        build(folder, tmp_path / "out")
    (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(damaged)[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        build(folder, tmp_path / "out")


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "MAX_BYTES", 1000)
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx(np.zeros((100, 28, 28)))))
    with pytest.raises(InputError, match="bytes"):
        read_idx(tmp_path / "x.gz")


@pytest.mark.skipif(not Path(DEBIAN).is_dir(), reason="Debian's package is not installed; the others use its format")
def test_debians_files(tmp_path: Path) -> None:
    data = BenchmarkData(build(out=tmp_path / "out", limit=50), transform=lambda image, generator=None: image)
    assert [data[i][1] for i in range(5)] == [9, 2, 1, 1, 6]
    assert isinstance(data[0][0], Image.Image) and data[0][0].size == (28, 28)
