"""From a benchmark's config to its work: which data sets, where they lie, and how each is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpretrain.data.redact import redact
from mmpretrain.errors import InputError
from mmpretrain.evaluation.results import Work, work

NAME, ROOT = "{name}", "{root}"
"""What a task's config says where the name and the place of the data set belong."""


def works_of(benchmark: Mapping[str, Any], tasks: Mapping[str, Any], device: str) -> list[Work]:
    """List the work of a benchmark: every task of `benchmark["tasks"]` on every one of `benchmark["data_sets"]`.

    `tasks`: name -> config of an evaluator, in which `{root}` and `{name}` stand for the data set. Both configs are
    without interpolations. Raises `InputError` where a task is unknown or folders are missing, all of them at once.
    """
    names, wanted = [_listed(benchmark[key]) for key in ("data_sets", "tasks")]
    for key, given in (("data_sets", names), ("tasks", wanted)):
        if not given:
            raise InputError(f"benchmark.{key} is empty; give at least one")
    if unknown := [task for task in wanted if task not in tasks]:
        raise InputError(f"benchmark.tasks={unknown} are not known; there are: {', '.join(tasks)}")
    roots = places(benchmark["root"], names)
    found = []
    for name, root in roots.items():
        shown = Path(redact(root)).name if name == "." else name
        for task in wanted:
            found.append(work(shown, task, _filled(tasks[task], {NAME: shown, ROOT: root}), device))
    return found


def places(root: str, names: Sequence[str]) -> dict[str, str]:
    """Find where data sets lie: name -> folder or address.

    An address has `{name}` where the name belongs, with `-` in place of `/`, as the clip-benchmark organisation of the
    Hugging Face hub calls its data sets. So may a folder; without it `wds_NAME` and `NAME` are looked for inside, and
    where there is only one data set it may be the folder itself, which the name `.` always is. Raises `InputError`
    listing all that are missing.
    """
    found, missing = {}, []
    if "." in names and NAME in root:
        raise InputError(f"benchmark_root={root} needs a name for {NAME}; give the folder: benchmark_root=FOLDER")
    for name in dict.fromkeys(names):
        plain = name.replace("/", "-")
        if "://" in root:
            found[name] = root.replace(NAME, plain)
            continue
        here = Path(root).expanduser()
        if NAME in root:
            tried = [Path(str(here).replace(NAME, spelling)) for spelling in (plain, name)]
        else:
            tried = [here / f"wds_{plain}", here / plain, here / name, *([here] if len(names) == 1 else [])]
        place = next((path for path in tried if path.is_dir()), None)
        if place is None:
            missing.append(name)
        else:
            found[name] = str(place.resolve())
    if missing:
        raise InputError(
            f"benchmark_root={root} lacks {len(missing)} of {len(names)} data sets: {', '.join(missing)}; expected "
            "folders such as wds_NAME that hold test/nshards.txt (huggingface.co/clip-benchmark has them), or choose "
            "others with benchmark.data_sets=[...]"
        )
    return found


def _listed(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _filled(config: Any, values: Mapping[str, str]) -> Any:
    if isinstance(config, dict):
        return {key: _filled(value, values) for key, value in config.items()}
    if isinstance(config, list):
        return [_filled(value, values) for value in config]
    for key, value in values.items() if isinstance(config, str) else ():
        config = config.replace(key, value)
    return config
