"""Saved models: a round trip, nothing but tensors and text, refusals that list what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open

import mmpretrain
from mmpretrain import InputError, load, save
from mmpretrain.config import instantiate, without_pretrained

MODEL = {
    "_target_": "mmpretrain.MultimodalModel",
    "embed_dim": 16,
    "encoders": {
        "image": {
            "_target_": "mmpretrain.ImageEncoder",
            "name": "vit_tiny_patch16_224",
            "model_args": {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        },
        "text": {
            "_target_": "mmpretrain.TextEncoder",
            "vocab_size": 259,
            "eos_id": 2,
            "context_length": 20,
            "width": 32,
            "depth": 1,
            "num_heads": 2,
        },
    },
}
CONFIG = {
    "model": MODEL,
    "preprocess": {"_target_": "mmpretrain.data.preprocess.Preprocess", "image_size": 16},
    "tokenizer": {"_target_": "mmpretrain.data.tokenizer.ByteTokenizer", "context_length": 20},
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    return save(tmp_path / "run" / "model", instantiate(MODEL), CONFIG)


def test_round_trip_by_model_and_run_folder(folder):
    torch.manual_seed(0)
    original = instantiate(MODEL).eval()
    for path in (folder, folder.parent, str(folder)):
        model, preprocess, tokenizer = load(path)
        assert isinstance(load(path), mmpretrain.Pretrained) and not model.training
        picture = Image.effect_noise((40, 30), 90).convert("RGB")
        pixels, ids = preprocess(picture).unsqueeze(0), tokenizer(["a red apple"])
        for modality, values in (("image", pixels), ("text", ids)):
            torch.testing.assert_close(model.embed(modality, values), original.embed(modality, values), rtol=0, atol=0)
            assert model.embed(modality, values).shape == (1, 16)


def test_the_contract_of_clip_benchmark(folder):
    """It stacks preprocessed pictures, moves both to a device, and calls encode_image and encode_text."""
    model, preprocess, tokenizer = load(folder)
    images = torch.stack([preprocess(Image.new("RGB", (20, 20), c)) for c in ("red", "blue")]).to("cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        image, text = model.encode_image(images), model.encode_text(tokenizer(["a", "b", "c"]).to("cpu"))
    assert (image.float() @ text.float().T).shape == (2, 3)


def test_files_are_tensors_and_text(folder):
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "golden.safetensors",
        "identity.json",
        "model.safetensors",
    }
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "logit_scale" in file.keys()  # noqa: SIM118 (not a dict)


def test_tokenizer_files_travel_with_the_model(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(["[PAD]", "[END]", "red", "apple", "[UNK]"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "mine.json"))
    part = {
        "_target_": "mmpretrain.data.tokenizer.HuggingFaceTokenizer",
        "path": str(tmp_path / "mine.json"),
        "context_length": 20,
        "eos_token": "[END]",
        "pad_token": "[PAD]",
    }
    folder = save(tmp_path / "model", instantiate(MODEL), {**CONFIG, "tokenizer": part})
    (tmp_path / "mine.json").unlink()
    moved = folder.rename(tmp_path / "elsewhere")
    ids = load(moved).tokenizer(["red apple"])
    assert ids.values[ids.mask].tolist() == [2, 3, 1]


def test_weights_of_another_model_are_refused_by_name(folder, tmp_path):
    other = {**MODEL, "encoders": {**MODEL["encoders"], "text": {**MODEL["encoders"]["text"], "depth": 2}}}
    save(tmp_path / "other", instantiate(other), {**CONFIG, "model": other})
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.save(config, tmp_path / "other" / "config.yaml")
    with pytest.raises(InputError, match=r"blocks\.1\."):
        load(tmp_path / "other")
    deeper = OmegaConf.load(folder / "config.yaml")
    deeper.model.encoders.text.depth = 2
    OmegaConf.save(deeper, folder / "config.yaml")
    with pytest.raises(InputError, match=r"[Mm]issing.*blocks\.1\."):
        load(folder)


def test_what_is_no_model_is_refused(tmp_path, folder):
    with pytest.raises(InputError, match="is not a model folder"):
        load(tmp_path / "nothing")
    (tmp_path / "notes").mkdir()
    with pytest.raises(InputError, match="is not a model folder"):
        save(tmp_path / "notes", load(folder).model, CONFIG)
    with pytest.raises(InputError, match="lacks preprocess"):
        save(tmp_path / "x", load(folder).model, {"model": MODEL, "tokenizer": {}})


def test_a_config_cannot_run_code(folder):
    marker = folder / "marker"
    for target in (
        {"_target_": "os.system", "_args_": [f"touch {marker}"]},
        {"_target_": "mmpretrain.distributed.os.system", "_args_": [f"touch {marker}"]},
        {"_target_": "torch.load", "f": "x"},
        {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(marker)]}]},
        {"_target_": "torch.hub.load", "_args_": ["x"]},
        {"_target_": "torch.nn.modules.module.warnings.sys.exit"},
        {"_target_": "lightning.fabric.utilities.cloud_io._load", "path_or_url": "x.ckpt", "weights_only": False},
        {"_target_": "timm.models.load_state_dict", "checkpoint_path": "x.pth", "weights_only": False},
        {"_target_": "mmpretrain.config.instantiate", "config": "{_target_: os.system}", "allow": ["os", "posix"]},
        {"_target_": "mmpretrain.pretrained.load", "path": "elsewhere", "allow": ["os"]},
        {"_target_": "mmpretrain.datasets.openmoji.build", "root": str(marker)},
        {"_target_": "torchvision.datasets.CIFAR10", "root": "x"},
    ):
        config = OmegaConf.load(folder / "config.yaml")
        config.preprocess = target
        OmegaConf.save(config, folder / "config.yaml")
        with pytest.raises(InputError, match="not allowed"):
            load(folder)
        assert not marker.exists()


def test_a_failed_save_leaves_the_old_model(folder, monkeypatch):
    import safetensors.torch

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = (folder / "model.safetensors").read_bytes()
    model = load(folder).model
    monkeypatch.setattr(safetensors.torch, "save_model", full)
    with pytest.raises(OSError, match="No space"):
        save(folder, model, CONFIG)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["letter.txt", "checkpoints/step.txt", "tokenizer.json/x"])
def test_a_folder_with_anything_else_is_not_replaced(name, folder):
    model = load(folder).model
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("dear")
    with pytest.raises(InputError, match="is not replaced: it holds"):
        save(folder, model, CONFIG)
    assert (folder / name).read_text() == "dear"


def test_a_project_with_a_config_is_not_replaced(folder, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text("mine: 1")
    with pytest.raises(InputError, match="is not a model folder"):
        save(tmp_path / "project", load(folder).model, CONFIG)
    assert (tmp_path / "project" / "config.yaml").read_text() == "mine: 1"


def test_a_model_folder_with_all_its_files_is_replaced(folder):
    for name in ("README.md", "training.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    save(folder, load(folder).model, CONFIG)
    assert not (folder / "README.md").exists()


def test_a_saved_model_that_asks_for_other_weights_is_refused(folder):
    saved = OmegaConf.load(folder / "config.yaml")
    assert "pretrained" not in saved.model.encoders.image
    for change in ({"pretrained": True}, {"pretrained": "/elsewhere"}, {"pool": {"x": [{"pretrained": "yes"}]}}):
        config = OmegaConf.merge(saved, {"model": {"encoders": {"image": change}}})
        OmegaConf.save(config, folder / "config.yaml")
        with pytest.raises(InputError, match=r"model|encoders\.image.*pretrained is .*in a saved model"):
            load(folder)
    config = OmegaConf.merge(saved, {"model": {"encoders": {"image": {"_args_": ["vit_tiny_patch16_224"]}}}})
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(InputError, match="by position in a saved model"):
        load(folder)


def test_save_forgets_pretrained_inside_lists_too():
    config = {"a": [{"pretrained": True}, 3], "pretrained": "x", "b": {"pretrained": {"c": 1}}}
    expected = {"a": [{"pretrained": False}, 3], "pretrained": False, "b": {"pretrained": False}}
    assert without_pretrained(config) == expected


def test_a_model_that_makes_nan_is_not_saved(folder, tmp_path):
    model = load(folder).model
    with torch.no_grad():
        next(model.encoders["text"].parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match=r"NaN or infinity of the golden inputs \(text.embeddings\)"):
        save(tmp_path / "broken", model, CONFIG)
    assert not (tmp_path / "broken").exists()


def test_import_is_light_and_the_public_list_is_real():
    # Time itself is not asserted: what would cost it is.
    code = (
        "import json, sys, torch; before = set(sys.modules); import mmpretrain;"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert loaded == ["mmpretrain"]
    for name in mmpretrain.__all__:
        assert getattr(mmpretrain, name) is not None
    assert set(mmpretrain.__all__) <= set(dir(mmpretrain))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mmpretrain.nothing
