"""`mmpretrain diff RUN1 RUN2`: what differs between two runs, and from which step on."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mmpretrain.errors import EXIT_DONE, EXIT_FAILED, InputError
from mmpretrain.provenance import changes, comparable, read

MEASURED = re.compile(r"second|memory|(^|[/_])time")
"""Columns that depend on the clock, not on the run."""
SHOWN = 20  # differing keys printed of each part

Table = dict[int, dict[str, float]]


class Column(NamedTuple):
    """One column of two logs: the steps both have, and where they first differ (step and both values).

    `alone`: how many steps only the first, and only the second log has.
    """

    name: str
    steps: int
    step: int | None
    values: tuple[float, float] | None
    alone: tuple[int, int] = (0, 0)

    @property
    def line(self) -> str:
        """Say it in one line."""
        found = f"identical in {self.steps} steps"
        if self.values is not None:
            found = f"differs from step {self.step} on: {self.values[0]!r} and {self.values[1]!r}"
        return f"{self.name}: {found}{_alone(self.alone)}"


class Samples(NamedTuple):
    """The sample ids of two runs: the steps both logged, the first one that differs, and those only one has."""

    steps: int
    step: int | None
    alone: tuple[int, int] = (0, 0)

    @property
    def line(self) -> str:
        """Say it in one line."""
        found = f"identical in {self.steps} steps" if self.step is None else f"differ from step {self.step} on"
        return f"sample ids: {found}{_alone(self.alone)}"


class Difference(NamedTuple):
    """What `mmpretrain diff` says: changed keys of the manifests, final metrics side by side, and the logs."""

    runs: tuple[str, str]
    changed: dict[str, list[Any]]
    metrics: dict[str, list[float | None]]
    columns: list[Column]
    samples: Samples | None


def main(argv: Sequence[str]) -> int:
    """Run `mmpretrain diff ARGV`; returns 0 where the runs are equal, 1 where they differ."""
    parser = argparse.ArgumentParser(
        prog="mmpretrain diff",
        description="Say what differs between two runs: config, shards, packages, git, hardware, metrics, and the "
        "first step at which losses and samples do. Exit status: 0 nothing, 1 something, 2 wrong input.",
    )
    parser.add_argument("first", type=Path, metavar="RUN1", help="a run folder")
    parser.add_argument("second", type=Path, metavar="RUN2", help="another one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    found = difference(args.first, args.second)
    print(json.dumps(_plain(found)) if args.json else "\n".join(lines(found)))
    return EXIT_FAILED if _differs(found) else EXIT_DONE


def difference(first: Path, second: Path) -> Difference:
    """Compare two run folders; raises `InputError` where one of them is none."""
    before, after = (comparable(read(run)) for run in (first, second))
    one, two = _metrics(first), _metrics(second)
    metrics = {name: [one.get(name), two.get(name)] for name in {**one, **two}}
    columns = compare_logs(first, second)
    return Difference(
        (str(first), str(second)), changes(before, after), metrics, columns, compare_samples(first, second)
    )


def compare_logs(first: Path, second: Path, rtol: float = 0.0) -> list[Column]:
    """Compare each column of two `metrics.csv`, one of which may lack it; equal means within `rtol` of the larger."""
    one, two = _table(first), _table(second)
    found = []
    for name in dict.fromkeys(name for row in [*one.values(), *two.values()] for name in row):
        if MEASURED.search(name):
            continue
        before, after = ([step for step, row in table.items() if name in row] for table in (one, two))
        steps = [step for step in before if name in two.get(step, {})]
        pairs = ((step, one[step][name], two[step][name]) for step in steps)
        at = next(((step, a, b) for step, a, b in pairs if not _equal(a, b, rtol)), None)
        alone = (len(before) - len(steps), len(after) - len(steps))
        found.append(Column(name, len(steps), at and at[0], at and (at[1], at[2]), alone))
    return found


def compare_samples(first: Path, second: Path) -> Samples | None:
    """Compare two `samples.jsonl` step by step; None where no run has one (`debug.sample_log=true` writes it)."""
    paths = [run / "samples.jsonl" for run in (first, second)]
    if not any(path.is_file() for path in paths):
        return None
    one, two = (_ids(path) if path.is_file() else {} for path in paths)
    steps = sorted(one.keys() & two.keys())
    at = next((step for step in steps if one[step] != two[step]), None)
    return Samples(len(steps), at, (len(one) - len(steps), len(two) - len(steps)))


def lines(found: Difference) -> list[str]:
    """Say what differs, part by part."""
    said = []
    for part in dict.fromkeys(key.split(".")[0] for key in found.changed):
        keys = [key for key in found.changed if key.split(".")[0] == part]
        said.append(f"{part}:")
        said += [f"  {key.partition('.')[2]}: {_value(key, found)}" for key in keys[:SHOWN]]
        said += [f"  and {len(keys) - SHOWN} more"] if len(keys) > SHOWN else []
    said = said or ["config, shards, packages, git and hardware are the same"]
    different = _different(found.metrics)
    said.append(f"final metrics: {len(found.metrics) - len(different)} of {len(found.metrics)} the same")
    said += [f"  {name}: {pair[0]} -> {pair[1]}" for name, pair in different.items() if "/ci_" not in name]
    said += [column.line for column in found.columns]
    return said if found.samples is None else [*said, found.samples.line]


def _value(key: str, found: Difference) -> str:
    texts = (json.dumps(value) for value in found.changed[key])
    return " -> ".join(text if len(text) <= 80 else f"{text[:79]}…" for text in texts)


def _differs(found: Difference) -> bool:
    logs: list[Column | Samples] = [*found.columns, *([] if found.samples is None else [found.samples])]
    return bool(found.changed or _different(found.metrics)) or any(
        log.step is not None or log.alone != (0, 0) for log in logs
    )


def _different(metrics: Mapping[str, Sequence[float | None]]) -> dict[str, Sequence[float | None]]:
    """Return the final metrics that differ or that one run lacks, but for what the clock decides."""

    def same(one: float | None, two: float | None) -> bool:
        return one is not None and two is not None and _equal(one, two, 0.0)

    return {name: pair for name, pair in metrics.items() if not MEASURED.search(name) and not same(pair[0], pair[1])}


def _alone(counts: tuple[int, int]) -> str:
    return "".join(f"; {n} steps only in the {run} run" for n, run in zip(counts, ("first", "second")) if n)


def _plain(found: Difference) -> dict[str, Any]:
    logs = [
        {"column": c.name, "steps": c.steps, "step": c.step, "values": c.values, "alone": c.alone}
        for c in found.columns
    ]
    samples = None if found.samples is None else found.samples._asdict()
    return {**found._asdict(), "columns": logs, "samples": samples}


def _equal(a: float, b: float, rtol: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=rtol)


def _table(run: Path) -> Table:
    path = run / "metrics.csv"
    if not path.is_file():
        raise InputError(f"{run} holds no metrics.csv; give the folder of a run that has logged a step")
    try:
        # A last line without its end was cut by a kill; a number in it may be, too.
        text = path.read_bytes().decode()
        rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        return {int(r["step"]): {k: float(v) for k, v in r.items() if v and k != "step"} for r in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no table of numbers by step ({error}); it was changed or cut") from error


def _metrics(run: Path) -> dict[str, float]:
    path = run / "metrics.json"
    if not path.is_file():  # of a run that has not ended
        return {}
    try:
        return {name: float(value) for name, value in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no object of numbers ({error}); it was changed or cut") from error


def _ids(path: Path) -> dict[int, int]:
    """Return step -> a hash of its sample ids; a last line that was cut short is left out."""
    found: dict[int, int] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                entry = json.loads(line)
                found[int(entry["step"])] = xxhash.xxh3_64_intdigest(json.dumps(entry["ids"]).encode())
            except (ValueError, KeyError, TypeError):
                continue
    return found
