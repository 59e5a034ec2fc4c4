"""What was lost while reading data, and where: every loss is one event."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Cause = Literal[
    "header",  # a damaged tar header: its member cannot be located
    "zeros",  # zero blocks where a header should be
    "truncated",  # the file ends inside a member, or without its end mark
    "checksum",  # a member's bytes are not those the index was made from
    "missing",  # a member or a field that should be there is not
    "duplicate",  # a member or a key that is there twice
    "undecodable",  # bytes that are no picture, text, JSON or array that training reads
    "refused",  # over a limit (pixels, bytes, depth), or of a kind that is never read
    "unreadable",  # the file or the server gives no bytes
]
"""Why something was lost."""

CAUSES: tuple[Cause, ...] = get_args(Cause)


class DataEvent(NamedTuple):
    """One loss. `offset`: bytes from the shard's beginning; `key`: the sample; None where neither is known."""

    shard: str
    offset: int | None
    key: str | None
    cause: Cause
    detail: str
