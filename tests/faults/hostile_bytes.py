"""Hostile bytes in a sound shard: pictures, texts, JSON and arrays made to cost more than they are worth."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from mmpretrain.data.decode import DecodeError, Image, JsonCaption, JsonValue, Npy, TextCaption
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.shards import iter_shard
from mmpretrain.data.tokenizer import ClipTokenizer
from tests.faults.hostile import Case
from tests.faults.hostile_shards import PEERS, picture, write

SIDE = 5792  # its square is the most pixels that are decoded
ClipTokenizer()(["read the vocabulary once"])


def encoded(kind: str, size: tuple[int, int] = (64, 64), mode: str = "RGB", **options: Any) -> bytes:
    data = io.BytesIO()
    PILImage.new(mode, size).save(data, kind, **options)
    return data.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, 33 bytes that a decoder goes over 17 million pixels for, comes again."""
    data = encoded("JPEG", (4096, 4096), "L", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def segments(data: bytes, count: int) -> bytes:
    return data[:2] + b"\xff\xe5\x00\x02" * count + data[2:]


def gif(blocks: bytes, size: tuple[int, int] = (64, 64)) -> bytes:
    data = encoded("GIF", size, "P")
    start = 13 + (3 * 2 ** ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    return data[:start] + blocks + data[start:]


def turned() -> Any:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return exif


def animation() -> bytes:
    """The dearest picture within the limits: 27 bytes of memory a pixel."""
    more = [PILImage.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4))]
    return encoded("WEBP", (SIDE, SIDE), "RGBA", save_all=True, append_images=more, exif=turned())


PICTURES: dict[str, Callable[[], bytes]] = {
    "a PNG of 30,000 x 30,000 that is not there": lambda: png(30_000, 30_000),
    "a PNG of 9,000 x 9,000 zeros in 240 KB": lambda: encoded("PNG", (9000, 9000)),
    "a PNG of 2^31 x 1": lambda: png(2**31 - 1, 1),
    "a PNG of a million chunks": lambda: png(64, 64, chunk(b"abCd", b"") * 1_000_000),
    "a PNG of 100 MB of compressed text": lambda: png(
        64, 64, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000))) * 100
    ),
    "a PNG with a colour profile of 1 GiB": lambda: png(64, 64, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**28)))),
    "a JPEG of 20,000 scans": lambda: scans(20_000),
    "a JPEG of four million segments": lambda: segments(encoded("JPEG"), 4_000_000),
    "a JPEG of 16 MiB of filling": lambda: encoded("JPEG")[:2] + b"\xff" * 2**24 + encoded("JPEG")[2:],
    "a GIF of ten million blocks": lambda: gif(b"\x21\xfe" + b"\x01a" * 10_000_000 + b"\0"),
    "a GIF of five million extensions": lambda: gif(b"\x21\x01\0" * 5_000_000),
    "a GIF whose frame is larger than it says": lambda: (lambda d: d[:6] + b"\1\0\1\0" + d[10:])(
        encoded("GIF", (9000, 9000), "P")
    ),
    "a WebP of 16,000 x 16,000": lambda: encoded("WEBP", (16_000, 16_000), lossless=True),
    "a picture cut in half": lambda: encoded("JPEG", (512, 512), quality=95)[:2000],
    "a TIFF called .png": lambda: encoded("TIFF"),
    "an EPS called .png": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(marker) (w) file\nshowpage\n",
    "an SVG called .png": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
}
WITHIN: dict[str, Callable[[], bytes]] = {
    "a turned WebP animation of as many pixels as are allowed": animation,
    "a CMYK JPEG of as many pixels as are allowed": lambda: encoded(
        "JPEG", (SIDE, SIDE), "CMYK", progressive=True, subsampling=0
    ),
    "a PNG of 16-bit grey of as many pixels as are allowed": lambda: encoded("PNG", (SIDE, SIDE), "I;16"),
    "a PNG whose EXIF block points to itself": lambda: png(
        4, 4, chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\x87\x69\0\4\0\0\0\1\0\0\0\x08\0\0\0\x08"), pixels=bytes(13 * 4)
    ),
}
TEXTS: dict[str, Callable[[], bytes]] = {
    "10 MB of line breaks": lambda: b"\n" * 10_000_000 + b"x",
    "1 MB of HTML entities": lambda: b"&amp;" * 200_000,
    "a NUL character": lambda: b"a cat\0; touch marker",
    "bytes that are not UTF-8": lambda: b"a c\xe4t",
}
JSONS: dict[str, Callable[[], bytes]] = {
    "100,000 levels": lambda: b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "900 levels": lambda: b'{"caption": ' + b"[" * 900 + b"]" * 900 + b"}",
    "900 levels behind brackets in texts": lambda: (
        b'{"x": "' + b']\\"' * 2000 + b'", "caption": ' + b"[" * 900 + b"]" * 900 + b"}"
    ),
    "an open text of escapes": lambda: b'{"caption": "' + b'\\"' * 2_000_000,
    "64 MiB": lambda: b'{"caption": "' + b"a" * 2**26 + b'"}',
    "a number of 100,000 digits": lambda: b'{"caption": ' + b"9" * 100_000 + b"}",
    "NaN": lambda: b'{"caption": NaN}',
    "a number beyond all bounds": lambda: b'{"caption": 1e999}',
    "half a character": lambda: b'{"caption": "\\ud800"}',
    "a NUL character": lambda: b'{"caption": "a\\u0000b"}',
    "a caption of 1 MB": lambda: b'{"caption": "' + b"a " * 500_000 + b'"}',
}
ARRAYS: dict[str, Callable[[], bytes]] = {
    "a header of 10^12 numbers": lambda: array("(999999999999,)"),
    "a header of no and 10^30 numbers": lambda: array(f"(0, {10**30})"),
    "a header of 4,000 brackets": lambda: array("(" * 4000 + ")" * 4000),
    "a header that is a call": lambda: array("__import__('os').system('touch marker')"),
}


def array(shape: str) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + np.zeros(6).tobytes()


def decoded(fields: list[Any], folder: Path) -> str:
    """Read the shard, then the bytes through each field: all must refuse, or all read."""
    generator, tokenizer, causes, read = torch.Generator(), ClipTokenizer(), [], 0
    events: list[Any] = []
    for sample in iter_shard(folder / "x.tar", events):
        for field in fields:
            try:
                value = field(sample, generator)
            except DecodeError as error:
                assert len(str(error)) < 2000
                causes.append(error.cause)
            else:
                read += 1
                if isinstance(value, str):
                    tokenizer([value])
    assert not events and not (causes and read), (events, causes, read)
    return f"event: {', '.join(sorted(set(causes)))}" if causes else f"read: {read}"


def shard(make: Callable[[], bytes], extension: str, folder: Path) -> None:
    other = {"a.txt": b"a cat"} if extension != "txt" else {"a.png": picture()}
    write(folder / "x.tar", {**other, f"a.{extension}": make()})


def case(name: str, make: Callable[[], bytes], extension: str, fields: list[Any], harmless: bool = False) -> Case:
    return Case(name, partial(decoded, fields), PEERS, harmless, partial(shard, make, extension))


IMAGE = [Image(Preprocess(32), extensions=("png",))]
JSON = [JsonCaption(), JsonValue(key="caption")]
CASES = [
    *(case(f"picture: {name}", make, "png", IMAGE) for name, make in PICTURES.items()),
    *(case(f"picture: {name}", make, "png", IMAGE, harmless=True) for name, make in WITHIN.items()),
    *(case(f"text: {name}", make, "txt", [TextCaption()]) for name, make in TEXTS.items()),
    *(case(f"JSON: {name}", make, "json", JSON) for name, make in JSONS.items()),
    *(case(f"array: {name}", make, "npy", [Npy()]) for name, make in ARRAYS.items()),
]
