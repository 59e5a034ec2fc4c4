"""A download that goes on where it broke off, for as long as there is hope."""

from __future__ import annotations

import errno
import http.client
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple

from mmpretrain.data.redact import redact_text
from mmpretrain.data.remote import Reply, open_object
from mmpretrain.data.web import open_url
from mmpretrain.errors import InputError


class Retry(NamedTuple):
    """When to try again: waits are random between 0 and a bound that doubles ("full jitter"), in seconds."""

    patience: float = 60.0  # without one more byte, over all attempts
    attempts: int = 12  # in a row without one more byte
    first: float = 0.5  # bound of the first wait
    most: float = 15.0  # bound of every wait
    stall: float = 20.0  # without a byte, within one attempt
    total: float = 7200.0  # for one shard


class Refused(InputError):
    """A remote file that is missing or forbidden: asking again is of no use."""


class Cancelled(Exception):
    """Another thread asked for the end of a download."""


def download(
    url: str, scheme: str, file: BinaryIO, reserve: Callable[[int], None], retry: Retry, cancelled: threading.Event
) -> int | None:
    """Write all of a remote file to `file`; returns its modification time in ns if the server tells.

    reserve: called with the size in bytes before anything is written. Raises `InputError` saying why it does not
    work (`Refused` where it never will), `Cancelled` once `cancelled` is set. A resumed http download needs a server
    that gives a strong ETag.
    """
    got = best = failures = 0
    version: str | None = None
    begun = moved = time.monotonic()
    while True:
        try:
            with _open(url, scheme, got, version, retry.stall) as reply:
                got, version = reply.start, reply.version
                reserve(reply.size)
                file.seek(got)
                for chunk in reply.chunks:
                    if cancelled.is_set():
                        raise Cancelled
                    if got + len(chunk) > reply.size:
                        version = None  # not to be continued
                        raise OSError(f"more than the {reply.size} bytes announced arrived")
                    _write(file, chunk)
                    got += len(chunk)
            if got == reply.size:
                return reply.modified
            raise OSError(f"{got} of {reply.size} bytes arrived")
        except Cancelled:
            raise
        except Exception as error:  # each client has errors of its own: botocore's, aiohttp's, httpx's
            if got > best:
                best, failures, moved = got, 0, time.monotonic()
            if version is None:
                got = 0
            failures += 1
            wait = max(random.uniform(0, min(retry.most, retry.first * 2 ** (failures - 1))), _asked_wait(error))
            now = time.monotonic()
            hopeless = failures >= retry.attempts or now + wait - moved > retry.patience
            if not can_get_better(error) or hopeless or now - begun > retry.total:
                # Not chained: the cause's own words may hold what was redacted here.
                raise (InputError if can_get_better(error) else Refused)(_why(error, failures)) from None
            if cancelled.wait(wait):
                raise Cancelled from None


def _open(url: str, scheme: str, start: int, version: str | None, stall: float) -> AbstractContextManager[Reply]:
    if scheme in ("http", "https"):
        return open_url(url, start, version, stall)
    return open_object(url, scheme, start, version)


def _write(file: BinaryIO, chunk: bytes) -> None:
    try:
        view = memoryview(chunk)
        while view:
            view = view[file.write(view) :]  # a file without buffer may take less than it is given
    except OSError as error:
        raise InputError(
            f"the cache folder takes no more bytes ({error}); make room or set MMPRETRAIN_CACHE"
        ) from error


def can_get_better(error: Exception) -> bool:
    """Whether the same request may work later: not where something is missing, forbidden or wrong."""
    answer = getattr(error, "response", None)
    for status in (getattr(error, "status", None), getattr(error, "code", None), getattr(answer, "status_code", None)):
        if isinstance(status, int):
            return status in (408, 425, 429) or status >= 500
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.ENOSYS):
        return False
    botocore = sys.modules.get("botocore.exceptions")
    if botocore is not None and isinstance(error, botocore.NoCredentialsError):
        return False
    wrong = (ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError)
    return not isinstance(error, (*wrong, FileNotFoundError, PermissionError, http.client.InvalidURL))


def _asked_wait(error: Exception) -> float:
    wait = getattr(error, "wait", 0.0)
    return wait if isinstance(wait, float) else 0.0


def _why(error: Exception, failures: int) -> str:
    said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    tried = f" (tried {failures} times)" if failures > 1 else ""
    return redact_text(" ".join(said.split())) + tried
