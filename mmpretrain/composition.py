"""What we add to Hydra's composition: resolvers, errors in one line with the nearest keys, and what only the command
line may say."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module, version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from mmpretrain.distributed import run_id
from mmpretrain.errors import InputError
from mmpretrain.yaml_files import check_yaml

CONFIGS = "pkg://mmpretrain.configs"
COMMAND_LINE_ONLY = ("callbacks", "hydra_logging", "job.env_set", "job_logging", "launcher", "sweeper")
"""Keys of `hydra` that run code of their own: Hydra reads them before we see the config."""


def register_resolvers() -> None:
    """Make `${run_id:}`, `${cpu_count:}`, `${cpu_precision:}` and where data sets are (`${openmoji_root:}`) known."""
    OmegaConf.register_new_resolver("run_id", _run_id, replace=True)
    OmegaConf.register_new_resolver("cpu_count", _cpu_count, replace=True)
    OmegaConf.register_new_resolver("cpu_precision", _cpu_precision, replace=True)
    OmegaConf.register_new_resolver("openmoji_root", _openmoji_root, replace=True)
    OmegaConf.register_new_resolver("fashion_mnist_root", _fashion_mnist_root, replace=True)


def _cpu_count() -> int:
    from mmpretrain.training.cpu import available_cores

    return available_cores()


def _cpu_precision() -> str:
    from mmpretrain.training.cpu import cpu_precision

    return cpu_precision()


def _run_id() -> str:
    # Further local ranks that Lightning starts inherit the environment, and so the name.
    return os.environ.setdefault("MMPRETRAIN_RUN_ID", run_id())


def _openmoji_root() -> str:
    from mmpretrain.datasets.openmoji import default_root

    return str(default_root())


def _fashion_mnist_root() -> str:
    from mmpretrain.datasets.fashion_mnist import default_out

    return str(default_out())


def check_given(config_name: str, arguments: Sequence[str]) -> None:
    """Raise `InputError` where config files of the user's own say what only the command line may.

    Such files may be a stranger's. They may not extend `allow_targets`, nor change the parts of Hydra that call any
    function (`COMMAND_LINE_ONLY`), unless an argument names the same key.
    """
    parsed = get_args_parser().parse_args(list(arguments))
    if parsed.experimental_rerun:
        raise InputError("--experimental-rerun reads a pickle, which can run code; give the run's arguments again")
    own = (parsed.config_dir, parsed.config_path, parsed.config_name)
    if not any(own) and not any("hydra.searchpath" in argument for argument in parsed.overrides):
        return
    for file in _own_files(parsed.config_dir, parsed.config_path, parsed.overrides):
        check_yaml(file)
    usual = [_compose(CONFIGS, None, name, []) for name in (config_name, None)]
    main = CONFIGS if parsed.config_path is None else _address(parsed.config_path)
    for overrides in _each_choice(main, parsed.config_dir, parsed.overrides):
        found = _compose(main, parsed.config_dir, parsed.config_name or config_name, overrides)
        if found.get("allow_targets") and not _names("allow_targets", parsed.overrides):
            raise InputError(
                f"a config file sets allow_targets={list(found.allow_targets)}; only the command line may: "
                "if you trust the file, give allow_targets=[...] there"
            )
        for key in COMMAND_LINE_ONLY:
            if _raw(found, key) not in [_raw(config, key) for config in usual] and not _names(key, parsed.overrides):
                raise InputError(
                    f"a config file changes hydra.{key}, through which it can run code; only the command line may: "
                    f"if you trust the file, give hydra.{key}... or hydra/{key}=... there"
                )


def _own_files(config_dir: str | None, config_path: str | None, overrides: Sequence[str]) -> Iterator[Path]:
    searched = re.findall(r"file://([^,\]'\"]+)", " ".join(o for o in overrides if "hydra.searchpath" in o))
    for folder in filter(None, (config_dir, config_path, *searched)):
        for pattern in ("*.yaml", "*.yml"):
            yield from Path(folder.removeprefix("file://")).rglob(pattern)


def _address(folder: str) -> str:
    return folder if "://" in folder else f"file://{Path(folder).resolve()}"


def _compose(main: str, folder: str | None, config_name: str | None, overrides: Sequence[str]) -> Any:
    try:
        _loader(main, folder)
        return compose(config_name, overrides=list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().clear()


def _loader(main: str, folder: str | None) -> ConfigLoader:
    """Make Hydra look for configs where its command line would."""
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    search_path = create_config_search_path(main)
    if folder is not None:
        search_path.prepend("command-line", _address(folder))
    return Hydra.create_main_hydra2("mmpretrain", search_path).config_loader


def _each_choice(main: str, folder: str | None, arguments: Sequence[str]) -> Iterator[list[str]]:
    """Yield the arguments without sweeps: each choice of a swept group once, the first of all other values.

    What an argument sets inside `hydra` is the user's word and left out, but for where configs are looked for.
    """
    loader = _loader(main, folder)
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    kept = [o for o in parsed if not o.key_or_group.startswith("hydra.") or o.key_or_group == "hydra.searchpath"]
    choices = [_values(override) for override in kept]
    groups = [bool(loader.get_group_options(override.key_or_group)) for override in kept]
    GlobalHydra.instance().clear()
    first = [values[0] for values in choices]
    yield first
    for i, values in enumerate(choices):
        for value in values[1:] if groups[i] else []:
            yield [*first[:i], value, *first[i + 1 :]]


def _values(override: Override) -> list[str]:
    line = str(override.input_line)
    if not override.is_sweep_override():
        return [line]
    return [f"{line.partition('=')[0]}={value}" for value in override.sweep_string_iterator()]


def _names(key: str, arguments: Sequence[str]) -> bool:
    """Whether an argument sets the key, a part of it, or chooses it as a group of Hydra's."""
    path = key if key == "allow_targets" else f"hydra.{key}"
    names = [argument.partition("=")[0].lstrip("+~").replace("/", ".") for argument in arguments]
    return any(name == path or name.startswith(f"{path}.") for name in names)


def _raw(config: Any, key: str) -> Any:
    found: Any = OmegaConf.to_container(config.hydra, resolve=False)
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else found
    return found


def explain(error: BaseException, config_name: str, arguments: Sequence[str]) -> str:
    """Say a composition error in one line; a misspelt key or option comes with the nearest valid ones."""
    chain = list(_chain(error))
    text = " ".join(" ".join(str(link) for link in chain).split())
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        inner = re.search(r"full_key: (\S+)", text)
        key = inner[1] if inner else unknown[1]
        nearest = _nearest(key, _keys(config_name, arguments))
        return f"no key {key!r} in the config{nearest}; a new key is added with +{key}=..."
    option = re.search(r"(?:Could not find|In '[^']*': Could not find) '([^']+)'", text)
    if option:
        group, _, choice = option[1].rpartition("/")
        options = re.findall(r"\S+", text.split(f"Available options in '{group}':")[-1].split(" Config search path")[0])
        known = ", ".join(dict.fromkeys(options))
        return f"no {group or 'config'} {choice!r}{_nearest(choice, options)}; there are: {known}"
    if any(isinstance(link, MissingMandatoryValue) for link in chain):
        key = next((k for k in (str(getattr(link, "full_key", "") or "") for link in chain) if k), text)
        return f"{key} is not set; give it on the command line: {key}=..."
    return " ".join(str(chain[0]).split())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    if not close:  # the right leaf in the wrong place
        leaf = key.rsplit(".", 1)[-1]
        close = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:3]
    return f"; nearest: {', '.join(close)}" if close else ""


def _keys(config_name: str, arguments: Sequence[str]) -> list[str]:
    """List every key of the config that the group choices among the arguments give."""
    GlobalHydra.instance().clear()
    with suppress(HydraException), initialize_config_module("mmpretrain.configs", version_base="1.3"):
        choices = [a for a in arguments if re.fullmatch(r"[a-z_]+=[\w/]+", a) and _is_group(a.split("=")[0])]
        return list(_flat(compose(config_name, overrides=choices)))
    return []  # a folder of the user's own configs chose a group that only it has


def _is_group(name: str) -> bool:
    loader = GlobalHydra.instance().config_loader()
    return bool(loader.get_group_options(name))


def _flat(config: Any, prefix: str = "") -> Iterator[str]:
    for key in config:
        path = f"{prefix}{key}"
        yield path
        child = config._get_node(key)
        if OmegaConf.is_dict(child) and not child._is_none() and not child._is_missing():
            yield from _flat(child, f"{path}.")
