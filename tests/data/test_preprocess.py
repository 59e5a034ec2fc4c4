from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image, ImageOps

from mmpretrain.data.pixels import to_rgb
from mmpretrain.data.preprocess import Augment, Preprocess
from mmpretrain.errors import InputError

WHITE, RED = (255, 255, 255), (255, 0, 0)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@example(8, 10, 9, "crop")  # where scaling only the cut-out part would be off by 5 levels
@given(st.integers(8, 300), st.integers(8, 300), st.integers(8, 96), st.sampled_from(["crop", "squash", "pad"]))
def test_pixels_equal_open_clips_transform_to_one_level(width, height, size, resize):
    peer_mode = {"crop": "shortest", "squash": "squash", "pad": "longest"}[resize]
    if resize == "pad" and round(min(width, height) / (max(width, height) / size)) < 1:
        return
    peer = image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=peer_mode)
    image = noise(width, height)
    expected = (peer(image) * 255).round().int()
    got = Preprocess(size, resize)(image)
    assert got.dtype == torch.uint8 and got.shape == (3, size, size) and got.is_contiguous()
    assert (got.int() - expected).abs().max() <= 1


def test_a_long_thin_picture_needs_no_long_thin_memory():
    image = Image.new("RGB", (200_000, 1), RED)
    for resize in ("crop", "squash"):
        assert torch.equal(Preprocess(224, resize)(image)[:, 0, 0], torch.tensor([255, 0, 0]))
    padded = Preprocess(224, "pad")(image)
    assert padded[0].amax(1).nonzero().numel() == 1  # one red line on black


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (4, 4), 1), WHITE),
        (Image.new("L", (4, 4), 100), (100, 100, 100)),
        (Image.new("LA", (4, 4), (0, 0)), WHITE),
        (Image.new("LA", (4, 4), (100, 255)), (100, 100, 100)),
        (Image.new("RGB", (4, 4), RED), RED),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 128)), (255, 127, 127)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), RED),
        (Image.new("I;16", (4, 4), 65535), WHITE),
        (Image.new("I;16", (4, 4), 128 * 257), (128, 128, 128)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_every_mode_becomes_rgb(image, expected):
    assert to_rgb(image).mode == "RGB"
    pixels = Preprocess(2)(image)
    assert pixels.flatten(1).T.tolist() == [list(expected)] * 4
    assert torch.equal(Augment(2)(image, generator()), pixels)


@pytest.mark.parametrize("mode", ["P", "RGB", "L", "1"])
def test_a_transparent_colour_of_a_png_becomes_white(mode):
    image = Image.new(mode, (4, 4), 0)
    data = io.BytesIO()
    image.save(data, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    reread = Image.open(data)
    assert reread.mode == mode and "transparency" in reread.info
    assert to_rgb(reread).getpixel((1, 1)) == WHITE


def test_16_bit_grey_keeps_its_gradient():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    data = io.BytesIO()
    Image.fromarray(ramp).save(data, "PNG")
    got = np.asarray(to_rgb(Image.open(data)))[..., 0]
    assert got.flatten().tolist() == list(range(256))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_of_unknown_range_are_refused(mode):
    with pytest.raises(InputError, match=f"mode {mode}"):
        to_rgb(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_pil_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    noise(24, 16).save(data, "PNG", exif=exif)
    upright = to_rgb(Image.open(data))
    assert upright.size == ((16, 24) if orientation > 4 else (24, 16))
    assert np.array_equal(np.asarray(upright), np.asarray(ImageOps.exif_transpose(Image.open(data))))


def test_broken_exif_is_no_error():
    data = io.BytesIO()
    noise(16, 16).save(data, "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert to_rgb(Image.open(data)).size == (16, 16)


def test_augment_of_the_whole_picture_is_a_plain_resize():
    image = noise(150, 150).resize((90, 90), Image.Resampling.BICUBIC)
    got = Augment(64, scale=(1, 1), ratio=(1, 1))(image, generator())
    difference = (got.int() - Preprocess(64)(image).int()).abs()
    assert difference.float().mean() < 0.05 and difference.max() <= 4


def test_augment_without_resize_is_exactly_a_crop():
    image = noise(64, 64)
    assert torch.equal(Augment(64, scale=(1, 1), ratio=(1, 1))(image, generator()), Preprocess(64)(image))
    flipped = Augment(64, scale=(1, 1), ratio=(1, 1), flip=1.0)(image, generator())
    assert torch.equal(flipped, Preprocess(64)(ImageOps.mirror(image)))


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_crops_lie_inside(width, height, seed):
    left, top, w, h = Augment(8, scale=(0.05, 1)).crop(width, height, generator(seed))
    assert left >= 0 and top >= 0 and w >= 1 and h >= 1 and left + w <= width and top + h <= height


def test_crops_are_spread_over_scale_ratio_and_place():
    augment, draws = Augment(8, scale=(0.2, 0.5), ratio=(0.5, 2.0)), generator()
    left, top, w, h = torch.tensor([augment.crop(1000, 1000, draws) for _ in range(2000)]).double().T
    share, ratio = w * h / 1e6, (w / h).log2()
    assert 0.199 < share.min() < 0.21 and 0.49 < share.max() < 0.501
    assert abs(share.mean() - 0.35) < 0.01 and abs(ratio.mean()) < 0.05
    assert -1.01 < ratio.min() < -0.95 and 0.95 < ratio.max() < 1.01
    for start, size in ((left, w), (top, h)):  # uniform over the room that is left
        place = start / (1000 - size)
        assert abs(place.mean() - 0.5) < 0.03 and place.min() < 0.01 and place.max() > 0.99


def test_only_the_generator_decides():
    augment = Augment(32, scale=(0.3, 1), flip=0.5, color_jitter=0.4, grayscale=0.3)
    image = noise(48, 40)
    torch.manual_seed(0)
    first = [augment(image, draws) for draws in [generator(5)] for _ in range(4)]
    torch.manual_seed(1)
    again = [pickle.loads(pickle.dumps(augment))(image, draws) for draws in [generator(5)] for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[1])


def test_colour_options():
    image = noise(32, 32)
    plain = Augment(32, scale=(1, 1), ratio=(1, 1))(image, generator())
    grey = Augment(32, scale=(1, 1), ratio=(1, 1), grayscale=1.0)(image, generator())
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    jittered = Augment(32, scale=(1, 1), ratio=(1, 1), color_jitter=0.4)(image, generator())
    assert jittered.dtype == torch.uint8 and not torch.equal(jittered, plain)
    means = torch.stack([Augment(32, color_jitter=0.4)(image, generator(i)).float().mean() for i in range(100)])
    assert means.std() > 10  # brightness differs from draw to draw
    rate = np.mean([torch.equal(*Augment(32, grayscale=0.3)(image, generator(i))[:2]) for i in range(300)])
    assert 0.2 < rate < 0.4


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: Preprocess(0), "image_size"),
        (lambda: Preprocess(2.5), "image_size"),
        (lambda: Preprocess(8, "stretch"), "resize"),
        (lambda: Augment(8, scale=(0.5, 1.5)), "scale"),
        (lambda: Augment(8, scale=(0.9, 0.1)), "scale"),
        (lambda: Augment(8, ratio=(0, 1)), "ratio"),
        (lambda: Augment(8, flip=1.5), "flip"),
        (lambda: Augment(8, color_jitter=-1), "color_jitter"),
        (lambda: Augment(8, grayscale=2), "grayscale"),
    ],
)
def test_bad_options_name_themselves(build, word):
    with pytest.raises(InputError, match=word):
        build()
