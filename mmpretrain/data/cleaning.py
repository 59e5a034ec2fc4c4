"""What is done to a text before it is cut into ids: repaired, white space joined, lower-cased, without punctuation."""

from __future__ import annotations

import html
import string
from collections.abc import Callable
from typing import Literal

import ftfy

Clean = Literal["none", "whitespace", "lower", "canonicalize", "lowercase", "unpunctuated"]

_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def repaired(text: str) -> str:
    """Repair mis-decoded text and resolve HTML entities."""
    if not text.isascii() or not text.isprintable() or "&" in text:  # else there is nothing to repair
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text


def whitespace(text: str) -> str:
    """Repair, and join white space."""
    return " ".join(repaired(text).split())


def lower(text: str) -> str:
    """Repair, join white space, lower the case (CLIP)."""
    return whitespace(text).lower()


def canonicalize(text: str) -> str:
    """Repair, take punctuation away (an underscore becomes a space), lower the case, join white space (SigLIP)."""
    return " ".join(repaired(text).translate(_PUNCTUATION).lower().split())


def lowercase(text: str) -> str:
    """Lower the case alone (transformers' SigLIP 2)."""
    return text.lower()


def unpunctuated(text: str) -> str:
    """Lower the case, take every punctuation mark away, join white space (transformers' SigLIP)."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "whitespace": whitespace,
    "lower": lower,
    "canonicalize": canonicalize,
    "lowercase": lowercase,
    "unpunctuated": unpunctuated,
}
"""How a text may be cleaned; the first four are names of open_clip."""
