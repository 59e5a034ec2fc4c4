"""`manifest.json` of a run: everything that decided its result, written before the first step."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import mmpretrain
from mmpretrain.data.redact import redact
from mmpretrain.data.shards import Shard
from mmpretrain.errors import InputError
from mmpretrain.secrets import masked, masked_overrides
from mmpretrain.whole_file import write_whole

FORMAT = 1
MANIFEST = "manifest.json"
DISTRIBUTION = "mmpretrain-contrastive"
PATIENCE = 10.0
"""Seconds that git may take: on a slow file system a run must not wait for it."""


def manifest(config: DictConfig, shards: Mapping[str, Sequence[Shard]], world_size: int) -> dict[str, Any]:
    """Describe a run: its config, the shards of each source, software, git, seeds and hardware.

    The config is resolved; secrets in it and in the command line are masked.
    """
    return {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": _command(),
        "config": masked(config),
        "seeds": {"seed": config.get("seed"), "torch": torch.initial_seed()},
        "shards": {name: describe_shards(found) for name, found in shards.items()},
        "packages": packages(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": {"working_folder": git_state(Path.cwd()), "package": git_state(Path(mmpretrain.__file__).parent)},
        "hardware": hardware(world_size),
        "resumed": [],
    }


def record(folder: Path, described: Mapping[str, Any], step: int) -> Path:
    """Write `folder/manifest.json`; of a run resumed at `step`, note there what has changed since it began."""
    path = folder / MANIFEST
    found = dict(described)
    if path.exists():
        first = read(folder)
        now = {**found, "resumed": first["resumed"]}
        entry = {"time": found["time"], "step": step, "changed": changes(comparable(first), comparable(now))}
        found = {**first, "resumed": [*first["resumed"], entry]}
    write(path, found)
    return path


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader, or a crash, meets the old file or the new one."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=True))


def read(run: Path) -> dict[str, Any]:
    """Read the manifest of a run folder; raises `InputError` where there is none, or no valid one."""
    path = run / MANIFEST
    if not path.is_file():
        raise InputError(f"{run} holds no {MANIFEST}; give the folder of a run made by `mmpretrain train`")
    try:
        content = json.loads(path.read_bytes())
        written = content["format"]
        if written == FORMAT:
            _check(content)
            return dict(content)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"{path} is no manifest of a run ({type(error).__name__}: {error}); it was changed") from error
    raise InputError(f"{path} has the format {written!r}, expected {FORMAT}; read it with the version that wrote it")


def _check(content: Mapping[str, Any]) -> None:
    """Raise one of the usual errors where a part that is read later has another shape."""
    parts = {"config": dict, "command": dict, "shards": dict, "hardware": dict, "packages": dict, "resumed": list}
    for part, kind in parts.items():
        if not isinstance(content[part], kind):
            raise TypeError(f"{part} is no {kind.__name__}")
    command = content["command"]
    if not isinstance(command["folder"], str) or not all(
        isinstance(text, str) for name in ("overrides", "configs") for text in command[name]
    ):
        raise TypeError("command holds something else than texts")
    for found in content["shards"].values():
        for name, samples, lost, digest in found["shards"]:
            if (type(name), type(samples), type(lost), type(digest)) != (str, int, int, str):
                raise TypeError("a shard is not [name, samples, lost, digest]")


def comparable(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest's parts that should be equal in two equal runs: not time, place and command line."""
    parts = {part: value for part, value in described.items() if part not in ("time", "command", "resumed", "format")}
    config = {key: value for key, value in described["config"].items() if key not in ("run_dir", "resume")}
    shards = {
        source: {**found, "shards": {line[0]: f"{line[1]} samples, {line[3]}" for line in found["shards"]}}
        for source, found in described["shards"].items()
    }
    return {**parts, "config": config, "shards": shards}


def changes(before: Any, after: Any) -> dict[str, list[Any]]:
    """Return dotted key -> [before, after] for each value that differs; None where one side has no such key."""
    old, new = dict(flat(before)), dict(flat(after))
    return {k: [old.get(k), new.get(k)] for k in [*old, *(k for k in new if k not in old)] if old.get(k) != new.get(k)}


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Walk nested dictionaries: (dotted key, value) for each leaf; a list is one leaf."""
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{path}.{key}" if path else str(key))


def describe_shards(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return counts and digests: one line of [name, samples, lost, digest] for each shard, and one digest for all."""
    lines = [[redact(shard.name), len(shard), shard.lost, shard.digest] for shard in shards]
    digest = hashlib.sha256("\n".join(str(line[3]) for line in lines).encode()).hexdigest()
    samples, lost = sum(len(shard) for shard in shards), sum(shard.lost for shard in shards)
    return {"digest": digest, "samples": samples, "lost": lost, "shards": lines}


def packages() -> dict[str, str]:
    """Return the installed versions of this package and of everything it needs directly."""
    try:
        needed = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # used from a folder, not installed
        needed = ["torch", "lightning", "hydra-core", "numpy"]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed if "extra ==" not in line]
    found = {"mmpretrain": mmpretrain.__version__}
    for name in sorted(names):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit, whether files differ from it, and a hash of how; None outside a repository or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    difference = _git(folder, "diff", "--no-ext-diff", "--no-textconv", "--binary", "HEAD")
    if commit is None or difference is None:
        return None
    digest = hashlib.sha256(difference).hexdigest() if difference else None
    return {"commit": commit.decode().strip(), "dirty": bool(difference), "difference": digest}


def _git(folder: Path, *arguments: str) -> bytes | None:
    # A repository's own settings may name programs to run; those that these commands would use are switched off.
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=environment, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def hardware(world_size: int) -> dict[str, Any]:
    """Return processor, memory, accelerators, and the settings that decide in which order numbers are added."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(pages / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return named[1].strip() if named else platform.processor() or platform.machine()


def given_overrides() -> list[str]:
    """Return the overrides of the command line, none outside of Hydra."""
    if not HydraConfig.initialized():
        return []
    # As they were given: reading one would put in what its `${oc.env:NAME}` stands for.
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(overrides)


def _command() -> dict[str, Any]:
    """Return the command line, Hydra's overrides in it, its further config folders, and where it was given."""
    found: dict[str, Any] = {
        "line": masked_overrides(sys.argv),
        "folder": str(Path.cwd()),
        "overrides": [],
        "configs": [],
    }
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        found["overrides"] = masked_overrides(given_overrides())
        found["folder"] = hydra.runtime.cwd
        found["configs"] = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    return found
