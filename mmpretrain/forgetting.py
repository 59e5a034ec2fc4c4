"""`mmpretrain forgetting BEFORE AFTER...`: what fine-tuning gained on its task, and what it cost on the old one."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmpretrain.errors import EXIT_DONE, EXIT_FAILED, InputError
from mmpretrain.whole_file import write_whole

LIMIT = 0.01
"""How much of an old metric may be lost before that counts, in its own unit (a share: one point)."""

VERDICTS = {
    (True, True): "learned and kept",
    (True, False): "learned, but forgot",
    (False, True): "kept, but learned nothing",
    (False, False): "forgot, and learned nothing",
}
"""(better on the target task, nothing forgotten) -> verdict."""


class Change(NamedTuple):
    """One metric before and after; `low` and `high` are the ends of the interval after, None where there is none."""

    metric: str
    task: str
    before: float
    after: float
    low: float | None
    high: float | None
    lost: bool
    gained: bool

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before


class Comparison(NamedTuple):
    """What became of one model, and the verdict."""

    name: str
    changes: list[Change]
    verdict: str

    def mean(self, task: str) -> float:
        """Mean change of the metrics of a task (`old`, `target`); NaN where it has none."""
        found = [change.change for change in self.changes if change.task == task]
        return sum(found) / len(found) if found else math.nan


def main(argv: Sequence[str]) -> int:
    """Run `mmpretrain forgetting ARGV`; returns 0, with `--strict` 1 where something was forgotten."""
    parser = argparse.ArgumentParser(
        prog="mmpretrain forgetting",
        description="Compare metrics of a model before and after fine-tuning. Files are those that "
        "`mmpretrain evaluate` or a run (metrics.json) wrote, with the evaluators of both tasks.",
    )
    add = parser.add_argument
    add("before", type=Path, metavar="BEFORE", help="metrics of the model that fine-tuning began with")
    add("after", type=Path, nargs="+", metavar="AFTER", help="metrics of what came of it; several are compared")
    add("--old", action="append", required=True, metavar="METRIC", help="metric of the old task, or its beginning")
    add("--target", action="append", default=[], metavar="METRIC", help="likewise, of the task fine-tuned for")
    add("--limit", type=float, default=LIMIT, help=f"loss of an old metric that still is none (default: {LIMIT})")
    add("--strict", action="store_true", help="exit status 1 where something was forgotten")
    add("--html", type=Path, metavar="FILE", help="write a page")
    add("--json", type=Path, metavar="FILE", help="write the numbers")
    args = parser.parse_args(argv)
    if not args.limit >= 0:
        raise InputError(f"--limit {args.limit}: expected a loss from 0 up, such as {LIMIT}")
    before = read_metrics(args.before)
    found = [compare(str(path), before, read_metrics(path), args.old, args.target, args.limit) for path in args.after]
    show(found)
    if args.json is not None:
        write_whole(args.json, json.dumps([as_json(comparison) for comparison in found], indent=1) + "\n")
    if args.html is not None:
        write_whole(args.html, page(str(args.before), found, args.limit))
    forgotten = any(change.lost for comparison in found for change in comparison.changes)
    return EXIT_FAILED if forgotten and args.strict else EXIT_DONE


def read_metrics(path: Path) -> dict[str, float]:
    """Read name -> value from a JSON file of metrics, or from the run folder that holds one; without `val/`.

    Of a benchmark's JSON the metrics of its model, where it has one.
    """
    file = path / "metrics.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); give a JSON of `mmpretrain evaluate`") from error
    except ValueError as error:
        raise InputError(f"{file} holds no metrics ({error}); give a JSON of `mmpretrain evaluate`") from error
    models = content.get("models") if isinstance(content, dict) else None
    if isinstance(models, list) and len(models) != 1:
        raise InputError(f"{file} has the metrics of {len(models)} models; give a file of one: evaluate each alone")
    try:
        metrics = content if models is None else models[0]["metrics"]
        return {str(k).removeprefix("val/"): math.nan if v is None else float(v) for k, v in metrics.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file} holds no metrics ({error}); give a JSON of `mmpretrain evaluate`") from error


def compare(
    name: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
    old: Sequence[str],
    target: Sequence[str],
    limit: float = LIMIT,
) -> Comparison:
    """Compare the metrics of the old task and of the target, larger being better.

    An old metric is lost where it fell by more than `limit` and, if it has an interval, the value before lies above
    that. A target metric is gained where it rose, and the value before lies below its interval. Raises `InputError`
    for a metric that one side lacks.
    """
    changes = [_change(metric, "old", before, after, limit) for metric in chosen(old, before, after)]
    changes += [_change(metric, "target", before, after, limit) for metric in chosen(target, before, after)]
    learned = not target or any(change.gained for change in changes if change.task == "target")
    kept = not any(change.lost for change in changes)
    return Comparison(name, changes, VERDICTS[learned, kept])


def chosen(wanted: Sequence[str], before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """List the metrics that have these names, or a chance level and a name that begins with one of these."""
    found: list[str] = []
    for name in wanted:
        name = name.removeprefix("val/")
        named = (
            [name] if name in before else [m for m in before if m.startswith(f"{name}/") and f"{m}/chance" in before]
        )
        if not named:
            raise InputError(
                f"no metric {name!r} before; there are {', '.join(m for m in before if '/' in m) or 'none'}"
            )
        if missing := [metric for metric in named if metric not in after]:
            raise InputError(f"metric {missing[0]!r} is missing after; evaluate both models with the same evaluators")
        found += [metric for metric in named if metric not in found]
    return found


def _change(metric: str, task: str, before: Mapping[str, float], after: Mapping[str, float], limit: float) -> Change:
    then, now = before[metric], after[metric]
    low, high = after.get(f"{metric}/ci_low"), after.get(f"{metric}/ci_high")
    # NaN, of a model that broke, is a loss.
    lost = task == "old" and not (now >= then - limit or (high is not None and then <= high))
    gained = task == "target" and now > then and (low is None or then < low)
    return Change(metric, task, then, now, low, high, lost, gained)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values; NaN is null."""
    rows = [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in (change._asdict() for change in comparison.changes)
    ]
    means = {f"mean_change_{task}": comparison.mean(task) for task in ("old", "target")}
    known = {key: None if math.isnan(value) else value for key, value in means.items()}
    return {"name": comparison.name, "verdict": comparison.verdict, **known, "changes": rows}


def show(comparisons: Sequence[Comparison]) -> None:
    """Print one table for each model, and the verdict."""
    from rich.console import Console
    from rich.table import Table

    for comparison in comparisons:
        table = Table("task", "metric", "before, %", "after, %", "points", "", title=comparison.name)
        for c in comparison.changes:
            note = "lost" if c.lost else "gained" if c.gained else ""
            table.add_row(
                c.task, c.metric, f"{100 * c.before:.1f}", f"{100 * c.after:.1f}", f"{100 * c.change:+.1f}", note
            )
        console = Console()
        console.print(table)
        console.print(comparison.verdict, highlight=False)


def page(before: str, comparisons: Sequence[Comparison], limit: float) -> str:
    """Draw one self-contained HTML page, in the style of a run's report."""
    from mmpretrain.html_page import render

    template = Path(__file__).parent / "evaluation" / "forgetting.html.j2"
    return render(template, {}, before=before, comparisons=comparisons, limit=limit)
