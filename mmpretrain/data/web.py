"""One GET over http(s), with every redirect checked before it is followed.

A server, or whoever took it over, could send us to the machines of our own network (cloud metadata at
169.254.169.254, a database without password) or to another scheme. So an address that is not public is only
connected to if it belongs to the very host and port that the user named, and the address that was checked is the
one connected to: a name cannot be resolved to another one a moment later. Proxies of the environment are not used,
as they resolve names themselves.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from mmpretrain.data.redact import redact
from mmpretrain.data.remote import Reply
from mmpretrain.errors import InputError

REDIRECTS = 5
_CHUNK = 2**18
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_TLS = {"http": False, "https": True}


class StatusError(OSError):
    """The server answered with an error. `wait`: seconds after which it wants to be asked again."""

    def __init__(self, status: int, reason: str, wait: float) -> None:
        super().__init__(f"the server answered {status} {reason}")
        self.status = status
        self.wait = wait


class _Place(NamedTuple):
    host: str
    port: int


@contextmanager
def open_url(url: str, start: int, version: str | None, timeout: float) -> Iterator[Reply]:
    """GET `url` from byte `start`, or from its beginning if it no longer is the one of `version` (an ETag).

    timeout: seconds without a byte. Raises `InputError` for a redirect that is refused and for an answer without
    a length, `StatusError` for an error status, OSError or HTTPException when the connection fails.
    """
    parts = _split(url)
    named = _place(parts)
    known = _resolve(named)
    ranged = {"Range": f"bytes={start}-", "If-Range": version} if start and version is not None else {}
    for _ in range(REDIRECTS + 1):
        place = _place(parts)
        secret = _authorization(url) if place == named else {}  # another host must not see it
        connection = _Connection(parts, known if place == named else _public(place), timeout)
        with closing(connection):
            target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept-Encoding": "identity", **ranged, **secret})
            with closing(connection.getresponse()) as answer:
                location = answer.getheader("Location")
                if answer.status not in (301, 302, 303, 307, 308) or location is None:
                    yield _reply(answer, start)
                    return
        parts = _follow(parts, location)
    raise InputError(f"more than {REDIRECTS} redirects, the last to {redact(parts.geturl())}")


class _Connection(http.client.HTTPConnection):
    """Connects to the addresses it is given, in turn, and to no other."""

    def __init__(self, parts: SplitResult, addresses: list[Any], timeout: float) -> None:
        self._tls = ssl.create_default_context() if _TLS[parts.scheme] else None
        self.default_port = 443 if self._tls else 80
        place = _place(parts)
        super().__init__(place.host, place.port, timeout=timeout)
        self._addresses = addresses

    def connect(self) -> None:
        failed: OSError = OSError(f"{self.host} has no address")
        for family, kind, protocol, _, address in self._addresses:
            connected = socket.socket(family, kind, protocol)
            try:
                connected.settimeout(self.timeout)
                connected.connect(address)
                self.sock = self._tls.wrap_socket(connected, server_hostname=self.host) if self._tls else connected
            except OSError as error:
                connected.close()
                failed = error
            else:
                return
        raise failed


def _split(url: str, location: str = "") -> SplitResult:
    """Return the parts of a URL, or of where a relative one leads from it."""
    try:
        parts = urlsplit(urljoin(url, location))
        _ = parts.port
    except ValueError:
        raise InputError(
            f"{redact(location or url)} has no valid host or port; write https://host:8080/a.tar"
        ) from None
    if parts.scheme in _TLS and not parts.hostname:
        raise InputError(f"{redact(location or url)} names no host; write https://host/a.tar")
    return parts


def _place(parts: SplitResult) -> _Place:
    port = parts.port if parts.port is not None else 443 if _TLS[parts.scheme] else 80
    return _Place(str(parts.hostname), port)


def _follow(parts: SplitResult, location: str) -> SplitResult:
    """Return where a redirect leads, if it may be followed."""
    after = _split(parts.geturl(), location)
    shown = redact(after.geturl())
    if after.scheme not in _TLS:
        raise InputError(f"a redirect to {shown} is refused: not http(s)")
    if _TLS[parts.scheme] and not _TLS[after.scheme]:
        raise InputError(f"a redirect from https to {shown} is refused: it would not be encrypted")
    return after


def _resolve(place: _Place) -> list[Any]:
    return socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)


def _public(place: _Place) -> list[Any]:
    found = _resolve(place)
    for *_, address in found:
        if not is_public(address[0]):
            raise InputError(
                f"a redirect to {place.host}:{place.port} ({address[0]}) is refused: not a public address; "
                "give the URL it leads to instead, if you trust it"
            )
    return found


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet: not private, loopback, link-local, reserved, multicast."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):  # those that carry an IPv4 address lead to that one
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip.sixtofour is not None or ip.teredo is not None:
            return False
    return ip.is_global and not ip.is_multicast


def _authorization(url: str) -> dict[str, str]:
    user, at, _ = urlsplit(url).netloc.rpartition("@")
    return {"Authorization": "Basic " + base64.b64encode(unquote(user).encode()).decode()} if at else {}


def _reply(answer: http.client.HTTPResponse, start: int) -> Reply:
    if answer.status not in (200, 206):
        wait = answer.getheader("Retry-After") or ""
        raise StatusError(answer.status, answer.reason, float(wait) if re.fullmatch(r"\d{1,6}", wait) else 0.0)
    if answer.length is None:
        raise InputError("the server does not say how long the file is; serve it with a Content-Length")
    begin = 0
    if answer.status == 206:
        begin = start
        if not (answer.getheader("Content-Range") or "").startswith(f"bytes {start}-"):
            raise OSError("the server sent another range than the one asked for")
    tag = answer.getheader("ETag")
    return Reply(
        start=begin,
        size=begin + answer.length,
        version=tag if tag is not None and tag.startswith('"') else None,  # W/ marks a weak one
        modified=_modified(answer.getheader("Last-Modified")),
        chunks=iter(lambda: answer.read1(_CHUNK), b""),
    )


def _modified(text: str | None) -> int | None:
    try:
        return None if text is None else int(parsedate_to_datetime(text).timestamp()) * 10**9
    except (ValueError, OverflowError):
        return None
