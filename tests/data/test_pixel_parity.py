"""Pixels equal those of open_clip, timm and transformers, on twenty files of odd sizes, modes and orientations."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from mmpretrain.data.pixels import Picture, to_rgb
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.errors import InputError
from tests.data.odd_pictures import odd_pictures

NAMES = tuple(odd_pictures())
THEIRS = {"crop": "shortest", "pad": "longest", "squash": "squash"}
ZERO, ONE = (0, 0, 0), (1, 1, 1)


def opened(name: str) -> Image.Image:
    return Image.open(io.BytesIO(odd_pictures()[name]))


def levels(pixels: Tensor) -> Tensor:
    """Floats from 0 to 1 as the levels they were made of."""
    return (pixels * 255).round().to(torch.uint8)


def test_the_files_are_twenty_and_of_all_kinds():
    images = [opened(name) for name in NAMES]
    assert len(NAMES) == 20
    assert {image.mode for image in images} == {"RGB", "L", "LA", "RGBA", "P", "CMYK", "I;16", "1"}
    assert {image.getexif().get(0x0112, 1) for image in images} == set(range(1, 9))
    assert sum(side % 2 for image in images for side in image.size) > 30


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", THEIRS)
@pytest.mark.parametrize("size", [56, 75])
def test_stored_equals_open_clips_transform_on_every_file(size, resize, interpolation):
    ours = Preprocess(size, resize, interpolation=interpolation, read="stored")
    peer = image_transform(size, False, ZERO, ONE, THEIRS[resize], interpolation)
    for name in NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, on transparency in palettes, in both
            assert torch.equal(ours(opened(name)), levels(peer(opened(name)))), name


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", THEIRS)
def test_upright_equals_open_clips_transform_on_the_upright_picture(resize, interpolation):
    ours = Preprocess(64, resize, interpolation=interpolation, fill=7)
    peer = image_transform(64, False, ZERO, ONE, THEIRS[resize], interpolation, fill_color=7)
    for name in NAMES:
        upright = to_rgb(opened(name))
        assert torch.equal(ours(opened(name)), levels(peer(upright))), name
        assert torch.equal(ours.from_picture(Picture(opened(name), odd_pictures()[name])), ours(opened(name))), name


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("resize", "mode"), [("crop", "center"), ("squash", "squash"), ("pad", "border")])
def test_upright_equals_timms_transform(resize, mode, interpolation):
    mean = (0.48, 0.46, 0.41)  # timm pads with it
    peer = create_transform(
        64, mean=mean, std=ONE, interpolation=interpolation, crop_pct=1.0, crop_mode=mode, normalize=False
    )
    ours = Preprocess(64, resize, interpolation=interpolation, fill=[round(255 * level) for level in mean])
    for name in NAMES:
        assert torch.equal(ours(opened(name)), peer(to_rgb(opened(name)))), name


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("size", [56, 75])
def test_rgb_equals_transformers_processors_on_every_file(size, resize, interpolation):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": size, "width": size}
    peer = CLIPImageProcessorPil(
        size={"shortest_edge": size} if resize == "crop" else square,
        crop_size=square,
        do_center_crop=resize == "crop",
        resample={"bicubic": 3, "bilinear": 2}[interpolation],
        do_rescale=False,
        do_normalize=False,
    )
    ours = Preprocess(size, resize, interpolation=interpolation, read="rgb")
    for name in NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = torch.from_numpy(np.asarray(peer(opened(name))["pixel_values"][0]))
            assert torch.equal(ours(opened(name)), expected.to(torch.uint8)), name


@pytest.mark.parametrize("resize", THEIRS)
def test_bilinear_and_fill_are_near_exact_with_torch(resize):
    exact = Preprocess(64, resize, interpolation="bilinear", fill=(9, 99, 199))
    quick = Preprocess(64, resize, exact=False, interpolation="bilinear", fill=(9, 99, 199))
    for name in NAMES:
        got, expected = (made(opened(name)).int() for made in (quick, exact))
        assert (got - expected).abs().max() <= 2, name
        assert (got == expected).float().mean() > 0.95, name


def test_what_upright_does_that_others_do_not():
    turned, clear = opened("exif 6 33x49"), opened("colour with alpha")
    upright, stored = (Preprocess(32, "squash", read=read)(turned) for read in ("upright", "stored"))
    assert (upright.int() - stored.rot90(-1, (1, 2)).int()).abs().float().mean() < 8  # the same, turned
    corner = Preprocess(32, "squash")(clear)[:, 2, 2].tolist()
    assert corner == [255, 255, 255]  # what is clear is white, not what lies under it


def test_fill_surrounds_a_padded_picture():
    pixels = Preprocess(32, "pad", fill=(1, 2, 3))(Image.new("RGB", (64, 16), "white"))
    assert pixels[:, 0, 0].tolist() == [1, 2, 3] and pixels[:, 16, 16].tolist() == [255, 255, 255]
    assert torch.equal(pixels, Preprocess(32, "pad", exact=False, fill=[1, 2, 3])(Image.new("RGB", (64, 16), "white")))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"interpolation": "nearest"}, "interpolation='nearest'; expected one of bicubic, bilinear"),
        ({"read": "raw"}, "read='raw'"),
        ({"read": "stored", "exact": False}, "exact=true"),
        ({"fill": 256}, "fill=256"),
        ({"fill": (0, 0)}, "fill="),
        ({"fill": True}, "fill=True"),
    ],
)
def test_bad_options_name_themselves(options, word):
    with pytest.raises(InputError, match=word):
        Preprocess(8, **options)
