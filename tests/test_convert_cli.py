"""`mmpretrain convert`, from files of other libraries to a model folder that loads."""

from __future__ import annotations

import pytest
import torch

import mmpretrain
from mmpretrain.cli import main
from mmpretrain.convert_cli import IMPORTERS
from tests.interop.openai_models import released, tiny_clip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(released(tiny_clip("resnet")), path)
    return path


def test_openai_end_to_end(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "openai:", "--weights", str(weights), "out"]) == 0
    assert "openai: is now out" in capsys.readouterr().out
    model, preprocess, tokenizer = mmpretrain.load(tmp_path / "out")
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = tiny_clip("resnet").encode_image(pixels, normalize=True)
        assert (model.embed("image", pixels) - expected).abs().max() < 1e-5
    assert preprocess.image_size == 64
    assert tokenizer(["a cat"]).values.shape[1] <= 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["tensorflow:x", "out"],
            "of no known format; expected one that begins with open_clip:, openai:, ",
        ),
        (["openai", "out"], "of no known format"),
        (["openai:", "out"], "needs --weights FILE"),
        (["open_clip:", "--weights", "x.txt", "out"], "needs a name such as open_clip:ViT-B-32"),
        (["openai:", "--weights", "nothing.pt", "out"], "nothing.pt does not exist"),
        (["openai:", "--weights", "x.txt", "out"], "is no file of weights that is read"),
        (["openai:", "--weights", "x.txt", "--tokenizer", ".", "out"], "leave --tokenizer out"),
        (["huggingface:.", "--weights", "x.txt", "out"], "leave --weights and --tokenizer out"),
        (["hf-hub:a/b", "--weights", "x.txt", "out"], "leave --weights out"),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("nothing")
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_model_is_not_replaced(weights, tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    assert main(["convert", "openai:", "--weights", str(weights), str(tmp_path / "letters")]) == 2
    assert "is not a model folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["a.txt"]


def test_the_help_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert all(f"{kind}:" in shown for kind in IMPORTERS)
