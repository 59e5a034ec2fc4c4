"""Keep passwords and keys out of what a run writes: its config, its manifest, its report and its messages.

What a config takes from the environment stays the interpolation it is, so the written config can be used again.
Values whose key says they are secret, and the secret parts of addresses, become ***.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import Container, OmegaConf
from omegaconf.resolvers import oc

HIDDEN = "***"

_KEYS = r"(?:api|access|account|private|secret|signing)[_-]?key"
_WORDS = rf"password|passwd|passphrase|secret|credentials?|authorization|{_KEYS}"
_SECRET_KEY = re.compile(
    rf"(?:.*[_-])?(?:{_WORDS})s?|(?:.*[_-])?(?:auth|access|api|hf|bearer|session|security|refresh|id)[_-]?token|token",
    re.IGNORECASE,
)
_USER = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/?#\s]+@", re.IGNORECASE)
_QUERY = re.compile(
    rf"([?&;](?:[\w-]*(?:signature|credential|token|{_WORDS})|sig|key|auth|awsaccesskeyid)=)[^&#\s'\"]+", re.IGNORECASE
)


def masked(config: Any) -> Any:
    """Return a config as plain dictionaries and lists: resolved, but for `${oc.env:NAME}`, and without secrets."""
    container = config if isinstance(config, Container) else OmegaConf.create(config)
    with _environment_unread():
        return _masked(OmegaConf.to_container(container, resolve=True))


def masked_yaml(config: Any) -> str:
    """Return what `masked` does as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(masked(config)))


def masked_text(text: str) -> str:
    """Return a message or address without user names, passwords and signatures in the addresses it holds."""
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))


def masked_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the `key=value` arguments of a command line, the values of secret keys and addresses hidden."""
    return [_masked_override(override) for override in overrides]


def _masked_override(override: str) -> str:
    key, equals, value = override.partition("=")
    if equals and _is_secret(key.rsplit(".", 1)[-1].lstrip("+~")) and "${oc.env:" not in value:
        return f"{key}={HIDDEN}"
    return masked_text(override)


def _masked(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _masked(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_masked(inner, key) for inner in value]
    if not isinstance(value, str):
        return HIDDEN if _is_secret(key) and isinstance(value, (int, bytes)) and not isinstance(value, bool) else value
    if value and _is_secret(key) and not value.startswith("${oc.env:"):
        return HIDDEN
    return masked_text(value)


def _is_secret(key: str) -> bool:
    return _SECRET_KEY.fullmatch(key) is not None


@contextmanager
def _environment_unread() -> Iterator[None]:
    """Let `${oc.env:NAME}` give itself instead of the variable's value, also where other values refer to it."""

    def itself(name: str, *default: Any) -> str:
        return f"${{oc.env:{','.join([name, *('null' if d is None else str(d) for d in default)])}}}"

    OmegaConf.register_new_resolver("oc.env", itself, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
