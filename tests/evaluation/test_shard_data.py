from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from mmpretrain.data.decode import Image, JsonCaption, JsonValue, TextCaption
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.errors import InputError
from mmpretrain.evaluation import BenchmarkData, Retrieval, ShardCaptions, ShardClassification, ZeroShotClassification
from tests.evaluation.toy import pretrained

COLOURS = ["red", "lime", "blue", "red", "lime"]
NAMES = ["red", "green", "blue"]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Two shards of three and two samples: png, json, txt, cls."""
    for shard, numbers in enumerate(([0, 1, 2], [3, 4])):
        with tarfile.open(tmp_path / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in numbers:
                picture = io.BytesIO()
                PILImage.new("RGB", (6, 5), COLOURS[i]).save(picture, "png")
                name = NAMES[i % 3]
                meta = {"label": i % 3, "name": name, "caption": [name, f"{name} {name}"], "none": ["", " "]}
                fields = {
                    "png": picture.getvalue(),
                    "json": json.dumps(meta).encode(),
                    "txt": name.encode(),
                    "cls": str(i % 3).encode(),
                }
                for extension, content in fields.items():
                    info = tarfile.TarInfo(f"{i:03}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(tmp_path / "{0..1}.tar")


def test_captions_to_retrieval(shards: str) -> None:
    data = ShardCaptions(shards, transform=Preprocess(4))
    assert len(data) == 5
    image, captions = data[4]
    assert image.shape == (3, 4, 4)
    assert image[:, 0, 0].tolist() == [0, 255, 0]
    assert captions == ["green", "green green"]
    assert ShardCaptions(shards, transform=Preprocess(4), captions=TextCaption())[2][1] == ["blue"]
    with pytest.raises(IndexError):
        data[5]
    parts = pretrained()._replace(preprocess=Preprocess(4))
    metrics = Retrieval(partial(ShardCaptions, shards), ks=(1, 2, 3), num_workers=2)(parts)
    # red and green stand twice, so their namesakes tie: only blue is found at 1, everything at 3
    assert (metrics["images"], metrics["captions"]) == (5, 10)
    assert metrics["text_to_image/recall@1"] == 1 / 5
    assert metrics["text_to_image/recall@2"] == 1
    assert metrics["image_to_text/recall@3"] == 1


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        (JsonValue(), None),
        (JsonValue(key="name"), NAMES),
        (TextCaption("cls"), None),
        (JsonValue(), NAMES),
        (TextCaption("txt").__call__, NAMES),
    ],
)
def test_labels_to_zero_shot(shards: str, label: JsonValue, classes: list[str] | None) -> None:
    data = partial(ShardClassification, shards, label=label, classes=classes)
    assert [target for _, target in data(transform=Preprocess(4))] == [0, 1, 2, 0, 1]
    parts = pretrained()._replace(preprocess=Preprocess(4))
    assert ZeroShotClassification(data, NAMES, ["{}"])(parts)["top1"] == 1


def test_wrong_labels(shards: str) -> None:
    build = partial(ShardClassification, shards, transform=Preprocess(4))
    for wrong, message in [
        (
            build(label=JsonValue(key="name"), classes=NAMES[:2]),
            "'002' has label 'blue'; expected one of the 2 classes",
        ),
        (build(classes=NAMES[:2]), "'002' has label 2; expected one of the 2 classes"),
        (build(label=JsonValue(key="name")), "'002' has label 'blue'; expected a whole number"),
        (build(label=JsonValue(key="caption")), "'002' has label"),
    ]:
        with pytest.raises(InputError, match=message):
            wrong[2]


def test_missing_parts(shards: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'000' has no caption"):
        ShardCaptions(shards, transform=Preprocess(4), captions=JsonCaption(key="none"))[0]
    with pytest.raises(InputError, match="set extensions"):
        ShardCaptions(shards, transform=Preprocess(4), image=partial(Image, extensions=("jpg",)))[0]
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(InputError, match="no sample can be read"):
        ShardCaptions(str(tmp_path / "empty.tar"), transform=Preprocess(4))


@pytest.mark.parametrize("build", [ShardClassification, ShardCaptions, BenchmarkData])
def test_a_damaged_shard_is_refused_not_scored_without_its_samples(
    shards: str, tmp_path: Path, build: Callable[..., Any]
) -> None:
    (tmp_path / "test").mkdir()
    for number in range(2):
        shutil.copy(tmp_path / f"{number}.tar", tmp_path / "test")
    (tmp_path / "test" / "nshards.txt").write_text("2")
    given = tmp_path if build is BenchmarkData else str(tmp_path / "test")
    assert len(build(given, transform=Preprocess(4))) == 5
    damaged = tmp_path / "test" / "1.tar"
    damaged.write_bytes(damaged.read_bytes()[:4608])  # ends after the picture and a piece of the next sample
    with pytest.raises(InputError, match=r"1\.tar is damaged: \d+ of its samples are lost \(byte \d+"):
        build(given, transform=Preprocess(4))
