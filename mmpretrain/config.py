"""From config to objects: Hydra's `_target_` is the registry, limited to packages that are safe to call.

Hydra will call any importable function, `torch.load` and file deletion included, so a config from a stranger would be
code. Targets must start with an allowed prefix, and the object found there must really live under one, because
`mmpretrain.distributed.os.system` is a name under ours that is not ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from mmpretrain.errors import InputError

ALLOWED_TARGETS = (
    "mmpretrain.",
    "torch.nn.",
    "torch.optim.",
    "lightning.Trainer",
    "lightning.pytorch.",
    "timm.optim.",
    "torchmetrics.",
    "torchvision.datasets.",
    "torchvision.transforms.",
)
"""Prefixes a `_target_` may have; `allow` arguments (`allow_targets` on the command line) add to them."""

MODEL_TARGETS = (
    "mmpretrain.encoders.",
    "mmpretrain.fusion.",
    "mmpretrain.heads.",
    "mmpretrain.model.",
    "mmpretrain.data.preprocess.",
    "mmpretrain.data.tokenizer.",
    "torch.nn.modules.",
)
"""Where the classes live that a saved model, perhaps a stranger's, may be built of."""


def build_saved(config: Any, allow: Sequence[str] = ()) -> Any:
    """Build a part of a saved model: only classes, only those of `MODEL_TARGETS` and of packages in `allow`."""
    for path, target in targets(OmegaConf.create(config)):
        homes = (*MODEL_TARGETS, *_packages(allow))
        found = check_target(target, path, allow)
        if not isinstance(found, type) or not _home(found).startswith(homes):
            raise InputError(f"{path} is {target!r}, which is not allowed in a saved model: it is no part of one")
    return instantiate(config, allow=allow)


def instantiate(config: Any, *args: Any, allow: Sequence[str] = (), **kwargs: Any) -> Any:
    """Build what a config describes, innermost parts first, after checking every `_target_` in it.

    Raises `InputError` for a target that is missing or not allowed, and passes on an `InputError` raised by a
    constructor with the key it came from; other errors keep their traceback.
    """
    container = config if isinstance(config, (DictConfig, ListConfig)) else OmegaConf.create(config)
    for path, target in targets(container):
        check_target(target, path, allow)
    try:
        return hydra_instantiate(container, *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        for cause in _chain(error):
            if isinstance(cause, InputError):
                raise cause from error
        raise InputError(str(error).replace("\n", " ")) from error


def targets(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Walk a config: (key path, target) for each `_target_`."""
    if OmegaConf.is_dict(config):
        items = [(str(key), config.get(key)) for key in config]
    elif OmegaConf.is_list(config):
        items = [(str(i), value) for i, value in enumerate(config)]
    else:
        return
    for key, value in items:
        where = f"{path}.{key}" if path else key
        if key == "_target_":
            yield where, str(value)
        else:
            yield from targets(value, where)


def check_target(target: str, path: str, allow: Sequence[str] = ()) -> Any:
    """Return the object that `target` names; raises `InputError` unless it lives under an allowed prefix."""
    prefixes = (*ALLOWED_TARGETS, *_packages(allow))
    advice = f"allowed are {', '.join(prefixes)}; add a package of your own with allow_targets=[your_package]"
    if not target.startswith(prefixes):
        raise InputError(f"{path} is {target!r}, which is not allowed: {advice}")
    try:
        found = get_object(target)
    except Exception as error:
        raise InputError(f"{path} is {target!r}, which cannot be imported: {error}") from error
    if not _home(found).startswith(prefixes) or _home(found).startswith("mmpretrain.config."):
        raise InputError(f"{path} is {target!r}, which is really {_home(found)!r} and not allowed: {advice}")
    return found


def _home(found: Any) -> str:
    return f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"


def _packages(allow: Sequence[str]) -> tuple[str, ...]:
    return tuple(package if package.endswith(".") else f"{package}." for package in allow)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
