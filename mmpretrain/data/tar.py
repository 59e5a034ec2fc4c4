"""A checked walk over the headers of a tar file: which regular files it holds, and where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from mmpretrain.errors import InputError

BLOCK = 512
_MAX_NAME = 1 << 20  # bytes of one long name or pax header; a damaged size must not be believed
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Buffer(Protocol):
    """What the walk reads: bytes or a memory map."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes: ...


class Member(NamedTuple):
    """One regular file of a tar: its name, where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


class DamageError(InputError):
    """A shard that is no sound tar file: the message names the shard and the offset in bytes."""

    def __init__(self, shard: str, offset: int, problem: str) -> None:
        super().__init__(f"{shard} at byte {offset}: {problem}")
        self.shard = shard
        self.offset = offset
        self.problem = problem

    def __reduce__(self) -> tuple[type[DamageError], tuple[str, int, str]]:
        return type(self), (self.shard, self.offset, self.problem)  # so that it crosses process borders whole


def walk(data: Buffer, shard: str) -> Iterator[Member]:
    """Yield the regular files of a tar (v7, ustar, GNU and pax formats); `shard` names it in errors.

    Directories, links and devices are skipped. Raises `DamageError` for a wrong checksum, a size that leaves
    the file, a missing end mark, bytes behind the end mark, and for compressed or sparse archives.
    """
    for magic, name in _COMPRESSED.items():
        if data[: len(magic)] == magic:
            raise DamageError(shard, 0, f"this is {name} data; decompress it first, shards are read in place")
    position = 0
    shared: dict[str, str] = {}  # pax values for all following members
    local: dict[str, str] = {}  # pax values and GNU long name for the next member
    while True:
        header = data[position : position + BLOCK]
        if len(header) == BLOCK and not any(header):
            return _check_end(data, position, shard)
        kind, size = _check_header(header, position, shard)
        start = position + BLOCK
        if kind in b"LxXg":
            _check_size(data, position, size, shard)
            payload = _payload(data[start : start + min(size, _MAX_NAME + 1)], position, shard)
            if kind == b"L":
                local["path"] = text_of(payload.split(b"\0", 1)[0])
            else:
                (shared if kind == b"g" else local).update(_pax(payload, position, shard))
        else:
            values = {**shared, **local}
            local = {}
            if kind == b"S" or any(name.startswith("GNU.sparse.") for name in values):
                raise DamageError(shard, position, "sparse member; write the shard without tar's --sparse")
            if "size" in values:
                size = _decimal(values["size"], position, shard)
            name = values.get("path") or _name(header)
            if kind in b"123456" or (kind == b"\0" and name.endswith("/")):
                size = 0  # links, devices, directories and pipes have no bytes, whatever their header says
            _check_size(data, position, size, shard)
            if kind in b"07" or (kind == b"\0" and not name.endswith("/")):
                yield Member(name, start, size)
        position = start + -(-size // BLOCK) * BLOCK


def text_of(raw: bytes) -> str:
    """Decode a name: UTF-8, other bytes kept as surrogate escapes."""
    return raw.decode("utf-8", "surrogateescape")


def _check_header(header: bytes, position: int, shard: str) -> tuple[bytes, int]:
    """Return type and size of a header whose length and checksum are right."""
    if not header:
        raise DamageError(shard, position, "no end mark, so the file is not complete; copy or write it again")
    if len(header) < BLOCK:
        raise DamageError(shard, position, "the file ends inside a header; copy or write it again")
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    if (stored := _octal(header[148:156])) != unsigned:
        high = sum(1 for byte in header[:148] + header[156:] if byte > 127)
        if stored != unsigned - 256 * high:  # some old writers summed signed bytes
            problem = "not a tar file" if position == 0 else "damaged header"
            raise DamageError(shard, position, f"{problem} (wrong checksum); copy or write it again")
    size = _octal(header[124:136])
    if size is None or size < 0:
        raise DamageError(shard, position, "damaged header (no valid size); copy or write it again")
    return header[156:157], size


def _check_size(data: Buffer, position: int, size: int, shard: str) -> None:
    if position + BLOCK + size > len(data):
        raise DamageError(
            shard,
            position,
            f"a member of {size} bytes leaves the file of {len(data)}; copy or write it again",
        )


def _check_end(data: Buffer, position: int, shard: str) -> None:
    """Refuse what readers would silently leave out: a second archive behind the first one's end."""
    while chunk := data[position : position + (1 << 20)]:
        if any(chunk):
            raise DamageError(shard, position, "bytes behind the end mark; join tar files with `tar --concatenate`")
        position += len(chunk)


def _payload(raw: bytes, position: int, shard: str) -> bytes:
    if len(raw) > _MAX_NAME:
        raise DamageError(shard, position, f"a name or pax header of over {_MAX_NAME} bytes; shorten it")
    return raw


def _octal(raw: bytes) -> int | None:
    """Read a number field: octal digits, or base 256 where the highest bit of the first byte is set (GNU)."""
    if raw[0] & 0x80:
        value = int.from_bytes(raw, "big") & ((1 << (8 * len(raw) - 1)) - 1)
        return value if raw[0] == 0x80 else None  # 0xff begins a negative number
    digits = raw.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _decimal(text: str, position: int, shard: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise DamageError(shard, position, "damaged pax header (no valid size); copy or write it again")
    return int(text)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    if prefix and header[257:263] == b"ustar\0":  # GNU's own format keeps times there
        name = prefix + b"/" + name
    return text_of(name)


def _pax(payload: bytes, position: int, shard: str) -> dict[str, str]:
    """Read the `LENGTH KEYWORD=VALUE newline` records of a pax header."""
    values: dict[str, str] = {}
    while payload.strip(b"\0"):
        length, space, _ = payload[:20].partition(b" ")
        end = int(length) if length.isdigit() and space else 0
        keyword, equals, value = payload[len(length) + 1 : max(end - 1, 0)].partition(b"=")
        if not equals or payload[end - 1 : end] != b"\n" or (keyword == b"path" and b"\0" in value):
            raise DamageError(shard, position, "damaged pax header; copy or write it again")
        values[text_of(keyword)] = text_of(value)
        payload = payload[end:]
    return values
