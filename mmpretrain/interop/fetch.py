"""Files from the Hugging Face hub, through its own client and cache, and from any address, checked by SHA-256."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.interop.files import read_tensors

T = TypeVar("T")


def hub_list(repository: str, revision: str | None = None) -> list[str]:
    """Return the names of all files of a repository; where it cannot be reached, of those fetched before.

    Raises `InputError` where none were.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        return _asked(repository, lambda: list(HfApi().list_repo_files(repository, revision=revision)))
    except InputError:
        try:
            kept = Path(snapshot_download(repository, revision=revision, allow_patterns=[], local_files_only=True))
        except Exception:
            kept = Path()
        if kept == Path():
            raise
        return sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file())


def hub_folder(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    """Fetch some files of a repository; returns their folder, which is named by the commit."""
    from huggingface_hub import snapshot_download

    return _asked(
        repository, lambda: Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    )


def hub_file(repository: str, names: Sequence[str], revision: str | None = None) -> Path:
    """Fetch the first of these files that a repository has; `InputError` where it has none of them."""
    from huggingface_hub import hf_hub_download

    there = hub_list(repository, revision)
    name = next((name for name in names if name in there), None)
    if name is None:
        raise InputError(f"hf-hub:{repository} has none of {', '.join(names)}")
    return _asked(repository, lambda: Path(hf_hub_download(repository, name, revision=revision)))


def _asked(repository: str, request: Callable[[], T]) -> T:
    try:
        return request()
    except Exception as error:  # the hub's own errors, its HTTP client's and the system's have no base in common
        said = " ".join(str(error).split())[:300]
        raise InputError(f"cannot fetch hf-hub:{repository}: {type(error).__name__}: {said}") from error


def tensors_at(url: str, digest: str) -> dict[str, Tensor]:
    """Fetch a file, check that its SHA-256 begins with `digest`, and read its tensors; the file is not kept."""
    from mmpretrain.data.cache import RETRY, scheme_of
    from mmpretrain.data.download import download

    def announce(size: int) -> None:
        print(f"fetching {url} ({size / 2**20:.0f} MiB)", file=sys.stderr)

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "weights"
        with path.open("w+b") as file:
            try:
                download(url, scheme_of(url), file, announce, RETRY, threading.Event())
            except InputError as error:
                raise InputError(f"cannot fetch {url}: {error}") from error
            file.flush()
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(digest):
            raise InputError(f"{url} has the SHA-256 {found} instead of {digest}...; it was changed, or cut on its way")
        return read_tensors(path)
