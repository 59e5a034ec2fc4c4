"""One tar header (POSIX.1 pax and GNU tar): read, checked, and found again where bytes are damaged."""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

BLOCK = 512
_MAGIC = b"ustar"
_MAGIC_AT = 257
_KINDS = b"\x0001234567gxABCDEFGHIJKLMNOPQRSTUVWXYZ"  # capitals are for vendors; anything else is no header
_MISSES = 1 << 16  # places off the 512-byte grid that one search looks at: bounds the work that hostile bytes make
_RECORD = re.compile(rb"\d+ (?:path|size|linkpath|GNU\.[\w.]+)=")


class Buffer(Protocol):
    """What is searched: bytes or a memory map."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes: ...
    def find(self, sub: bytes, start: int, end: int, /) -> int:
        """Return where `sub` lies between start and end, or -1."""


class Header(NamedTuple):
    """A header whose checksum is right; `size` is -1 where the field holds no number of bytes."""

    kind: bytes
    size: int
    name: str


def parse(block: bytes) -> Header | None:
    """Read a block of 512 bytes as a header; None if it is none, or damaged."""
    if len(block) < BLOCK or block[156] not in _KINDS or (stored := number(block[148:156])) is None:
        return None
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    if stored != unsigned:
        high = sum(1 for byte in block[:148] + block[156:] if byte > 127)
        if stored != unsigned - 256 * high:  # some old writers summed signed bytes
            return None
    size = number(block[124:136])
    return Header(block[156:157], -1 if size is None else size, name_of(block))


def find_header(data: Buffer, start: int, has_magic: bool) -> int | None:
    """Return where the first sound header at or behind `start` begins; None if there is none.

    Headers that carry the ustar magic are found at any byte; those of old archives (`has_magic` false) at
    multiples of 512.
    """
    end, misses, found = len(data), 0, None
    at = data.find(_MAGIC, start + _MAGIC_AT, end)
    while at != -1:
        if parse(data[at - _MAGIC_AT : at - _MAGIC_AT + BLOCK]) is not None:
            found = at - _MAGIC_AT
            break
        misses += 1
        behind = at + 1 if misses < _MISSES else on_grid(at + 1 - _MAGIC_AT, 0) + _MAGIC_AT
        at = data.find(_MAGIC, behind, end)
    if not has_magic:
        for position in range(on_grid(start, 0), end if found is None else found, BLOCK):
            if parse(data[position : position + BLOCK]) is not None:
                return position
    return found


def swallowed_header(data: Buffer, start: int, size: int) -> int | None:
    """Return where the bytes of one member hold a header, which tells that its size is wrong; None if nowhere.

    Only the places where a following header could lie count. Bytes that begin with a header are a tar
    themselves, which is fine.
    """
    at = data.find(_MAGIC, start + _MAGIC_AT, start + size)
    while at != -1:
        position = at - _MAGIC_AT
        if (position - start) % BLOCK == 0 and parse(data[position : position + BLOCK]) is not None:
            return None if parse(data[start : start + BLOCK]) is not None else position
        at = data.find(_MAGIC, on_grid(position + 1, start) + _MAGIC_AT, start + size)
    return None


def hides_name(data: Buffer, start: int, end: int) -> bool:
    """Tell whether the damaged bytes start:end may hold the name of the member whose header is at `end`."""
    block = data[start : start + BLOCK]
    long = b"@LongLink" in block[:100] or b"PaxHeader" in block[:100]
    # One of the three signs may be what was damaged.
    if (block[156:157] in (b"L", b"K", b"x", b"X")) + long + (block[257:262] == _MAGIC) > 1:
        return True
    follower = data[end : end + 100]
    for position in range(max(end - 8 * BLOCK, start), end, BLOCK) if (end - start) % BLOCK == 0 else ():
        line = data[position : position + 100]
        # A name that fills its field is the beginning of a longer one, which lies in a block before.
        if _RECORD.match(line) or (line == follower and b"\0" not in follower):
            return True
    return False


def guess_name(block: bytes) -> str | None:
    """Return the name that a damaged header still shows; None if that is no readable text."""
    name = name_of(block)
    return name if len(block) == BLOCK and name.isprintable() and name else None


def number(raw: bytes) -> int | None:
    """Read a number field: octal digits, or base 256 where the highest bit of the first byte is set (GNU).

    None for a negative number and for what is none.
    """
    if raw[0] & 0x80:
        value = int.from_bytes(raw, "big") & ((1 << (8 * len(raw) - 1)) - 1)
        return value if raw[0] == 0x80 else None  # 0xff begins a negative number
    digits = raw.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def name_of(block: bytes) -> str:
    """Return the name in a header, with its ustar prefix."""
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0]
    if prefix and block[257:263] == b"ustar\0":  # GNU's own format keeps times there
        name = prefix + b"/" + name
    return text_of(name)


def text_of(raw: bytes) -> str:
    """Decode a name: UTF-8, other bytes kept as surrogate escapes."""
    return raw.decode("utf-8", "surrogateescape")


def pax_records(payload: bytes) -> dict[str, str]:
    """Read the `LENGTH KEYWORD=VALUE newline` records of a pax header; raises `ValueError` if they are none."""
    values: dict[str, str] = {}
    begin = 0
    payload = payload.rstrip(b"\0")
    while begin < len(payload):
        length, space, _ = payload[begin : begin + 20].partition(b" ")
        end = begin + int(length) if length.isdigit() and space else 0
        keyword, equals, value = payload[begin + len(length) + 1 : max(end - 1, 0)].partition(b"=")
        whole = equals and end <= len(payload) and payload[end - 1 : end] == b"\n"
        if not whole or (keyword == b"path" and b"\0" in value):
            raise ValueError("damaged pax header")
        values[text_of(keyword)] = text_of(value)
        begin = end
    return values


def on_grid(position: int, origin: int) -> int:
    """Round up to a whole number of blocks behind `origin`."""
    return origin - (origin - position) // BLOCK * BLOCK
