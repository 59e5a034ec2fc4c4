"""Which shards a path, a pattern or a URL stands for."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from mmpretrain.data.cache import REMOTE, local_path, scheme_of
from mmpretrain.data.redact import redact
from mmpretrain.errors import InputError


def expand(spec: str | Sequence[str]) -> list[str]:
    """Return the shards that a pattern, or each pattern of a list, stands for, in order.

    A pattern is a path or URL (file, http, https, s3, gs, hf) with `{0000..0012}` or `{a,b}` braces, a local glob
    (sorted), or a folder (its `*.tar`, sorted). Raises `InputError` if a pattern matches nothing, names a
    missing file or has another scheme; commands (`pipe:`) are never run.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    shards = [shard for pattern in patterns for shard in _expand_one(pattern)]
    if not shards:
        raise InputError(
            f"no shards: got {spec!r}; expected a path, a pattern like 'data/{{000..009}}.tar' or a folder"
        )
    return shards


def _expand_one(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    if not pattern:
        raise InputError("an empty shard name; expected a path, a URL or a pattern like 'data/{000..009}.tar'")
    if Path(pattern).is_file():  # a name may itself hold braces or brackets
        return [pattern]
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"shard pattern {redact(pattern)!r} has unbalanced braces; write e.g. {{000..009}}") from error
    return [shard for name in names for shard in _expand_name(name, pattern)]


def _expand_name(name: str, pattern: str) -> list[str]:
    scheme = scheme_of(name)
    if scheme in REMOTE:
        if scheme == "s3" and "*" in name:
            raise InputError(
                f"shard pattern {redact(name)!r} is a remote glob; list remote shards with braces: {{000..009}}"
            )
        return [name]
    path = local_path(name)
    if path.is_dir():
        found = sorted(str(item) for item in path.glob("*.tar"))
        if not found:
            raise InputError(f"folder {name!r} holds no *.tar; expected shards, which `mmpretrain shards write` makes")
        return found
    if path.is_file():
        return [name]
    found = sorted(glob.glob(str(path))) if glob.has_magic(str(path)) else []  # noqa: PTH207 (takes absolute ones)
    if not found:
        raise InputError(f"shard {name!r} does not exist (from {pattern!r}); correct the path or the range in braces")
    return found
