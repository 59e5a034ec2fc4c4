"""Programs written by torch.export give our embeddings after loading, at any batch size and text length."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import mmpretrain
from mmpretrain import InputError
from mmpretrain.interop import torch_export_out
from mmpretrain.interop.programs import capture, cases
from tests.interop import tiny


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.10 of its own code
@pytest.mark.parametrize("family", tiny.PARAMETERS)
def test_every_family_gives_the_same_embeddings(family, tmp_path):
    folder = tiny.saved(tmp_path / "model", family)
    report = torch_export_out.export(folder, tmp_path / "out")
    assert report.largest <= 1e-5 and len(report.errors) == 6
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"image.pt2", "text.pt2", "inputs.json", "parity.json"}
    described = json.loads((tmp_path / "out" / "inputs.json").read_text())["encoders"]
    assert described["image"]["inputs"]["image"]["shape"] == ["batch", 3, tiny.SIDE, tiny.SIDE]
    # SigLIP reads padding, so the length of its texts is fixed
    length = tiny.LENGTH if family == "siglip_tiny" else "length"
    assert described["text"]["inputs"]["text"] == {"dtype": "int64", "shape": ["batch", length]}
    model, _, tokenizer = mmpretrain.load(folder)
    generator = torch.Generator().manual_seed(3)
    image, text = (torch.export.load(tmp_path / "out" / f"{name}.pt2").module() for name in ("image", "text"))
    for size, words in ((1, "a"), (4, "some words"), (7, "longer than the context of this small model")):
        pixels = torch.randint(0, 256, (size, 3, tiny.SIDE, tiny.SIDE), generator=generator, dtype=torch.uint8)
        padded = tokenizer([f"{words} {'x' * i}" for i in range(size)])
        with torch.no_grad():
            torch.testing.assert_close(image(pixels), model.embed("image", pixels), rtol=0, atol=1e-5)
            got = text(padded.values, padded.mask)
            torch.testing.assert_close(got, model.embed("text", padded), rtol=0, atol=1e-5)


class _Branches(nn.Module):
    width = 8

    def forward(self, values, mask=None):
        pixels = values.float().flatten(1)[:, :8]
        if pixels.sum() > 0:  # a program has no such branch
            pixels = pixels * 2
        return mmpretrain.Encoded(pixels, pixels[:, None], None)


def test_an_encoder_that_cannot_be_recorded_is_refused(tmp_path):
    pretrained = mmpretrain.load(tiny.saved(tmp_path / "model", "clip_tiny"))
    (case,) = cases(pretrained._replace(model=mmpretrain.MultimodalModel(8, {"image": _Branches()})))
    with pytest.raises(InputError, match=r"the image encoder cannot be exported by torch\.export: .*data-dependent"):
        capture(case)
