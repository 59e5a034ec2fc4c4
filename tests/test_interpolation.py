"""Models between two: exact ends, the middle weight by weight, and models that do not fit each other."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import mmpretrain
from mmpretrain import InputError
from mmpretrain.cli import main
from mmpretrain.config import build_saved
from mmpretrain.interpolation import between, interpolate

MODEL = {
    "_target_": "mmpretrain.MultimodalModel",
    "embed_dim": 8,
    "encoders": {
        "text": {
            "_target_": "mmpretrain.TextEncoder",
            "vocab_size": 259,
            "context_length": 16,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "eos_id": 2,
        }
    },
}
CONFIG = {
    "model": MODEL,
    "preprocess": {"_target_": "mmpretrain.data.preprocess.Preprocess", "image_size": 16},
    "tokenizer": {"_target_": "mmpretrain.data.tokenizer.ByteTokenizer", "context_length": 16},
}


def saved(folder, seed: int, **changed):
    config = copy.deepcopy(CONFIG)
    config["model"] |= changed
    torch.manual_seed(seed)
    return mmpretrain.save(folder, build_saved(config["model"]), config)


def test_the_ends_are_the_models_and_the_middle_lies_between(tmp_path):
    a, b = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1, freeze=["text"])
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    for alpha, want in ((0.0, first), (1.0, second)):
        found = load_file(interpolate(a, b, tmp_path / f"at_{alpha}", alpha) / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    assert main(["interpolate", str(a), str(b), "--alpha", "0.3", str(tmp_path / "c")]) == 0
    for name, tensor in load_file(tmp_path / "c" / "model.safetensors").items():
        torch.testing.assert_close(tensor, 0.7 * first[name] + 0.3 * second[name], rtol=1e-6, atol=1e-7)
    model, _, tokenizer = mmpretrain.load(tmp_path / "c")
    assert model.embed("text", tokenizer(["a"])).norm().item() == pytest.approx(1, abs=1e-6)


def test_models_of_two_architectures_are_refused_naming_the_difference(tmp_path):
    a, b = saved(tmp_path / "a", 0), saved(tmp_path / "b", 0, embed_dim=12)
    with pytest.raises(InputError, match=r"differ in model\.embed_dim: 8 and 12"):
        interpolate(a, b, tmp_path / "c")
    for other in (a, b):
        with pytest.raises(InputError, match="is one of the two models"):
            interpolate(a, b, other)
    with pytest.raises(InputError, match=r"alpha is 1\.5"):
        interpolate(a, a, tmp_path / "c", 1.5)
    assert not (tmp_path / "c").exists()


def test_names_shapes_and_counters_must_be_the_same():
    zeros = {"a": torch.zeros(2), "n": torch.tensor([1])}
    with pytest.raises(InputError, match="missing a; extra b"):
        between(zeros, {"b": torch.zeros(2), "n": torch.tensor([1])}, 0.5)
    with pytest.raises(InputError, match="instead of"):
        between(zeros, {"a": torch.zeros(3), "n": torch.tensor([1])}, 0.5)
    with pytest.raises(InputError, match="n holds whole numbers"):
        between(zeros, {"a": torch.zeros(2), "n": torch.tensor([2])}, 0.5)


def test_two_tokenizers_of_one_file_name_are_refused(tmp_path):
    folders = []
    for number, words in enumerate((["<pad>", "<end>", "cat", "dog"], ["<pad>", "<end>", "dog", "cat"])):
        file = tmp_path / f"{number}" / "tokenizer.json"
        file.parent.mkdir()
        Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")).save(str(file))
        tokenizer = {"_target_": "mmpretrain.data.tokenizer.HuggingFaceTokenizer", "path": str(file)}
        tokenizer |= {"context_length": 16, "eos_token": "<end>", "pad_token": "<pad>"}
        torch.manual_seed(number)
        model = build_saved(copy.deepcopy(MODEL))
        folders.append(mmpretrain.save(tmp_path / f"model{number}", model, {**CONFIG, "tokenizer": tokenizer}))
    with pytest.raises(InputError, match=r"differ in tokenizer\.path: 'tokenizer.json \(SHA-256"):
        interpolate(*folders, tmp_path / "c")
    shutil.copytree(folders[0], tmp_path / "same")
    interpolate(folders[0], tmp_path / "same", tmp_path / "c")
