"""A checked walk over the headers of a tar file: which regular files it holds, where, and what is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mmpretrain.data.events import Cause
from mmpretrain.data.headers import (
    BLOCK,
    Buffer,
    Header,
    find_header,
    guess_name,
    hides_name,
    number,
    on_grid,
    parse,
    pax_records,
    swallowed_header,
    text_of,
)
from mmpretrain.errors import InputError

_MAX_NAME = 1 << 20  # bytes of one long name or pax header; a damaged size must not be believed
_MAX_DAMAGES = 10_000
_RECORD = 20 * BLOCK  # most writers fill a tar up to a multiple of it
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """One regular file of a tar: its name, where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    """Bytes `offset` to `end` that hold no readable member.

    `name`: that of the member lost, as well as it can be told; `certain`: a sound header says so; `alone`: no
    other member can have been there; `suspect`: the member before, if bytes were put into it or taken out; `mark`:
    only an end mark, in the middle or absent, so that no member need have been there.
    """

    offset: int
    end: int
    cause: Cause
    detail: str
    name: str | None
    certain: bool = False
    alone: bool = False
    suspect: str | None = None
    mark: bool = False


class DamageError(InputError):
    """A shard of which nothing can be read: the message names the shard and the offset in bytes."""

    def __init__(self, shard: str, offset: int, problem: str) -> None:
        super().__init__(f"{shard} at byte {offset}: {problem}")
        self.shard = shard
        self.offset = offset
        self.problem = problem

    def __reduce__(self) -> tuple[type[DamageError], tuple[str, int, str]]:
        return type(self), (self.shard, self.offset, self.problem)  # so that it crosses process borders whole


class _Bad(Exception):
    """A member that cannot be read; `after`: where the next header lies, if that is known."""

    def __init__(self, cause: Cause, detail: str, name: str | None, after: int | None = None) -> None:
        self.cause, self.detail, self.name, self.after = cause, detail, name, after


def walk(data: Buffer, shard: str) -> Iterator[Member | Damage]:
    """Yield the regular files of a tar (v7, ustar, GNU and pax formats) and the damaged places, in file order.

    Directories, links and devices are skipped. Behind a damaged place the walk goes on at the next sound header.
    Raises `DamageError`, naming `shard`, only for an empty file, a compressed one, one that is no tar, and for
    more than 10,000 damaged places.
    """
    _check_format(data, shard)
    walker = _Walker(data)
    damages = 0
    while (found := walker.step()) is not None:
        for item in found:
            damages += isinstance(item, Damage)
            yield item
        if damages > _MAX_DAMAGES:
            raise DamageError(shard, walker.position, f"over {_MAX_DAMAGES} damaged places; copy or write it again")
    yield from walker.rest()


def _check_format(data: Buffer, shard: str) -> None:
    if len(data) == 0:
        raise DamageError(shard, 0, "the file is empty; copy or write it again")
    for magic, name in _COMPRESSED.items():
        if data[: len(magic)] == magic:
            raise DamageError(shard, 0, f"this is {name} data; decompress it first, shards are read in place")
    if parse(data[:BLOCK]) is None and _something(data, 0) and find_header(data, 1, has_magic=False) is None:
        raise DamageError(shard, 0, "not a tar file (no header with a right checksum); copy or write it again")


class _Walker:
    """Where the walk is. A member is held back until the header behind it shows that its size was right."""

    def __init__(self, data: Buffer) -> None:
        self.data = data
        self.position = 0  # of the next header
        self.begin = 0  # of the present member, its pax and long-name headers included
        self.shared: dict[str, str] = {}  # pax values for all following members
        self.local: dict[str, str] = {}  # pax values and GNU long name for the next member
        self.held: list[Member | Damage] = []
        self.has_magic = False
        self.nameless = False  # the next member's name is lost

    def step(self) -> list[Member | Damage] | None:
        """Read one header and return what is now certain; None at the end."""
        data, position = self.data, self.position
        block = data[position : position + BLOCK]
        if not block.strip(b"\0") and not _something(data, position):
            return None
        if not self.local:
            self.begin = position
        header, named = parse(block), "path" in self.local
        try:
            if header is None:
                raise self._unreadable(block)
            self.has_magic = self.has_magic or block[257:262] == b"ustar"
            member, self.position = self._read(header)
        except _Bad as bad:
            return self._resume(bad, named or header is not None)
        if self.local or header.kind == b"g":  # it belongs to a header behind it
            return []
        nameless, self.nameless = self.nameless and not named, False
        if nameless and isinstance(lost := self.held[-1], Damage):
            self.held[-1] = lost._replace(end=self.position, name=None, alone=True)
            return []
        ready, self.held = self.held, [] if member is None else [member]
        return ready

    def rest(self) -> list[Member | Damage]:
        """Return what is held back at the end, and the missing end mark if there is none."""
        end = len(self.data)
        if self.position < end or any(isinstance(item, Damage) for item in self.held):
            return self.held
        detail = "no end mark; copy or write the shard again"
        return [*self.held, Damage(end, end, "truncated", detail, None, mark=True)]

    def _unreadable(self, block: bytes) -> _Bad:
        if not block.strip(b"\0"):
            return _Bad("zeros", "zero blocks in the middle", self.local.get("path"))
        if len(block) < BLOCK:
            return _Bad("truncated", "the file ends inside a header", self.local.get("path"))
        return _Bad("header", "a header with a wrong checksum", self.local.get("path") or guess_name(block))

    def _read(self, header: Header) -> tuple[Member | None, int]:
        """Return the member of a header, None if it is no regular file, and where the next header begins."""
        data, start = self.data, self.position + BLOCK
        kind, size, name = header
        if kind in b"LKxXg":
            self._check_size(start, size, None)
            if size > _MAX_NAME:
                raise _Bad("refused", f"a name or pax header of over {_MAX_NAME} bytes; shorten it", None)
            self._extend(kind, data[start : start + size])
            return None, on_grid(start + size, start)
        values = {**self.shared, **self.local}
        self.local = {}
        name = values.get("path") or name
        if "size" in values:
            text = values["size"]
            size = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
        if kind in b"123456" or (kind == b"\0" and name.endswith("/")):
            size = 0  # links, devices, directories and pipes have no bytes, whatever their header says
        if kind == b"S" or any(key.startswith("GNU.sparse.") for key in values):
            after = self._behind_sparse(start, size)
            raise _Bad("refused", "a sparse member; write the shard without tar's --sparse", name, after)
        self._check_size(start, size, name)
        fits = self._fits(on_grid(start + size, start))
        if not fits and (other := swallowed_header(data, start, size)) is not None:
            raise _Bad("header", f"a size of {size} bytes that covers the next header", name, other)
        regular = kind in b"07" or (kind == b"\0" and not name.endswith("/"))
        return Member(name, start, size) if regular else None, on_grid(start + size, start)

    def _check_size(self, start: int, size: int, name: str | None) -> None:
        if size < 0:
            raise _Bad("header", "no valid size", name)
        if start + size > len(self.data):
            raise _Bad("truncated", f"a member of {size} bytes leaves the file of {len(self.data)}", name)

    def _fits(self, after: int) -> bool:
        """Tell whether a header or an end mark lies at `after`: then the size that led there is right.

        The bytes before are the member's, whatever they hold: who makes a picture must not make samples.
        """
        mark = self.data[after : after + 2 * BLOCK]
        return parse(mark[:BLOCK]) is not None or (len(mark) > 0 and not mark.strip(b"\0"))

    def _extend(self, kind: bytes, payload: bytes) -> None:
        if kind == b"L":
            self.local["path"] = text_of(payload.split(b"\0", 1)[0])
        elif kind == b"K":
            self.local.setdefault("linkpath", "")
        else:
            try:
                (self.shared if kind == b"g" else self.local).update(pax_records(payload) or {"": ""})
            except ValueError as error:
                raise _Bad("header", str(error), None) from error

    def _behind_sparse(self, start: int, size: int) -> int:
        """Skip the blocks of GNU's old sparse map; pax writes none."""
        data, flag = self.data, _byte_at(self.data, start - BLOCK + 482)
        while flag and start < len(data):
            flag = _byte_at(data, start + 504)
            start += BLOCK
        return on_grid(start + max(size, 0), start)

    def _resume(self, bad: _Bad, certain: bool) -> list[Member | Damage]:
        """Hold the damage and go on at the next sound header."""
        data, begin, position = self.data, self.begin, self.position
        again = bad.after
        if again is None or parse(data[again : again + BLOCK]) is None:
            again = find_header(data, position + 1, self.has_magic)
        after = len(data) if again is None else again
        cause: Cause = "header" if bad.cause == "truncated" and again is not None else bad.cause
        certain = certain and bad.name is not None
        lost = Damage(begin, after, cause, bad.detail, bad.name, certain, self._alone(position, again))
        lost = lost._replace(mark=cause == "zeros" and self._is_mark(begin, after))
        self.nameless = again is not None and not certain and hides_name(data, position, after)
        self.local, self.position = {}, after
        ready, self.held = self.held, [lost]
        if ready and isinstance(before := ready[-1], Member) and self._shifted(before):
            self.held = [lost._replace(suspect=before.name)]
        return ready

    def _alone(self, position: int, again: int | None) -> bool:
        """Tell whether a damaged header's size leads just to the next sound header, or to the end."""
        size = number(self.data[position + 124 : position + 136]) if position + BLOCK <= len(self.data) else None
        if size is None:
            return False
        after = on_grid(position + BLOCK + size, position)
        return after == again or (again is None and not _something(self.data, after))

    def _is_mark(self, begin: int, end: int) -> bool:
        """Tell whether begin:end is as an end mark is: two zero blocks, or zeros up to the end of a record."""
        size = end - begin
        padded = end % _RECORD == 0 and 2 * BLOCK <= size < 2 * BLOCK + _RECORD
        return (padded or size == 2 * BLOCK) and not self.data[begin:end].strip(b"\0")

    def _shifted(self, member: Member) -> bool:
        """Tell whether a member's bytes are not followed by zeros up to the next block: more were put in."""
        end = member.offset + member.size
        return bool(self.data[end : on_grid(end, member.offset)].strip(b"\0"))


def _byte_at(data: Buffer, position: int) -> int:
    """Return the byte at a position, 0 behind the end."""
    byte = data[position : position + 1]
    return byte[0] if byte else 0


def _something(data: Buffer, position: int) -> bool:
    """Tell whether a byte from `position` on is not zero."""
    while chunk := data[position : position + (1 << 16)]:
        if chunk.strip(b"\0"):
            return True
        position += len(chunk)
    return False
