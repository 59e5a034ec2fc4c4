"""What we add to Hydra's composition: resolvers for the configs, and errors in one line with the nearest keys."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from mmpretrain.distributed import run_id


def register_resolvers() -> None:
    """Make `${run_id:}`, `${cpu_count:}` and `${openmoji_root:}` known to OmegaConf."""
    OmegaConf.register_new_resolver("run_id", _run_id, replace=True)
    OmegaConf.register_new_resolver("cpu_count", _cpu_count, replace=True)
    OmegaConf.register_new_resolver("openmoji_root", _openmoji_root, replace=True)


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_id() -> str:
    # Further local ranks that Lightning starts inherit the environment, and so the name.
    return os.environ.setdefault("MMPRETRAIN_RUN_ID", run_id())


def _openmoji_root() -> str:
    from mmpretrain.datasets.openmoji import default_root

    return str(default_root())


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
