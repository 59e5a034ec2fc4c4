from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmpretrain.data.decode import DecodeError
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.errors import InputError
from mmpretrain.evaluation import BenchmarkData, CaptionChoice, CaptionPairs, wilson
from mmpretrain.evaluation.choice import own_similarities
from tests.evaluation.digits import NAMES, digit_model, png, scans, write_shards
from tests.evaluation.toy import COLOURS, Colours, pretrained

# Right: red for A, green for B; wrong: C is blue, so "red" is no nearer than "green", and both tie.
SWAP = partial(Colours, COLOURS[:4], [["red", "green"], ["green", "red", "blue"], ["red", "green"], ["red", "green"]])
ADD = partial(Colours, COLOURS[4:], [["green blue blue", "green"], ["blue", "red"]])


def test_six_pictures_by_hand() -> None:
    # D (2,1,0) is nearer to red; E (0,1,2) to green blue blue; F (2,0,1) is nearer to red, so "blue" is wrong.
    metrics = CaptionChoice({"swap": SWAP, "add": ADD}, batch_size=3)(pretrained())
    assert (metrics["swap/images"], metrics["add/images"]) == (4, 2)
    assert (metrics["swap/accuracy"], metrics["add/accuracy"]) == (3 / 4, 1 / 2)
    assert metrics["accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert metrics["swap/accuracy/chance"] == pytest.approx((3 * 1 / 2 + 1 / 3) / 4)
    assert metrics["accuracy/chance"] == pytest.approx((metrics["swap/accuracy/chance"] + 1 / 2) / 2)
    assert (metrics["swap/accuracy/ci_low"], metrics["swap/accuracy/ci_high"]) == wilson(3, 4)
    assert metrics["accuracy/ci_low"] < metrics["accuracy"] < metrics["accuracy/ci_high"]


def test_equal_to_clip_benchmark(tmp_path: Path) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")
    parts = digit_model()
    pictures, labels = scans()
    others = [(NAMES[i], NAMES[(i + 3) % 10], NAMES[(i + 7) % 10]) for i in labels[:150]]
    lines = [f"the digit {right}\na scan of {wrong}.\nthe digit {too}" for right, wrong, too in others]
    samples = [{"png": png(image), "txt": text.encode()} for image, text in zip(pictures, lines, strict=False)]
    write_shards(tmp_path / "test", samples)
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    metrics = CaptionChoice({"digit": partial(BenchmarkData, tmp_path)}, batch_size=64)(parts)
    data = BenchmarkData(tmp_path, transform=parts.preprocess)
    loader = [(torch.stack([image for image, _ in data]), [captions for _, captions in data])]
    expected = theirs.evaluate(parts.model, loader, parts.tokenizer, "cpu", amp=False)["acc"]
    assert 0.5 < metrics["accuracy"] < 1
    assert metrics["accuracy"] == pytest.approx(expected, abs=1e-6)


def test_similarities_are_those_of_each_pictures_own_captions() -> None:
    images, texts = torch.randn(5, 3), torch.randn(9000, 3)
    sizes = torch.tensor([1, 4000, 2, 4990, 7])
    expected = torch.cat([part @ image for part, image in zip(texts.split(sizes.tolist()), images, strict=True)])
    torch.testing.assert_close(own_similarities(images, texts, sizes), expected)


def write_pairs(folder: Path, content: object) -> partial[CaptionPairs]:
    for name in ("red", "blue"):
        Image.new("RGB", (6, 5), name).save(folder / f"{name}.jpg", quality=95)
    (folder / "pairs.json").write_text(json.dumps(content))
    return partial(CaptionPairs, folder / "pairs.json", folder)


@pytest.mark.parametrize("as_list", [False, True])
def test_sugar_crepes_files(tmp_path: Path, as_list: bool) -> None:
    items = [
        {"filename": "red.jpg", "caption": "red", "negative_caption": "blue"},
        {"filename": "blue.jpg", "caption": "blue", "negative_caption": ["red", "green"]},
    ]
    data = write_pairs(tmp_path, items if as_list else {"7": items[0], "12": items[1]})
    assert [captions for _, captions in data(transform=Preprocess(4))] == [["red", "blue"], ["blue", "red", "green"]]
    parts = pretrained()._replace(preprocess=Preprocess(4))
    metrics = CaptionChoice({"replace": data}, num_workers=2)(parts)
    assert metrics["accuracy"] == metrics["replace/accuracy"] == 1
    assert metrics["accuracy/chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        CaptionChoice({})
    with pytest.raises(InputError, match="item 1 has one caption"):
        CaptionChoice({"x": partial(Colours, COLOURS[:2], [["red", "green"], ["green"]])})(pretrained())
    right = {"filename": "red.jpg", "caption": "red", "negative_caption": "blue"}
    for content, message in [
        ([], "holds no pictures"),
        (3, "holds no pictures"),
        ([right, {"filename": "red.jpg", "caption": "red"}], "entry 1 is"),
        ([right | {"negative_caption": []}], "entry 0 is"),
        ([right | {"caption": 3}], "entry 0 is"),
        (["red"], "entry 0 is"),
    ]:
        with pytest.raises(InputError, match=message):
            write_pairs(tmp_path, content)(transform=Preprocess(4))
    missing = write_pairs(tmp_path, [right | {"filename": "none.jpg"}])(transform=Preprocess(4))
    with pytest.raises(InputError, match=r"none\.jpg cannot be read"):
        missing[0]
    with pytest.raises(DecodeError, match=r"'pairs\.json'"):
        write_pairs(tmp_path, [right | {"filename": "pairs.json"}])(transform=Preprocess(4))[0]
    (tmp_path / "pairs.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        CaptionPairs(tmp_path / "pairs.json", tmp_path, transform=Preprocess(4))
