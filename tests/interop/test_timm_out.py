"""The image encoder computes the same in timm, and comes back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mmpretrain import load
from mmpretrain.errors import InputError
from mmpretrain.interop import timm_out
from tests.data.photos import photo
from tests.interop import out_models


def convnext() -> dict[str, Any]:
    args = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    found = out_models.clip()
    found["model"]["encoders"]["image"] = {
        "_target_": "mmpretrain.ImageEncoder",
        "name": "convnext_base",
        "model_args": args,
    }
    return found


@pytest.mark.parametrize(
    "config", [out_models.clip, out_models.small_clip, out_models.siglip, out_models.naflex, convnext]
)
def test_timm_computes_the_same_from_the_same_pictures(config: Any, tmp_path: Path) -> None:
    folder = out_models.saved(tmp_path / "ours", config())
    assert timm_out.export(folder, tmp_path / "out").largest <= 1e-5
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    model, preprocess, _ = load(folder)
    ours = model.encoders["image"]
    for name, tensor in ours.backbone.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    if hasattr(preprocess, "collate"):
        return
    settings = timm.data.resolve_model_data_config(theirs)
    transform = timm.data.create_transform(**settings)
    images = [photo(97, 64), photo(40, 72, 1)]
    with torch.no_grad():
        found = theirs(torch.stack([transform(image) for image in images]))
        expected = ours(torch.stack([preprocess(image) for image in images])).pooled
    assert list(settings["input_size"]) == [3, 32, 32]
    assert (found - expected).abs().max() <= 1e-5


def test_what_timm_cannot_hold_is_named(tmp_path: Path) -> None:
    folder = out_models.saved(tmp_path / "ours", out_models.coca())
    with pytest.raises(InputError, match="no SharedAttentionPool"):
        timm_out.export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_beyond_the_tolerance_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = out_models.saved(tmp_path / "ours", out_models.clip())
    stated = timm_out._stated

    def other(folder: Path) -> dict[str, Any]:
        found = stated(folder)
        return {**found, "model_args": {**found["model_args"], "act_layer": "gelu"}}

    monkeypatch.setattr(timm_out, "_stated", other)
    with pytest.raises(InputError, match="differ by more than 1e-05"):
        timm_out.export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
