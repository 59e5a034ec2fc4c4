"""The fast decoder gives PIL's pixels, PIL's refusals, and nothing else."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image as PILImage

from mmpretrain.data import jpeg
from mmpretrain.data.decode import DecodeError, Image
from mmpretrain.data.pixels import Picture, to_rgb
from mmpretrain.data.preprocess import Augment, Preprocess
from mmpretrain.data.resize import resized, shrunk
from mmpretrain.errors import InputError
from tests.data.photos import encode, photo

SUBSAMPLINGS = ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_pil(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(to_rgb(PILImage.open(io.BytesIO(data))))).permute(2, 0, 1)


def by_us(data: bytes, scaled: bool = False, shrink: float = 1.0) -> torch.Tensor:
    return Picture(PILImage.open(io.BytesIO(data)), data, scaled).pixels(shrink)


class Whole:
    """A transform that returns the picture as it is, decoded by us."""

    def from_picture(self, picture: Picture, generator: torch.Generator) -> torch.Tensor:
        return picture.pixels().contiguous()


def whole_by_pil(image: PILImage.Image, generator: torch.Generator) -> torch.Tensor:
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).contiguous()


def outcome(field: Image, data: bytes) -> torch.Tensor | None:
    try:
        return field({"jpg": data}, generator())
    except DecodeError:
        return None


def same_outcome(data: bytes) -> bool:
    ours, pil = outcome(Image(Whole()), data), outcome(Image(whole_by_pil), data)
    return ours is pil if ours is None or pil is None else torch.equal(ours, pil)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (8, 8), (9, 31), (33, 17), (150, 101), (256, 192)])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_kind_of_jpeg_has_pils_pixels(size, progressive):
    image = photo(*size)
    files = [encode(image, quality=q, progressive=progressive) for q in (10, 90)]
    files += [encode(image, subsampling=s, quality=85, progressive=progressive) for s in ("4:4:4", "4:2:2", "4:2:0")]
    files += [encode(image, restart_marker_blocks=3, progressive=progressive)]
    files += [encode(image, restart_marker_rows=1, progressive=progressive)]
    files += [
        encode(image, keep_rgb=True, progressive=progressive),
        encode(image.convert("L"), progressive=progressive),
    ]
    pixels = np.ascontiguousarray(np.asarray(image))
    files += [simplejpeg.encode_jpeg(pixels, 85, colorsubsampling=name.replace(":", "")) for name in SUBSAMPLINGS]
    for data in files:
        assert jpeg.decode(data, *size) is not None  # it is the fast decoder that is compared
        assert torch.equal(by_us(data), by_pil(data))


def test_cmyk_is_left_to_pil():
    data = encode(photo(40, 30).convert("CMYK"), quality=90)
    assert torch.equal(by_us(data), by_pil(data)) and same_outcome(data)
    transformed = bytearray(data)
    transformed[data.index(b"Adobe") + 11] = 2  # says YCCK: other colours, which PIL reads as well
    assert same_outcome(bytes(transformed))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    data = encode(photo(48, 31), exif=exif)
    assert torch.equal(by_us(data), by_pil(data))
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    other = encode(photo(48, 31), xmp=xmp)
    assert torch.equal(by_us(other), by_pil(other))
    if orientation > 4:
        assert by_us(data).shape == by_us(other).shape == (3, 48, 31)


def test_files_of_several_pictures_and_trailing_bytes():
    data = encode(photo(32, 24), "MPO", save_all=True, append_images=[photo(32, 24, 1)])
    assert same_outcome(data) and torch.equal(by_us(data), by_pil(data))
    plain = encode(photo(32, 24))
    for file in (plain + b"trailing", plain + plain, plain + bytes(100)):
        assert same_outcome(file) and outcome(Image(Whole()), file) is not None


@pytest.mark.parametrize("progressive", [False, True])
def test_cut_off_anywhere(progressive):
    data = encode(photo(64, 48), quality=60, progressive=progressive)
    refused = 0
    for length in [*range(0, len(data), 23), *range(len(data) - 12, len(data))]:
        assert same_outcome(data[:length]), length
        refused += outcome(Image(Whole()), data[:length]) is None
    assert refused > len(data) // 30


@pytest.mark.filterwarnings("default")  # PIL warns of what it repairs
@settings(max_examples=250, deadline=None)
@given(st.sampled_from([0, 1, 2, 3]), st.data())
def test_damage_has_pils_outcome(kind, data):
    options = [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"subsampling": "4:4:4"}]
    damaged = bytearray(encode(photo(40, 24, kind % 2), quality=70, **options[kind]))
    header = damaged.index(b"\xff\xda")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, len(damaged) - 1), st.integers(0, header)))
        damaged[place] = data.draw(st.integers(0, 255))
    image = Image(Whole(), max_pixels=10**6), Image(whole_by_pil, max_pixels=10**6)
    ours, pil = (outcome(field, bytes(damaged)) for field in image)
    assert (ours is None) == (pil is None)
    assert ours is None or pil is None or torch.equal(ours, pil)


def test_twelve_bits_are_refused_as_by_pil():
    data = bytearray(encode(photo(16, 16)))
    data[data.index(b"\xff\xc0") + 4] = 12
    assert outcome(Image(Whole()), bytes(data)) is None and outcome(Image(whole_by_pil), bytes(data)) is None


def test_scans_are_counted_where_decoders_go_over_them():
    image = photo(64, 48)
    assert jpeg.scans(encode(image)) == jpeg.scans(encode(image.convert("L"))) == 1
    assert jpeg.scans(encode(image, progressive=True)) > 5
    assert jpeg.scans(encode(image, "JPEG", restart_marker_blocks=1)) == 1
    plain = encode(image)
    assert jpeg.scans(plain[:2] + b"\xff\xff\xff" + plain[2:]) == 1  # filling
    repeated = plain[:-2] + plain[plain.index(b"\xff\xda") : -2] * 2000 + plain[-2:]
    assert same_outcome(repeated)  # decoders stop at a second scan of all components
    frame = plain.index(b"\xff\xc0")
    for other in (
        plain[: frame - 1],
        plain[:frame] + plain[frame : frame + 19] + plain[frame:],
        plain[:20],
        b"\xff\xd8",
    ):
        assert jpeg.scans(other) == other.count(b"\xff\xda")


SIZES = [(341, 256), (256, 341), (384, 512), (683, 512), (1024, 768), (1300, 1000)]


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    difference = (ours.int() - theirs.int()).abs()
    return difference.max() <= 2 and (difference == 0).double().mean() >= 0.99


def peer(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * 255).round().int()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pixels_are_those_of_open_clip_on_the_same_crop(size, kind):
    if kind != "JPEG" and max(size) > 700:
        return  # the same resize, and these two encode slowly
    augment, transform = Augment(224, scale=(0.5, 1.0)), image_transform(224, True, mean=(0, 0, 0), std=(1, 1, 1))
    for number in (0, 1):
        data = encode(photo(*size, number), kind, quality=90)
        left, top, width, height = augment.crop(*size, generator(number))
        transform.transforms[0].get_params = lambda *_, box=(top, left, height, width): box
        theirs = peer(transform(PILImage.open(io.BytesIO(data))))
        assert near(Image(augment)({"jpg": data}, generator(number)), theirs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_fast_evaluation_is_near_and_exact_evaluation_is_pils(size, resize):
    mode = {"crop": "shortest", "squash": "squash", "pad": "longest"}[resize]
    transform = image_transform(224, False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode)
    data = encode(photo(*size), quality=90)
    theirs = peer(transform(PILImage.open(io.BytesIO(data))))
    assert torch.equal(Image(Preprocess(224, resize))({"jpg": data}, generator()).int(), theirs)
    assert near(Image(Preprocess(224, resize, exact=False))({"jpg": data}, generator()), theirs)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(100, 700)] * 2), st.tuples(*[st.integers(60, 260)] * 2), st.integers(0, 1))
def test_any_resize_is_near_pils(size, target, number):
    image = photo(*size, number)
    theirs = torch.from_numpy(np.array(image.resize(target, PILImage.Resampling.BICUBIC))).permute(2, 0, 1)
    ours = resized(torch.from_numpy(np.array(image)).permute(2, 0, 1), target[1], target[0])
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 2 and (difference == 0).double().mean() >= 0.985


def test_fast_evaluation_of_a_long_thin_picture():
    image = PILImage.new("RGB", (200_000, 1), (255, 0, 0))
    for resize in ("crop", "squash", "pad"):
        exact, fast = (Preprocess(64, resize, exact=exact)(image) for exact in (True, False))
        assert torch.equal(exact, fast)


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 700), st.integers(20, 700), st.integers(16, 64), st.integers(0, 2**20))
def test_scaled_decoding_keeps_the_crop_and_enough_pixels(width, height, size, seed):
    data = encode(photo(width, height), quality=90)
    augment = Augment(size, scale=(0.3, 1.0))
    short = min(augment.crop(width, height, generator(seed))[2:])
    pixels = by_us(data, True, short / size)
    divisor = next((divisor for divisor in (8, 4, 2) if divisor * size <= short), 1)
    assert pixels.shape == (3, -(-height // divisor), -(-width // divisor))
    exact, scaled = (Image(augment, decode=mode)({"jpg": data}, generator(seed)) for mode in ("exact", "scaled"))
    if divisor == 1:
        assert torch.equal(exact, scaled)
    else:  # the same crop to half a decoded pixel on each side, so nearly the same picture
        assert exact.shape == scaled.shape and (exact.float() - scaled.float()).abs().mean() < 20


@given(st.integers(1, 4000), st.integers(1, 3000), st.integers(1, 300), st.integers(0, 2**20))
@settings(max_examples=200, deadline=None)
def test_a_crop_of_scaled_pixels_lies_inside_and_is_never_enlarged(side, length, size, seed):
    length = min(length, side)
    start = seed % (side - length + 1)
    divisor = next((divisor for divisor in (8, 4, 2) if divisor * size <= length), 1)
    decoded = -(-side // divisor)
    new_start, new_length = shrunk(start, length, decoded, side)
    assert new_start >= 0 and new_start + new_length <= decoded and new_length >= min(size, length)
    assert abs(new_start - start / divisor) <= 2 and abs(new_length - length / divisor) <= 1.5


@pytest.mark.parametrize("size", [(683, 512), (1365, 1024), (512, 683)])
def test_scaled_pixels_are_near_on_photographs(size):
    data = encode(photo(*size), quality=90)
    exact, scaled = (Image(Augment(224), decode=mode)({"jpg": data}, generator(3)) for mode in ("exact", "scaled"))
    assert not torch.equal(exact, scaled)
    assert (exact.float() - scaled.float()).abs().mean() < 8
    turned = PILImage.Exif()
    turned[0x0112] = 6
    data = encode(photo(*size), quality=90, exif=turned)
    exact, scaled = (Image(Augment(224), decode=mode)({"jpg": data}, generator(3)) for mode in ("exact", "scaled"))
    assert (exact.float() - scaled.float()).abs().mean() < 8


def test_scaled_leaves_exact_evaluation_and_other_formats_alone():
    for kind, transform in (("JPEG", Preprocess(64)), ("PNG", Augment(64)), ("WEBP", Augment(64))):
        data = encode(photo(600, 400), kind)
        exact, scaled = (Image(transform, decode=mode)({"jpg": data}, generator(3)) for mode in ("exact", "scaled"))
        assert torch.equal(exact, scaled)
    with pytest.raises(InputError, match=r"decode='half'.*exact, scaled"):
        Image(Augment(8), decode="half")


def test_a_transform_of_ones_own_takes_a_pil_image():
    seen: list[PILImage.Image] = []

    def own(image: PILImage.Image, generator: torch.Generator) -> torch.Tensor:
        seen.append(image)
        return Augment(16)(image, generator)

    data = encode(photo(64, 48).convert("L"))
    assert torch.equal(Image(own)({"jpg": data}, generator(1)), Image(Augment(16))({"jpg": data}, generator(1)))
    assert seen[0].mode == "L" and seen[0].size == (64, 48)


def test_no_warning_of_unwritable_memory():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("JPEG", "PNG"):
            assert by_us(encode(photo(20, 20), kind)).add_(1).shape == (3, 20, 20)
