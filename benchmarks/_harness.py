"""What every benchmark shares: rounds in which ours and the peer's alternate, medians, spread, and where it was run.

A benchmark compares the outputs of both sides first (`check`), then measures (`alternate`), then prints one `Report`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OURS = "mmpretrain"


class Row(NamedTuple):
    """One measured quantity: `ours` and `peer` hold one value for each round, in `unit`.

    `more_is_better`: samples/s, not seconds or bytes. `target`: the ratio that must be reached.
    """

    name: str
    unit: str
    ours: list[float]
    peer: list[float]
    peer_name: str
    more_is_better: bool = True
    target: float | None = None

    @property
    def ratios(self) -> list[float]:
        """How many times better ours is, in each round."""
        pairs = zip(self.ours, self.peer, strict=True)
        return [ours / peer if self.more_is_better else peer / ours for ours, peer in pairs]

    @property
    def ratio(self) -> float:
        """The median over rounds."""
        return statistics.median(self.ratios)

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of a row."""
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": statistics.median(self.ours),
            "peer": statistics.median(self.peer),
            "peer_name": self.peer_name,
            "ratio": self.ratio,
            "spread": [min(self.ratios), max(self.ratios)],
            "target": self.target,
            "met": None if self.target is None else self.ratio >= self.target,
        }


class Report(NamedTuple):
    """A whole benchmark: `checked` names what was compared between both sides, with the largest difference found."""

    name: str
    rows: list[Row]
    checked: dict[str, float]
    packages: Sequence[str]
    settings: dict[str, Any]
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """Return one object with everything."""
        return {
            "benchmark": self.name,
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "versions": versions(self.packages),
            "settings": self.settings,
            "checked": self.checked,
            "rows": [row.as_json() for row in self.rows],
            "notes": list(self.notes),
        }

    def markdown(self) -> str:
        """Return the table and the lines around it."""
        return markdown(self.as_json())


def markdown(found: Mapping[str, Any]) -> str:
    """Render what `Report.as_json` gave."""
    here = found["machine"]
    compared = "; ".join(f"{what} {value:.3g}" for what, value in found["checked"].items())
    lines = [
        f"### {found['benchmark']}",
        "",
        *([f"Checked first: {compared}.", ""] if compared else []),
        f"| | {OURS} | peer | ratio (median, spread) | must reach |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        low, high = row["spread"]
        target = "" if row["target"] is None else f"{row['target']:g} {'' if row['met'] else '(missed)'}".strip()
        lines.append(
            f"| {row['name']} | {row['ours']:,.4g} {row['unit']} "
            f"| {row['peer']:,.4g} {row['unit']} ({row['peer_name']}) "
            f"| **{row['ratio']:.3g}x** ({low:.3g} to {high:.3g}) | {target} |"
        )
    lines += ["", *found["notes"], *([""] if found["notes"] else [])]
    settings = ", ".join(f"{key} {value}" for key, value in found["settings"].items())
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += [
        f"{found['date']}, {here['device']}, {here['cores']} cores, {here['threads']} threads; {settings}; {packages}."
    ]
    return "\n".join(lines)


def parser(description: str | None, rounds: int = 5, threads: int | None = None) -> argparse.ArgumentParser:
    """Make the parser with what every benchmark takes: --rounds, --threads, --json."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="times that both sides are measured in turn")
    made.add_argument("--threads", type=int, default=threads or cores(), help="threads of torch")
    made.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return made


def check(checked: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Refuse to go on where the sides differ: what was compared -> (difference found, largest allowed)."""
    for what, (found, allowed) in checked.items():
        if not found <= allowed:
            raise SystemExit(f"both sides do not compute the same: {what} {found:.3g}, allowed {allowed:.3g}")
    return {what: found for what, (found, _) in checked.items()}


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Call each side in turn, `warm_up` + `rounds` times; a call returns what it measured."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warm_up, rounds):
        # Who goes first changes with the round, so that neither side always gets the warmer machine.
        for name in list(sides) if turn % 2 else list(sides)[::-1]:
            value = sides[name]()
            if turn >= 0:
                found[name].append(value)
    return found


def seconds(work: Callable[[], object], repeat: int = 1) -> float:
    """Time one call, as the mean of `repeat`; on a GPU the call must synchronise itself."""
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    return (time.perf_counter() - start) / repeat


def finish(report: Report, as_json: bool) -> None:
    """Print the report."""
    print(json.dumps(report.as_json()) if as_json else report.markdown())


def note(line: str) -> None:
    """Say on stderr what is under way."""
    print(line, file=sys.stderr, flush=True)


def cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Describe the processor, or the GPU where there is one."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Look up the installed versions of distributions."""
    return {name: importlib.metadata.version(name) for name in packages}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
