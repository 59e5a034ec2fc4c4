from __future__ import annotations

import io
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from mmpretrain.data.decode import (
    MAX_CAPTION,
    DecodeError,
    Image,
    JsonCaption,
    JsonValue,
    MissingField,
    Npy,
    TextCaption,
)
from mmpretrain.data.events import CAUSES
from mmpretrain.data.pictures import parts_of
from mmpretrain.data.preprocess import Augment, Preprocess
from mmpretrain.errors import InputError

RED = (254, 0, 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encode(image: PILImage.Image, file_format: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return data.getvalue()


def picture(file_format: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    return encode(PILImage.new("RGB", size, RED), file_format)


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def sample(**fields: bytes) -> dict[str, bytes | str]:
    return {"__key__": "cats/007", **fields}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_default_formats_are_read_whatever_the_extension_says(file_format):
    for extension in ("jpg", "png"):
        pixels = Image(Preprocess(8))(sample(**{extension: picture(file_format)}), generator())
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 8, 8)
        assert (pixels.int() - torch.tensor(RED).view(3, 1, 1)).abs().max() <= 3


def test_the_generator_reaches_the_transform():
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    field, one = Image(Augment(16, scale=(0.2, 1))), sample(png=encode(noise, "PNG"))
    assert torch.equal(field(one, generator(1)), pickle.loads(pickle.dumps(field))(one, generator(1)))
    assert not torch.equal(field(one, generator(1)), field(one, generator(2)))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(file_format):
    frames = [PILImage.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    extra = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **extra)
    assert PILImage.open(io.BytesIO(data)).n_frames == 2
    pixels = Image(Preprocess(4))(sample(webp=data), generator())
    assert pixels[:, 0, 0].tolist() == list(RED)


@pytest.mark.parametrize("file_format", ["BMP", "TIFF", "PPM", "ICO", "PDF"])
def test_other_formats_are_refused_even_under_a_known_extension(file_format):
    with pytest.raises(DecodeError, match="'cats/007', field jpg: not a picture"):
        Image(Preprocess(8))(sample(jpg=picture(file_format)), generator())


def test_pixels_are_counted_before_decoding():
    field = Image(Preprocess(8), max_pixels=320)
    assert field(sample(png=picture()), generator()).shape == (3, 8, 8)
    with pytest.raises(DecodeError, match=r"cats/007.*21 x 16 = 336 pixels.*320.*max_pixels"):
        field(sample(png=png_header(21, 16)), generator())  # decoding it would be another error
    with pytest.raises(DecodeError, match=r"cats/007.*not a picture"):
        field(sample(png=png_header(20, 16)), generator())
    for side in (10_000, 30_000):  # above PIL's own warning and error
        with pytest.raises(DecodeError, match="cats/007"):
            Image(Preprocess(8))(sample(png=png_header(side, side)), generator())


def test_bytes_are_counted_before_opening():
    with pytest.raises(DecodeError, match=r"cats/007.*limit of 10;.*max_bytes"):
        Image(Preprocess(8), max_bytes=10)(sample(png=picture()), generator())


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_pictures_name_their_sample(file_format):
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = encode(noise, file_format)
    for length in (0, 1, 20, len(data) // 2):
        with pytest.raises(DecodeError, match="cats/007"):
            Image(Preprocess(8))(sample(jpg=data[:length]), generator())


@pytest.mark.filterwarnings("default")  # PIL warns of what it repairs
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]), st.data())
def test_damaged_bytes_give_pixels_or_a_decode_error(file_format, data):
    damaged = bytearray(picture(file_format))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = Image(Preprocess(8), max_pixels=10**6)(sample(jpg=bytes(damaged)), generator())
    except DecodeError as error:
        assert "cats/007" in str(error)
    else:
        assert pixels.shape == (3, 8, 8)


def test_the_first_extension_present_is_read():
    both = sample(png=picture(size=(4, 4)), jpg=picture(size=(8, 8)))
    assert Image(Preprocess(8)).open(both).size == (8, 8)
    assert Image(Preprocess(8), extensions=("png", "jpg")).open(both).size == (4, 4)
    assert Image(Preprocess(8), extensions="left.png").open({"left.png": picture()}).size == (20, 16)


@pytest.mark.parametrize(
    ("field", "option"),
    [
        (Image(Preprocess(8)), "extensions"),
        (TextCaption(), "extension"),
        (JsonCaption(), "extension"),
        (JsonValue(), "extension"),
        (Npy(), "extension"),
    ],
)
def test_a_missing_field_says_what_is_there_and_what_to_change(field, option):
    with pytest.raises(InputError, match=rf"'cats/007' has no field .*, only cls, mp3; set {option} "):
        field(sample(mp3=b"", cls=b"3"), generator())
    with pytest.raises(InputError, match=r"a sample has no field .*, only nothing"):
        field({}, generator())


def test_text_captions():
    field = TextCaption()
    assert field(sample(txt="\ufeffein Käse\n".encode()), generator()) == "ein Käse"
    assert field.captions(sample(txt=b"a\nb")) == ["a\nb"]
    assert field.captions(sample(txt=b"")) == [""]
    with pytest.raises(DecodeError, match=r"cats/007.*field txt: not UTF-8"):
        field(sample(txt=b"K\xe4se"), generator())


META = {
    "caption": "a cat",
    "several": ["a cat", "one cat", "cat"],
    "names": {"en": "cat", "de": "Katze", "fr": "chat"},
    "deep": {"er": {"text": "found"}},
    "label": 7, "yes": True, "share": 0.5, "box": [1, 2.5], "ids": [3, 4], "tags": ["x", "y"], "none": None,
    "empty": [],
    "mixed": [1, "x"], "huge": 10**30,
}  # fmt: skip
JSON = sample(json=json.dumps(META).encode())


@pytest.mark.parametrize(
    ("field", "captions"),
    [
        (JsonCaption(), ["a cat"]),
        (JsonCaption(key="several"), ["a cat", "one cat", "cat"]),
        (JsonCaption(key="names"), ["cat", "Katze", "chat"]),
        (JsonCaption(key="names", choose=["de", "xx", "en"]), ["Katze", "cat"]),
        (JsonCaption(key="names.fr"), ["chat"]),
        (JsonCaption(key="deep.er.text"), ["found"]),
    ],
)
def test_json_captions(field, captions):
    assert field.captions(JSON) == captions
    drawn = [field(JSON, draws) for draws in [generator()] for _ in range(300)]
    assert set(drawn) == set(captions)
    assert all(drawn.count(caption) > 240 / len(captions) for caption in captions)  # evenly
    assert drawn == [field(JSON, draws) for draws in [generator()] for _ in range(300)]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (JsonCaption(key="title"), r"cats/007.*no 'title' on the path 'title'.*caption, several"),
        (JsonCaption(key="names.es"), r"no 'es' on the path 'names.es', found keys en, de, fr"),
        (JsonCaption(key="caption.x"), r"no 'x' on the path 'caption.x', found str"),
        (JsonCaption(key="names", choose=["es"]), r"cats/007.*holds keys en, de, fr.*with one of es"),
        (JsonCaption(key="empty"), r"holds \[\]"),
        (JsonCaption(key="none"), r"holds None"),
        (JsonCaption(key="label"), r"holds 7"),
        (JsonCaption(key="mixed"), r"holds \[1, 'x'\]"),
        (JsonCaption(key="deep"), r"holds keys er"),
        (JsonValue(key="none"), r"cats/007.*holds None.*set key"),
        (JsonValue(key="mixed"), r"holds \[1, 'x'\]"),
        (JsonValue(key="names"), r"holds \{"),
    ],
)
def test_wrong_json_paths_say_what_is_there(field, message):
    with pytest.raises(InputError, match=message):
        field(JSON, generator())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"caption": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_names_its_sample(data):
    for field in (JsonCaption(), JsonValue(key="caption")):
        with pytest.raises(DecodeError, match=r"cats/007.*field json: not"):
            field(sample(json=data), generator())


def test_json_values():
    def value(key):
        return JsonValue(key=key)(JSON, generator())

    assert value("label") == 7 and type(value("label")) is int and type(value("yes")) is int
    assert value("caption") == "a cat" and value("tags") == ["x", "y"] and value("huge") == 10**30
    assert torch.equal(value("share"), torch.tensor(0.5)) and torch.equal(value("box"), torch.tensor([1, 2.5]))
    assert value("ids").dtype == torch.int64


def npy(array: np.ndarray, **options) -> bytes:
    data = io.BytesIO()
    np.save(data, array, **options)
    return data.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">i8", "u1", "?", "<u2"])
def test_npy_arrays(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for stored in (array, np.asfortranarray(array), array[:0], array[0, 0, 0]):
        tensor = Npy()(sample(npy=npy(stored)), generator())
        assert tensor.shape == stored.shape and np.array_equal(tensor.numpy(), stored)
        assert tensor.numpy().dtype == array.dtype.newbyteorder("=")
        assert not tensor.zero_().any()  # writable


def test_npy_refuses_objects_lies_and_damage():
    good = npy(np.arange(6.0))
    liar = good.replace(b"'shape': (6,), }" + b" " * 12, b"'shape': (999999999999,), }  ")
    assert liar != good
    poisoned = npy(np.array([print], dtype=object), allow_pickle=True)
    for data in (
        poisoned,
        liar,
        good[:-1],
        good[:40],
        b"",
        b"PK\x03\x04",
        pickle.dumps(1),
        npy(np.array(["a"])),
    ):
        with pytest.raises(DecodeError, match=r"cats/007.*npy"):
            Npy()(sample(npy=data), generator())
    for data in (liar, good[:-1], good + b"x"):  # found out from the header, before memory is taken
        with pytest.raises(DecodeError, match="its header announces"):
            Npy()(sample(npy=data), generator())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_npy_headers_give_an_array_or_a_decode_error(data):
    damaged = bytearray(npy(np.arange(6, dtype=np.int16).reshape(2, 3)))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert Npy()(sample(npy=bytes(damaged)), generator()).numel() <= 12
    except DecodeError as error:
        assert "cats/007" in str(error)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: Image(Preprocess(8), max_pixels=0), "max_pixels"),
        (lambda: Image(Preprocess(8), max_pixels=10**9), "max_pixels"),
        (lambda: Image(Preprocess(8), max_bytes=0), "max_bytes"),
        (lambda: Image(Preprocess(8), extensions=()), "extensions"),
        (lambda: Image(Preprocess(8), extensions=(".jpg",)), "leading dot"),
        (lambda: TextCaption(".txt"), "leading dot"),
        (lambda: JsonCaption(choose=[]), "choose"),
        (lambda: JsonCaption(choose="en"), "choose"),
    ],
)
def test_bad_options_name_themselves(build, word):
    with pytest.raises(InputError, match=word):
        build()


@pytest.mark.parametrize(
    ("field", "data", "cause", "message"),
    [
        (TextCaption(), b"a\0b", "undecodable", "NUL"),
        (TextCaption(), b"a" * (MAX_CAPTION + 1), "refused", "over the limit of 65536"),
        (JsonCaption("txt"), b'{"caption": "\\ud800"}', "undecodable", "not Unicode"),
        (JsonCaption("txt"), b'{"caption": "\\u0000"}', "undecodable", "NUL"),
        (JsonCaption("txt"), b'{"caption": ["a", "%s"]}' % (b"a" * 2**17), "refused", "caption of 131072 bytes"),
        (JsonCaption("txt", max_bytes=9), b'{"caption": ""}', "refused", "15 bytes .* max_bytes"),
        (JsonCaption("txt", max_depth=3), b'{"caption": [[["a"]]]}', "refused", "at most 3 levels"),
        (JsonValue("txt"), b'{"label": NaN}', "undecodable", "NaN is no JSON number"),
        (JsonValue("txt"), b'{"label": -Infinity}', "undecodable", "-Infinity"),
        (JsonValue("txt"), b'{"label": [1e999]}', "undecodable", "holds"),
        (JsonValue("txt"), b"{}", "missing", "no 'label'"),
        (Npy("npy"), b"", "missing", "no field npy"),
        (Image(Preprocess(8), "txt"), b"", "undecodable", "not a picture"),
        (Image(Preprocess(8), "txt", max_bytes=9), b"0123456789", "refused", "max_bytes"),
        (Image(Preprocess(8), "txt"), png_header(10_000, 5_000), "refused", "max_pixels"),
    ],
)
def test_errors_have_the_cause_of_their_event_and_cross_processes(field, data, cause, message):
    with pytest.raises(DecodeError, match=f"cats/007.*{message}") as caught:
        field(sample(txt=data), generator())
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert error.cause == cause in CAUSES and str(error) == str(caught.value)
        assert error.field == ("npy" if isinstance(field, Npy) else "txt")
        assert isinstance(error, MissingField) == (cause == "missing")


def test_json_of_the_greatest_depth_is_read_and_brackets_in_texts_are_none():
    deep = b'{"label": ' + b"[" * 63 + b"1" + b"]" * 63 + b', "x": "%s\\""}' % (b"[{" * 100)
    assert JsonValue()(sample(json=deep), generator()).shape == (1,) * 63
    with pytest.raises(DecodeError, match="at most 62 levels"):
        JsonValue(max_depth=62)(sample(json=deep), generator())


def test_a_picture_that_the_transform_does_not_take_is_one_samples_fault():
    with pytest.raises(DecodeError, match=r"cats/007.*mode F"):
        Image(Preprocess(8), formats=("TIFF",))(sample(png=encode(PILImage.new("F", (4, 4)), "TIFF")), generator())


def test_files_of_far_more_parts_than_pictures_have_are_refused():
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))
    for file_format, options in (("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("WEBP", {})):
        assert parts_of(encode(noise, file_format, **options)) < 30
    jpeg = picture("JPEG")
    for many in (b"\xff\xe5\x00\x02" * 70_000, b"\xff" * 70_000):
        with pytest.raises(DecodeError, match="over 65536 parts"):
            Image(Preprocess(8))(sample(jpg=jpeg[:2] + many + jpeg[2:]), generator())
    few = jpeg[:2] + b"\xff\xe5\x00\x02" * 1000 + jpeg[2:]
    assert Image(Preprocess(8))(sample(jpg=few), generator()).shape == (3, 8, 8)


def test_a_jpeg_is_not_scanned_again_and_again():
    jpeg = encode(PILImage.new("L", (1024, 1024)), "JPEG", progressive=True)
    bomb = jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * 5000 + jpeg[-2:]
    assert len(bomb) < 2**18
    assert Image(Preprocess(8))(sample(jpg=jpeg), generator()).shape == (3, 8, 8)
    with pytest.raises(DecodeError, match=r"1048576 pixels in 50\d\d JPEG scans") as caught:
        Image(Preprocess(8))(sample(jpg=bomb), generator())
    assert caught.value.cause == "refused"
