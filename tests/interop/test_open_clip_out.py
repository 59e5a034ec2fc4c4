"""What is written for open_clip computes the same there, and comes back to the bit."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from mmpretrain import load
from mmpretrain.errors import InputError
from mmpretrain.interop import huggingface_out, open_clip_out
from mmpretrain.interop.converted import write
from mmpretrain.interop.huggingface_in import from_folder
from mmpretrain.interop.open_clip_in import from_name
from tests.interop import out_models
from tests.interop.huggingface_models import TEXTS, pictures


def trunk() -> dict[str, Any]:
    """SigLIP with a backbone that timm builds by its name alone."""
    encoder = {"_target_": "mmpretrain.ImageEncoder", "name": "vit_tiny_patch16_224", **out_models.HALF}
    text = {**out_models.bidirectional(), "activation": "gelu"}
    found = out_models.parts(
        {"image": encoder, "text": text}, out_models.sigmoid(192), pad="context_length", pad_id=49407
    )
    found["model"]["projections"]["text"]["out_features"] = 192
    found["preprocess"] |= {"image_size": 224, "resize": "squash", "interpolation": "bilinear"}
    return found


def resnet() -> dict[str, Any]:
    from mmpretrain.interop.modified_resnet import resnet_encoder, resnet_projection

    found = out_models.small_clip()
    found["model"]["encoders"]["image"] = resnet_encoder([1, 1, 1, 1], 8, 32)
    found["model"]["projections"] = {"image": resnet_projection(8, 24)}
    return found


def bare_resnet() -> dict[str, Any]:
    """As `model=clip_rn50`, whose projection is a matrix."""
    found = resnet()
    del found["model"]["projections"]
    return found


def convolutional() -> dict[str, Any]:
    """A backbone that holds its pooling as a module, and pictures of another size than timm's."""
    found = out_models.small_clip()
    found["model"]["encoders"]["image"] = {
        "_target_": "mmpretrain.ImageEncoder",
        "name": "resnet10t",
        "model_args": {"global_pool": "max"},
    }
    return found


def tanh() -> dict[str, Any]:
    found = out_models.clip(act_layer="gelu_tanh")
    found["model"]["encoders"]["text"]["activation"] = "gelu"
    return found


FOLDED = (out_models.small_clip,)
"""Whose bias of the patches is added to their positions: equal, but not to the bit."""
MODELS = [out_models.clip, out_models.small_clip, out_models.coca, trunk, convolutional, tanh, resnet, bare_resnet]


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.__name__)
def test_open_clip_computes_the_same_and_the_way_back_is_exact(config: Any, tmp_path: Path) -> None:
    folder = out_models.saved(tmp_path / "ours", config())
    report = open_clip_out.export(folder, tmp_path / "out")
    assert report.largest <= 1e-5 and report.errors["token ids"] == 0 and report.errors["pixels"] <= 1e-6
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["versions"]["open_clip_torch"]
    assert ("captions" in report.errors) == (config is out_models.coca)
    model, preprocess, tokenizer = load(folder)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(TEXTS)
    images = torch.stack([transform(image) for image in pictures()])
    with torch.no_grad():
        image = model.embed("image", torch.stack([preprocess(image) for image in pictures()]))
        assert (theirs.eval().encode_image(images, normalize=True) - image).abs().max() <= 1e-5
        text = model.embed("text", tokenizer(TEXTS))
        assert (theirs.encode_text(ids, normalize=True) - text).abs().max() <= 1e-5
    again = load(write(from_name(str(tmp_path / "out")), tmp_path / "again"))
    for name, tensor in model.state_dict().items():
        if config not in FOLDED or not name.endswith(("pos_embed", "patch_embed.proj.bias")):
            assert torch.equal(again.model.state_dict()[name], tensor), name
    ours, other = tokenizer(TEXTS), again.tokenizer(TEXTS)
    assert torch.equal(ours.values[ours.mask], other.values[other.mask])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (out_models.siglip, r"model_args \{.*'act_layer': 'gelu_tanh'.*\} for timm's vit_base_patch16_siglip_224"),
        (lambda: out_models.coca(class_mask="exact"), "a class token that sees exactly the text"),
        (lambda: out_models.clip(act_layer="gelu"), "QuickGELU in one encoder alone"),
        (lambda: out_models.clip(qk_norm=True), "model_args .*qk_norm"),
        (out_models.naflex, "pictures of any size"),
    ],
)
def test_what_open_clip_cannot_hold_is_named_and_nothing_is_left(config: Any, message: str, tmp_path: Path) -> None:
    folder = out_models.saved(tmp_path / "ours", config())
    with pytest.raises(InputError, match=message):
        open_clip_out.export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_model_without_pictures_is_refused(tmp_path: Path) -> None:
    config = out_models.small_clip()
    del config["model"]["encoders"]["image"]
    folder = out_models.saved(tmp_path / "ours", config)
    with pytest.raises(InputError, match="describes no image encoder"):
        open_clip_out.export(folder, tmp_path / "out")


def test_masks_for_padding_are_named(tmp_path: Path) -> None:
    config = out_models.clip()
    config["model"]["encoders"]["text"] |= {"causal": False, "pooling": "mean"}
    folder = out_models.saved(tmp_path / "ours", config)
    with pytest.raises(InputError, match="mean pooling of the text, bidirectional with a mask for padding"):
        open_clip_out.export(folder, tmp_path / "out")


def test_a_tokenizer_of_bytes_is_written(tmp_path: Path) -> None:
    config = out_models.small_clip()
    config["model"]["encoders"]["text"] |= {"vocab_size": 259, "eos_id": 2}
    config["tokenizer"] = {"_target_": "mmpretrain.data.tokenizer.ByteTokenizer", "context_length": 16}
    folder = out_models.saved(tmp_path / "ours", config)
    assert open_clip_out.export(folder, tmp_path / "out").errors["text embedding"] <= 1e-5


@pytest.mark.parametrize("read", ["upright", "stored"])
def test_files_that_open_clip_reads_otherwise_are_noted(read: str, tmp_path: Path) -> None:
    config = out_models.clip()
    config["preprocess"]["read"] = read
    report = open_clip_out.export(out_models.saved(tmp_path / "ours", config), tmp_path / "out")
    kinds = [f"pixels of files {kind}" for kind in ("of odd sides", "turned (EXIF)", "transparent", "grey")]
    if read == "stored":
        assert not report.notes and all(report.errors[kind] <= 1e-6 for kind in kinds)
        return
    notes = report.notes or {}
    assert list(notes) == kinds and not set(kinds) & set(report.errors)
    assert [notes[kind] > 0.1 for kind in kinds] == [False, True, True, False]
    assert "turned (EXIF)" in report.said and "grey" not in report.said


def test_clip_of_transformers_is_written_for_open_clip(tmp_path: Path) -> None:
    hub = tmp_path / "theirs"
    huggingface_out.export(out_models.saved(tmp_path / "first", out_models.clip()), hub)
    folder = write(from_folder(hub), tmp_path / "ours")
    report = open_clip_out.export(folder, tmp_path / "out")
    assert report.errors["text embedding"] <= 1e-5 and report.errors["token ids"] == 0
    again = load(write(from_name(str(tmp_path / "out")), tmp_path / "again")).model.state_dict()
    assert all(torch.equal(again[name], x) for name, x in load(folder).model.state_dict().items())


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match=r"needs a package.*mmpretrain-contrastive\[open_clip\]"):
        open_clip_out.export(tmp_path, tmp_path / "out")


def test_beyond_the_tolerance_nothing_is_kept(tmp_path: Path) -> None:
    folder = out_models.saved(tmp_path / "ours", out_models.clip())
    with warnings.catch_warnings(), pytest.raises(InputError, match="differ by more than 1e-12"):
        open_clip_out.export(folder, tmp_path / "out", tolerance=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
