"""`mmpretrain evaluate`: the same numbers as during training, JSON out, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mmpretrain.cli import main
from tests.shard_sets import COLOURS
from tests.test_train import run


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "r"
    assert run(*tiny, f"run_dir={folder}", "trainer.max_steps=3") == 0
    return folder


def test_the_numbers_are_those_of_training(trained, shards, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    captions = "data.captions={_target_:mmpretrain.data.decode.TextCaption}"
    arguments = ["evaluators=image_text", f"data.val={shards}", captions, f"output={out}", "json=true"]
    assert main(["evaluate", f"checkpoint={trained}", *arguments]) == 0
    found = json.loads(out.read_text())
    during = json.loads((trained / "metrics.json").read_text())
    assert found and {f"val/{k}": v for k, v in found.items()}.items() <= during.items()
    assert "text_to_image/recall@1" in capsys.readouterr().out
    assert main(["evaluate", f"checkpoint={trained}", *arguments]) == 2
    assert "overwrite=true" in capsys.readouterr().err


def test_an_image_folder_and_shards_of_classes(trained, shards, tmp_path):
    for colour, value in COLOURS.items():
        (tmp_path / "pictures" / colour).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (30, 20), value).save(tmp_path / "pictures" / colour / f"{i}.png")
    for name, arguments in {
        "image_folder": [f"data.root={tmp_path / 'pictures'}"],
        "shards_classification": [f"data.val={shards}", f"data.class_names=[{','.join(COLOURS)}]"],
    }.items():
        out = tmp_path / f"{name}.json"
        assert (
            main(
                [
                    "evaluate",
                    f"checkpoint={trained / 'model'}",
                    f"evaluators={name}",
                    *arguments,
                    f"output={out}",
                ]
            )
            == 0
        )
        found = json.loads(out.read_text())
        assert found["classification/top1/chance"] == pytest.approx(0.25)
        assert (
            found["classification/top1/ci_low"] <= found["classification/top1"] <= found["classification/top1/ci_high"]
        )


def test_wrong_input(trained, tmp_path, capsys):
    for arguments, words in (
        (["checkpoint=/nowhere"], "not a model folder"),
        ([f"checkpoint={trained}", "evaluators=image_foldr"], "image_folder"),
        ([f"checkpoint={trained}", "otput=x.json"], "output"),
        ([], "checkpoint"),
        (["checkpoint=null"], "checkpoint=PATH"),
        ([f"checkpoint={trained}", "output=null"], "output=PATH"),
        ([f"checkpoint={trained}", f"output={trained}", "overwrite=true"], "is a folder"),
    ):
        assert main(["evaluate", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and len(error.splitlines()) == 1, error
