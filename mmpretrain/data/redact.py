"""Secrets stay out of messages, events, logs and manifests: what is written about a URL goes through here."""

from __future__ import annotations

import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*")
_QUERY = re.compile(r"\?[\w.%~-]+=[^\s'\"<>]*")
_PLACE = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")  # a host, and perhaps a port


def redact(name: str) -> str:
    """Return a shard's name without user, password, query (signatures, tokens) and fragment; a path as it is."""
    scheme, separator, rest = name.partition("://")
    if not separator:
        return name
    place, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    place = place.rpartition("@")[2]
    if not _PLACE.fullmatch(place):  # what looks like a port and is none may be half of a password
        return f"{scheme}://..."
    return f"{scheme}://{place}{slash}{path}"


def redact_text(text: str) -> str:
    """Return a message, perhaps another library's, with every URL in it redacted and every query removed."""
    return _QUERY.sub("", _URL.sub(lambda found: redact(found[0]), text))
