"""From config to objects: Hydra's `_target_` is the registry, limited to what is safe to call.

Hydra will call any importable function, `torch.load` and file deletion included, so a config from a stranger would be
code. A target must be written under an allowed package, and what is found there must be a class (or a function of a few
modules) that really lives in one of `HOMES`: `mmpretrain.distributed.os.system` is a name under ours that is not ours.
Everything is resolved before it is checked, and built from that, so no interpolation can change it afterwards.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    "lightning.",
    "timm.",
    "torchmetrics.",
    "torchvision.datasets.",
    "torchvision.transforms.",
)
"""Prefixes a `_target_` may have; `allow` arguments (`allow_targets` on the command line) add to them."""

HOMES = (
    "mmpretrain.",
    "torch.nn.",
    "torch.optim.",
    "lightning.pytorch.accelerators.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.plugins.",
    "lightning.pytorch.profilers.",
    "lightning.pytorch.strategies.",
    "lightning.pytorch.trainer.",
    "lightning.fabric.plugins.",
    "timm.data.auto_augment.",
    "timm.data.mixup.",
    "timm.data.random_erasing.",
    "timm.data.transforms.",
    "timm.layers.",
    "timm.loss.",
    "timm.models.",
    "timm.optim.",
    "timm.scheduler.",
    "torchmetrics.",
    "torchvision.datasets.",
    "torchvision.transforms.",
)
"""Where an allowed class may be defined. Left out: Lightning's command line and utilities, timm's readers (which open
`pipe:` addresses) and all else that loads pickles or starts processes when it is called."""

REFUSED = ("torchvision.datasets.lsun.",)
"""Inside `HOMES`, but a constructor there reads a pickle."""

FUNCTIONS = (
    "mmpretrain.datasets.",
    "mmpretrain.losses.",
    "mmpretrain.training.optim.",
    "torch._C._nn.",  # where activations of torch.nn.functional really are
    "torch.nn.functional.",
    "torch.nn.init.",
    "torchvision.transforms.functional.",
    "torchvision.transforms.v2.functional.",
)
"""Where an allowed function may be defined: elsewhere they read and write files, or are whole programs."""

MODEL_TARGETS = (
    "mmpretrain.encoders.",
    "mmpretrain.fusion.",
    "mmpretrain.heads.",
    "mmpretrain.model.",
    "mmpretrain.data.naflex.",
    "mmpretrain.data.preprocess.",
    "mmpretrain.data.tokenizer.",
    "timm.models.byobnet.ByoBlockCfg",  # a record: the sizes of one stage of a ResNet
    "torch.nn.modules.",
)
"""Where the classes live that a saved model, perhaps a stranger's, may be built of."""

_ADVICE = "add a package of your own with allow_targets=[your_package]"


def build_saved(config: Any, allow: Sequence[str] = ()) -> Any:
    """Build a part of a saved model: only classes, only those of `MODEL_TARGETS` and of packages in `allow`.

    Its config has no interpolations, which could read the environment, and asks for no other weights, which could be
    fetched or lie anywhere: `InputError` for either.
    """
    refuse_interpolations(config)
    resolved = _resolved(config)
    for path, target in targets(resolved):
        homes = (*MODEL_TARGETS, *_packages(allow))
        found = check_target(target, path, allow)
        if not isinstance(found, type) or not _home(found).startswith(homes):
            raise InputError(f"{path} is {target!r}, which is not allowed in a saved model: it is no part of one")
    _refuse_pretrained(resolved, "")
    return instantiate(resolved, allow=allow)


def instantiate(config: Any, *args: Any, allow: Sequence[str] = (), **kwargs: Any) -> Any:
    """Build what a config describes, innermost parts first, after checking every `_target_` in it.

    Raises `InputError` for a target that is missing or not allowed, and passes on an `InputError` raised by a
    constructor with the key it came from; other errors keep their traceback.
    """
    _packages(allow)
    resolved = _resolved(config)
    for path, target in targets([resolved, kwargs]):
        check_target(target, path.partition(".")[2], allow)
    container = OmegaConf.create(resolved, flags={"allow_objects": True})
    try:
        return hydra_instantiate(container, *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        for cause in _chain(error):
            if isinstance(cause, InputError):
                raise cause from error
        raise InputError(str(error).replace("\n", " ")) from error


def targets(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Walk dictionaries and lists without interpolations: (key path, target) for each `_target_`."""
    for key, value in _items(config):
        where = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            yield where, value
        else:
            yield from targets(value, where)


def check_target(target: Any, path: str, allow: Sequence[str] = ()) -> Any:
    """Return the object that `target` names; raises `InputError` unless it is allowed."""
    packages = _packages(allow)
    prefixes = (*ALLOWED_TARGETS, *packages)
    if not isinstance(target, str) or not target.startswith(prefixes):
        raise InputError(f"{path} is {target!r}, which is not allowed: allowed are {', '.join(prefixes)}; {_ADVICE}")
    if not target.startswith(packages) and any(part.startswith("_") for part in target.split(".")):
        raise InputError(f"{path} is {target!r}, which is not allowed: it is private; {_ADVICE}")
    try:
        found = get_object(target)
    except Exception as error:
        raise InputError(f"{path} is {target!r}, which cannot be imported: {' '.join(str(error).split())}") from error
    home = _home(found)
    if not home.startswith(packages) and not _is_allowed(found, home):
        raise InputError(
            f"{path} is {target!r}, which is really {home!r} and not allowed: "
            f"no class of {', '.join(HOMES)} and no function of {', '.join(FUNCTIONS)}; {_ADVICE}"
        )
    return found


def _is_allowed(found: Any, home: str) -> bool:
    """Whether it is a class or function by its own public name: no method, object or module, whose names may lie."""
    homes = HOMES if inspect.isclass(found) else FUNCTIONS if inspect.isroutine(found) else ()
    name = getattr(found, "__qualname__", "_")
    defined = getattr(sys.modules.get(getattr(found, "__module__", None) or ""), name, None)
    return home.startswith(homes) and not home.startswith(REFUSED) and name[0] != "_" and defined is found


def _resolved(config: Any) -> Any:
    """Return plain dictionaries and lists with every interpolation resolved, and none left in what came of one."""
    if not isinstance(config, (DictConfig, ListConfig)):
        config = OmegaConf.create(config, flags={"allow_objects": True})
    resolved = OmegaConf.to_container(config, resolve=True)
    refuse_interpolations(resolved)
    return resolved


def refuse_interpolations(config: Any, path: str = "") -> None:
    """Raise `InputError`, naming the key, for a value with `${`: in a stranger's config it could read anything."""
    for key, value in _items(config):
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, str) and "${" in value:
            raise InputError(f"{where} is an interpolation where none is read; write the value itself")
        refuse_interpolations(value, where)


def without_pretrained(config: Any) -> Any:
    """Set every `pretrained` of a plain config to false: weights that are at hand are all there is to load."""
    if isinstance(config, Mapping):
        return {key: False if key == "pretrained" else without_pretrained(value) for key, value in config.items()}
    return [without_pretrained(value) for value in config] if isinstance(config, list) else config


def _refuse_pretrained(config: Any, path: str) -> None:
    """Raise `InputError` for any `pretrained` that is set, also by its position: weights would come from elsewhere."""
    for key, value in _items(config):
        where = f"{path}.{key}" if path else str(key)
        if key == "pretrained" and value is not None and value is not False:
            raise InputError(f"{where} is {value!r:.100} in a saved model, whose weights lie beside it; set it false")
        if key == "_args_" and "_target_" in config:
            built = get_object(config["_target_"])
            if "pretrained" in inspect.signature(built).parameters:
                raise InputError(f"{where} gives options by position in a saved model; give them by name")
        _refuse_pretrained(value, where)


def _items(config: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(config, (Mapping, DictConfig)):
        yield from config.items()
    elif isinstance(config, (list, tuple, ListConfig)):
        yield from enumerate(config)


def _home(found: Any) -> str:
    return f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"


def _packages(allow: Sequence[str]) -> tuple[str, ...]:
    if isinstance(allow, str) or not all(isinstance(package, str) and package.strip(".") for package in allow):
        raise InputError(f"allow_targets={allow!r}; expected a list of package names such as [your_package]")
    return tuple(package if package.endswith(".") else f"{package}." for package in allow)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
