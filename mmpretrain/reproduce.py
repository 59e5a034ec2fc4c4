"""`mmpretrain reproduce RUN`: run a run again, from its manifest, and compare what was logged."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from mmpretrain.composition import register_resolvers
from mmpretrain.data.cache import REMOTE, scheme_of
from mmpretrain.data.shards import Shard
from mmpretrain.diff import Column, Samples, compare_logs, compare_samples
from mmpretrain.distributed import run_id
from mmpretrain.errors import EXIT_DONE, EXIT_FAILED, InputError
from mmpretrain.initial import Source, check_identity, follow
from mmpretrain.provenance import changes, comparable, hardware, packages, read
from mmpretrain.secrets import HIDDEN, masked

OWN = ("run_dir", "resume")
"""Overrides that say where a run writes, not what it computes."""


def main(argv: Sequence[str]) -> int:
    """Run `mmpretrain reproduce ARGV`; returns 0 where the logs are equal, 1 where not, else what training returned."""
    parser = argparse.ArgumentParser(
        prog="mmpretrain reproduce",
        description="Run a run again, as its manifest.json describes it, and compare losses and samples step by step. "
        "Exit status: 0 identical, 1 different, 2 wrong input.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes, such as trainer.devices=1")
    parser.add_argument("--rtol", type=float, default=0.0, help="relative difference that counts as equal (default: 0)")
    args = parser.parse_args(argv)
    if args.rtol < 0:
        raise InputError(f"--rtol is {args.rtol}; give at least 0")
    return reproduce(args.run.resolve(), args.overrides, args.rtol)


def reproduce(run: Path, overrides: Sequence[str], rtol: float) -> int:
    """Check that everything is as it was, train again into `run_dir` or `RUN/reproduced/<time>`, and compare."""
    recorded = read(run)
    command = recorded["command"]
    folder = next((Path(o.partition("=")[2]) for o in overrides if o.startswith("run_dir=")), None)
    target = run / "reproduced" / run_id() if folder is None else folder.resolve()
    again = [o for o in command["overrides"] if o.lstrip("+~").partition("=")[0] not in OWN]
    given = [o for o in overrides if not o.startswith("run_dir=")]
    hidden = {key for key, _, value in (o.partition("=") for o in again) if HIDDEN in value}
    if unknown := sorted(hidden - {o.partition("=")[0] for o in given}):
        raise InputError(f"the manifest does not hold the secret value of {unknown[0]}; give it: {unknown[0]}=...")
    secret = {key: o for key, o in ((o.partition("=")[0], o) for o in given) if key in hidden}
    again = [secret.get(o.partition("=")[0], o) for o in again]
    given = [o for o in given if o not in secret.values()]
    elsewhere = any(_gives_data(o) for o in [*given, *secret.values()])
    with _inside(Path(command["folder"])):
        for line in differences(recorded, again) if _first_rank() else ():
            print(f"mmpretrain: warning: {line}", file=sys.stderr)
        if not elsewhere:
            check_shards(recorded)
        if recorded.get("init") and not any(o.startswith("init=") for o in given):
            check_identity(run, _composed(again, command["configs"])[1])
        configs = [word for path in command["configs"] for word in ("--config-dir", path)]
        status = _train([*configs, *again, *given, f"run_dir={target}"])
    if status != EXIT_DONE or not _first_rank():
        return status
    logs: list[Column | Samples] = [*compare_logs(run, target, rtol)]
    if not any(log.steps for log in logs):
        raise InputError(f"{run} and {target} have logged no step in common; nothing could be compared")
    samples = compare_samples(run, target)
    logs += [] if samples is None else [samples]
    other = list(other_shards(recorded, read(target)))
    for line in [*other, *(log.line for log in logs)]:
        print(line)
    # What only the new run has logged says nothing against it; what only the first has was not reproduced.
    equal = not other and all(log.step is None and not log.alone[0] for log in logs)
    print(f"{'reproduced' if equal else 'NOT reproduced'}: {run} by {target}")
    return EXIT_DONE if equal else EXIT_FAILED


def differences(recorded: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    """Name what is no longer as the manifest says: the config that the overrides make, packages and hardware."""
    before = comparable(recorded)
    config = resolved(overrides, recorded["command"]["configs"])
    now = {"config": {key: value for key, value in config.items() if key not in OWN}, "packages": packages()}
    parts = {part: before[part] for part in now}
    for key, (old, new) in changes(parts, now).items():
        yield f"{key} was {old!r}, now it is {new!r}"
    # The number of ranks is known only inside the run.
    here = {**hardware(1), "world_size": before["hardware"]["world_size"]}
    for key, (old, new) in changes(before["hardware"], here).items():
        yield f"hardware.{key} was {old!r}, now it is {new!r}"


def resolved(overrides: Sequence[str], configs: Sequence[str]) -> dict[str, Any]:
    """Compose the training config of the overrides as `mmpretrain train` would, resolved and without secrets."""
    return dict(masked(_composed(overrides, configs)[0]))


def _composed(overrides: Sequence[str], configs: Sequence[str]) -> tuple[DictConfig, list[Source]]:
    register_resolvers()
    GlobalHydra.instance().clear()
    further = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in configs)}]"] if configs else []
    with initialize_config_module("mmpretrain.configs", version_base="1.3"):
        config = compose("train", overrides=[*further, *overrides, "run_dir=."])
    return config, follow(config, overrides)


def check_shards(recorded: Mapping[str, Any]) -> None:
    """Raise `InputError` naming the first shard that is not the one the run has read.

    Left to the run itself are shards that are not there where it prepares its own data, and remote ones that cannot be
    read under the name the manifest has, which is without password and signature.
    """
    prepared = recorded["config"].get("data", {}).get("module", {}).get("prepare") is not None
    for source, found in recorded["shards"].items():
        for name, samples, _, digest in found["shards"]:
            try:
                shard = Shard(name)
            except InputError:
                if prepared or scheme_of(name) in REMOTE:
                    return
                raise
            if shard.digest != digest:
                raise InputError(
                    f"{source}: shard {name} is not the one the run has read ({len(shard)} samples with digest "
                    f"{shard.digest:.12}, then {samples} with {digest:.12}); give back the shard as it was"
                )


def other_shards(recorded: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Name, for each source, the first shard of two manifests, wherever it lies, that has not the same content."""
    for source in dict.fromkeys([*recorded["shards"], *new["shards"]]):
        one, two = (part["shards"].get(source, {"shards": []})["shards"] for part in (recorded, new))
        if len(one) != len(two):
            yield f"{source}: the run has read {len(one)} shards, this one {len(two)}"
        for (old, samples, _, digest), (name, now, _, other) in zip(one, two):
            if (samples, digest) != (now, other):
                yield (
                    f"{source}: shard {name} is not {old} as the run has read it ({now} samples with digest "
                    f"{other:.12}, then {samples} with {digest:.12})"
                )
                break


def _gives_data(override: str) -> bool:
    """Tell whether an override may change which shards are read."""
    return re.split(r"[./@:=]", override.lstrip("+~"), maxsplit=1)[0] in ("data", "experiment")


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in the folder the run was started in, where that still exists: paths may be relative to it."""
    if not folder.is_dir():
        yield
        return
    with contextlib.chdir(folder):
        yield


def _first_rank() -> bool:
    return int(getattr(rank_zero_only, "rank", None) or 0) == 0


def _train(arguments: list[str]) -> int:
    from mmpretrain.cli import main as command

    original = list(sys.argv)
    sys.argv = [original[0], "train", *arguments]  # further local ranks are started with this process's command line
    try:
        return command(sys.argv[1:])
    finally:
        sys.argv = original
