"""Every benchmark of the CPU set, one after the other, into `benchmarks/results/<date>-<hardware>.md`.

    python -m benchmarks [--only loader --only image_path] [--out FOLDER]

Each runs in a process of its own with `--json`. One that fails does not stop the others: its last lines go into the
result, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import OURS, markdown, note

# Name -> arguments that keep the whole set under 20 minutes on two cores.
SET: dict[str, list[str]] = {
    "image_path": [],
    "loader": ["--batch", "128"],
    "text_padding": [],
    "train_step": [],
    "contrastive_memory": [],
    "accumulation": [],
    "time_to_recall": ["--epochs", "6", "--steps", "110"],
}
OTHERS = ("shard_reader", "checkpoint", "vector_search")  # with --only
RESULTS = Path(__file__).with_name("results")
LONGEST = 900  # seconds of one benchmark


def measure(name: str, arguments: Sequence[str]) -> dict[str, Any] | str:
    """Run one benchmark and return what it found, or why it has nothing."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            printed, _ = process.communicate(timeout=LONGEST)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"it took longer than {LONGEST} seconds"
    if process.returncode:
        return f"it ended with {process.returncode}; run `python -m benchmarks.{name}` to see why"
    try:
        found: dict[str, Any] = json.loads(printed)
    except ValueError as error:
        return f"it printed something else than one JSON object ({error})"
    return found


def summary(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table for the README: one for each measured row."""
    lines = [f"| benchmark | measured | {OURS} | peer | ratio | must reach |", "| --- | --- | --- | --- | --- | --- |"]
    for name, report in found.items():
        for row in report["rows"]:
            target = "" if row["target"] is None else f"{row['target']:g}x{'' if row['met'] else ' (missed)'}"
            lines.append(
                f"| `{name}` | {row['name']} | {row['ours']:,.4g} {row['unit']} | {row['peer']:,.4g} {row['unit']} "
                f"({row['peer_name']}) | **{row['ratio']:.3g}x** | {target} |"
            )
    return lines


def page(found: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str], command: str) -> str:
    """Return the whole page of results."""
    machine = next(iter(found.values()))["machine"] if found else {"device": "unknown hardware", "cores": 0}
    lines = [f"# {datetime.date.today().isoformat()}, {machine['device']}, {machine['cores']} cores", ""]
    lines += [f"`{command}`. Medians over rounds in which both sides alternate.", ""]
    if found:
        lines += [*summary(found), ""]
    lines += [line for name, why in failed.items() for line in (f"**{name}** gave no result: {why}.", "")]
    for report in found.values():
        lines += [markdown(report).replace("### ", "## ", 1), ""]
    return "\n".join(lines)


def file_name(machine: Mapping[str, Any], only: Sequence[str]) -> str:
    """Return `<date>-<hardware>.md`, with the names of the benchmarks where it is not the whole set."""
    words = " ".join([f"{machine['device']} {machine['cores']} cores", *only]).lower()
    return f"{datetime.date.today().isoformat()}-{re.sub(r'[^a-z0-9_]+', '-', words).strip('-')}.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the set and write the page; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=[*SET, *OTHERS], help="run this one; may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the page")
    given = parser.parse_args(arguments)
    found, failed, begin = {}, {}, time.perf_counter()
    for name in given.only or SET:
        note(f"== {name} ({time.perf_counter() - begin:.0f} s so far)")
        result = measure(name, SET.get(name, []))
        if isinstance(result, str):
            failed[name] = result
            note(f"{name} gave no result: {result}")
        else:
            found[name] = result
            print(markdown(result), end="\n\n", flush=True)
    if found:
        given.out.mkdir(parents=True, exist_ok=True)
        target = given.out / file_name(next(iter(found.values()))["machine"], given.only or ())
        command = " ".join(["python -m benchmarks", *(f"--only {name}" for name in given.only or ())])
        target.write_text(page(found, failed, command))
        note(f"{time.perf_counter() - begin:.0f} s; results: {target}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
