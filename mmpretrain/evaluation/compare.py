"""One self-contained HTML page that compares models, and checkpoints of a run, on what a suite measured.

Like a run's report it asks the network for nothing and runs no script; drawings carry letters and numbers, no text
from the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from markupsafe import Markup

from mmpretrain.evaluation import figures, wording
from mmpretrain.evaluation.report import Metric
from mmpretrain.evaluation.tables import Row
from mmpretrain.html_page import render
from mmpretrain.whole_file import write_whole

HEADLINES = ("top1", "mean_average_precision", "recall@1", "accuracy", "cider", "exact_match")
"""The numbers that stand for their group, the first that is there."""
MOST_DRAWN = 24
"""Models that one drawing of intervals holds."""


class Model(NamedTuple):
    """A model of the page: the letter it is called by in drawings, its name, run and step, what identifies it."""

    letter: str
    name: str
    run: str | None
    step: int | None
    identity: str


class Line(NamedTuple):
    """A row of a table: what is measured, and the number of each model, None where it has none."""

    data_set: str
    task: str
    metric: str
    cells: list[Metric | None]

    @property
    def best(self) -> int | None:
        """The only model with the highest number, where that means better and there are several to compare."""
        known = [cell.value for cell in self.cells if cell is not None and (cell.chance, cell.low) != (None, None)]
        if len(known) < 2 or known.count(max(known)) > 1:
            return None
        return next(i for i, cell in enumerate(self.cells) if cell is not None and cell.value == max(known))


class Drawing(NamedTuple):
    """A figure with its title and the same facts in words."""

    title: str
    svg: Markup
    summary: list[str]


def write_comparison(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Write the page of `rows` to `path`; an older file is replaced whole."""
    models, lines = _models(rows), _lines(rows)
    heads = headlines(lines)
    runs = _runs(models)
    page = render(
        Path(__file__).with_name("comparison.html.j2"),
        {"words": wording.words},
        title=title,
        models=models,
        headlines=heads,
        averages=_averages(heads),
        runs=runs,
        progress=_progress(heads, models, runs),
        drawings=_drawings(heads, models) if len(models) <= MOST_DRAWN else [],
        groups=_groups(lines),
    )
    write_whole(path, page)


def headlines(lines: Sequence[Line]) -> list[Line]:
    """Choose the line of each group (data set, task, and what stands before a metric's name) that matters most."""
    chosen: dict[tuple[str, str, str], Line] = {}
    for line in lines:
        if all(cell is None or (cell.chance, cell.low) == (None, None) for cell in line.cells):
            continue
        group = (line.data_set, line.task, line.metric.rpartition("/")[0])
        if group not in chosen or _order(line) < _order(chosen[group]):
            chosen[group] = line
    return list(chosen.values())


def _order(line: Line) -> int:
    last = line.metric.rpartition("/")[2]
    return HEADLINES.index(last) if last in HEADLINES else len(HEADLINES)


def _models(rows: Sequence[Row]) -> list[Model]:
    known = dict.fromkeys((row.model, row.run, row.step, row.identity) for row in rows)
    return [Model(_letter(number), *about) for number, about in enumerate(known)]


def _letter(number: int) -> str:
    """Count A to Z, then AA, AB and so on."""
    before, rest = divmod(number, len(ascii_uppercase))
    return (_letter(before - 1) if before else "") + ascii_uppercase[rest]


def _lines(rows: Sequence[Row]) -> list[Line]:
    columns = {name: number for number, name in enumerate(dict.fromkeys(row.model for row in rows))}
    lines: dict[tuple[str, str, str], Line] = {}
    for row in rows:
        what = (row.data_set, row.task, row.metric)
        line = lines.setdefault(what, Line(*what, [None] * len(columns)))
        parent, _, last = row.metric.rpartition("/")
        line.cells[columns[row.model]] = Metric(parent, last, row.value, row.low, row.high, row.chance)
    return list(lines.values())


def _groups(lines: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.data_set, line.task), []).append(line)
    return groups


def _averages(heads: Sequence[Line]) -> list[Line]:
    """Average each metric over the data sets that have it, where there are several; without an interval."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in heads:
        groups.setdefault((line.task, line.metric), []).append(line)
    found = []
    for (task, metric), own in groups.items():
        columns = [[cell for cell in column if cell is not None] for column in zip(*(line.cells for line in own))]
        if len(own) < 2 or any(len(column) < len(own) for column in columns):
            continue
        cells: list[Metric | None] = [_mean(column) for column in columns]
        found.append(Line(f"average of {len(own)} data sets", task, metric, cells))
    return found


def _mean(cells: Sequence[Metric]) -> Metric:
    chances = [cell.chance for cell in cells if cell.chance is not None]
    chance = sum(chances) / len(cells) if len(chances) == len(cells) else None
    return Metric(cells[0].group, cells[0].name, sum(cell.value for cell in cells) / len(cells), None, None, chance)


def _runs(models: Sequence[Model]) -> dict[str, str]:
    """Number the runs of which several steps are there: name of the run -> what drawings call it."""
    steps: dict[str, set[int]] = {}
    for model in models:
        if model.run is not None and model.step is not None:
            steps.setdefault(model.run, set()).add(model.step)
    several = [run for run, own in steps.items() if len(own) > 1]
    return {run: f"run {number}" for number, run in enumerate(several, start=1)}


def _progress(heads: Sequence[Line], models: Sequence[Model], runs: Mapping[str, str]) -> list[Drawing]:
    found = []
    for number, line in enumerate(heads if runs else ()):
        points: dict[str, dict[int, figures.Range]] = {}
        for model, cell in sorted(zip(models, line.cells, strict=True), key=lambda pair: pair[0].step or 0):
            run = runs.get(model.run or "")
            if run is not None and model.step is not None and cell is not None:
                points.setdefault(run, {})[model.step] = _range(cell)
        summary = [f"{run}: {_first_and_last(own, line)}" for run, own in points.items()]
        title = _title(line)
        label = f"{title} over training. {'; '.join(summary)}."
        svg = figures.progress(points, _chance(line), f"progress{number}", label)
        found.append(Drawing(title, Markup(svg), summary))
    return found


def _first_and_last(points: Mapping[int, figures.Range], line: Line) -> str:
    show = next(cell for cell in line.cells if cell is not None).show
    steps = list(points)
    first, last = steps[0], steps[-1]
    begin, end = points[first], points[last]
    return f"{show(begin[0])} at step {first:,} → {show(end[0])} at step {last:,}"


def _drawings(heads: Sequence[Line], models: Sequence[Model]) -> list[Drawing]:
    found = []
    for number, line in enumerate(heads):
        known = {model.letter: cell for model, cell in zip(models, line.cells, strict=True) if cell is not None}
        summary = [" · ".join(f"{letter} {cell.show(cell.value)}" for letter, cell in known.items())]
        title = _title(line)
        ranges = {letter: _range(cell) for letter, cell in known.items()}
        svg = figures.scores(ranges, _chance(line), f"scores{number}", f"{title}: {summary[0]}.")
        found.append(Drawing(title, Markup(svg), summary))
    return found


def _range(cell: Metric) -> figures.Range:
    return (
        cell.value,
        cell.value if cell.low is None else cell.low,
        cell.value if cell.high is None else cell.high,
    )


def _chance(line: Line) -> float | None:
    """The chance level, where it is the same for every model."""
    levels = {cell.chance for cell in line.cells if cell is not None}
    return levels.pop() if len(levels) == 1 else None


def _title(line: Line) -> str:
    return " · ".join(filter(None, (line.data_set, wording.words(line.task), wording.words(line.metric))))
