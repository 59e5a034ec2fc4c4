"""One self-contained HTML page about a run: its numbers, its curves, what it finds and what it gets wrong.

The page asks the network for nothing, runs no script, and reads in light, in dark, on paper and on a phone.
"""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from PIL import Image

from mmpretrain.errors import InputError
from mmpretrain.evaluation import figures, wording
from mmpretrain.evaluation.gallery import QUERIES, Answers, Gallery, spread
from mmpretrain.html_page import render
from mmpretrain.whole_file import write_whole

__all__ = ["Gallery", "Report", "write_report"]

_SIBLINGS = ("ci_low", "ci_high", "chance")
# Metrics in 0..1 that read best as a percentage, besides those with a chance level.
_SHARES = ("recall", "mean_class_recall", "accuracy", "precision", "top")
_HEADLINES = ("recall@1", "top1", "accuracy", "exact_match")  # the number of its group that matters most
_PICTURE_SIZE = 128  # pixels on the longer side, twice what the page shows
_CURVES = (  # title, column (or first part of columns), unit, whether the axis starts at 0
    ("Loss", "loss", "", False),
    ("Logit scale", "logit_scale", "", False),
    ("Learning rate", "lr", "", False),
    ("Throughput", "samples_per_second", " samples/s", True),
)
_HEALTH = (  # likewise, of the panel that shows what is wrong before the loss does
    ("Gradient norm", "grad_norm", "", True),
    ("Logits", "logits", "", False),
    ("Temperature", "temperature", "", True),
    ("Embedding rank", "embedding_rank", "", True),
    ("Modality gap", "modality_gap", "", True),
)


class Report(NamedTuple):
    """What a report shows; parts that are empty or None are left out of the page.

    `metrics`: flat, as in metrics.json, with siblings `<key>/ci_low`, `<key>/ci_high` and `<key>/chance`.
    `history`: rows of metrics.csv, each with "step" and the columns known at that step.
    `card`: about the data set: "name", "licence", "attribution", "url", each optional.
    """

    title: str
    metrics: dict[str, float]
    history: list[dict[str, float]]
    config_yaml: str
    versions: dict[str, str]
    card: dict[str, str] | None
    gallery: Gallery | None


class Metric(NamedTuple):
    """A number with its confidence interval and chance level; `group` is the path before its name."""

    group: str
    name: str
    value: float
    low: float | None
    high: float | None
    chance: float | None

    @property
    def share(self) -> bool:
        """Whether it is a share of a whole, shown in percent."""
        numbers = [n for n in (self.value, self.low, self.high, self.chance) if n is not None and not math.isnan(n)]
        named = self.name.startswith(_SHARES) or self.chance is not None
        return named and all(0 <= number <= 1 for number in numbers)

    @property
    def times_chance(self) -> float | None:
        """How many times better than guessing; None where that says nothing."""
        if not self.share or not self.chance or not math.isfinite(self.value / self.chance):
            return None
        return self.value / self.chance

    def show(self, number: float | None) -> str:
        """Write `number` (the value or one of its siblings) in this metric's unit."""
        if number is None:
            return "–"
        return wording.percent(number) if self.share else wording.number(number)


class Curve(NamedTuple):
    """A drawing over the steps of training with its title and the same facts in words."""

    title: str
    svg: Markup
    summary: list[str]


class History(NamedTuple):
    """The drawings of a run, its last step and its median speed in samples per second, where known."""

    curves: list[Curve]
    health: list[Curve]
    steps: int | None
    speed: float | None


def write_report(path: Path, report: Report) -> None:
    """Write `report` to `path` as one HTML file that needs nothing else; an older file is replaced whole.

    Raises InputError where a metric is not a number, a row of the history has no step, or the gallery's parts
    do not fit together. A metric that is NaN is shown as such.
    """
    metrics = _metrics(report.metrics)
    page = render(
        Path(__file__).with_name("report.html.j2"),
        {name: getattr(wording, name) for name in ("words", "number", "times", "cosine")},
        report=report,
        groups=_groups(metrics),
        headlines=_headlines(metrics),
        history=_history(report.history),
        link=_link(report.card),
        **_gallery(report.gallery),
    )
    write_whole(path, page)


def _metrics(flat: dict[str, float]) -> list[Metric]:
    """Join each metric with its siblings, in the order given."""
    numbers = {}
    for key, value in flat.items():
        try:
            numbers[key] = math.nan if value is None else float(value)  # strict JSON writes null for NaN
        except (TypeError, ValueError):
            raise InputError(
                f"metric {key!r} is {value!r}; expected a number: flatten nested results, one number per key"
            ) from None
    found = []
    for key, value in numbers.items():
        parent, _, last = key.rpartition("/")
        if last in _SIBLINGS and parent in numbers:
            continue
        low, high, chance = (numbers.get(f"{key}/{sibling}") for sibling in _SIBLINGS)
        found.append(Metric(parent, last, value, low, high, chance))
    return found


def _groups(metrics: Sequence[Metric]) -> dict[str, list[Metric]]:
    """Gather metrics under the path they share, groups with a chance level first."""
    groups: dict[str, list[Metric]] = {}
    for metric in metrics:
        groups.setdefault(metric.group, []).append(metric)
    return dict(sorted(groups.items(), key=lambda item: all(metric.chance is None for metric in item[1])))


def _headlines(metrics: Sequence[Metric]) -> list[Metric]:
    """The metric that matters most of each group that has a chance level, three at most."""
    chosen = []
    for group in _groups(metrics).values():
        scored = [metric for metric in group if metric.chance is not None]
        scored.sort(key=lambda metric: _HEADLINES.index(metric.name) if metric.name in _HEADLINES else 99)
        chosen += scored[:1]
    return chosen[:3]


def _history(rows: Sequence[dict[str, float]]) -> History:
    """Draw each curve that the history has columns for."""
    for number, row in enumerate(rows):
        if not math.isfinite(row.get("step", math.nan)):
            raise InputError(
                f"row {number} of the report's history has no number 'step' but {sorted(row)}; expected one "
                "in every row: log the step with the metrics"
            )
    curves, health = (
        [curve for curve in (_curve(rows, *described) for described in panel) if curve.summary]
        for panel in (_CURVES, _HEALTH)
    )
    steps = max((int(row["step"]) for row in rows), default=None)
    speeds = [speed for _, speed in _known(rows, "samples_per_second") if math.isfinite(speed)]
    return History(curves, health, steps, statistics.median(speeds) if speeds else None)


def _known(rows: Sequence[dict[str, float]], column: str) -> list[tuple[float, float]]:
    """The steps at which a column has a value, and the values."""
    return [(row["step"], row[column]) for row in rows if row.get(column) is not None]


def _curve(rows: Sequence[dict[str, float]], title: str, name: str, unit: str, from_zero: bool) -> Curve:
    """Draw the columns called `name` or `name/...`; one that no row has gives an empty curve."""
    columns = [column for column in dict.fromkeys(c for row in rows for c in row) if name in column.split("/")]
    lines: dict[str, figures.Points] = {}
    summary = []
    for column in columns:
        label = wording.words(column.removeprefix(name + "/"))
        start = f"{label}: " if len(columns) > 1 else ""
        points = _known(rows, column)
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        if finite:
            lines[label] = ([step for step, _ in finite], [value for _, value in finite])
            summary.append(start + _in_words(lines[label], unit))
        if bad := len(points) - len(finite):
            summary.append(f"{start}{bad} of {len(points)} values are not finite numbers")
    if not lines:
        return Curve(title, Markup(), summary)
    description = f"{title} over training. {'; '.join(summary)}."
    return Curve(title, Markup(figures.curves(lines, name, description, from_zero)), summary)


def _in_words(points: figures.Points, unit: str) -> str:
    """Say where a curve begins, ends and is lowest and highest."""
    steps, values = points
    if len(values) == 1:
        return f"{wording.number(values[0])}{unit} at step {int(steps[0]):,}"
    return (
        f"{wording.number(values[0])} → {wording.number(values[-1])}{unit} "
        f"(lowest {wording.number(min(values))}, highest {wording.number(max(values))})"
    )


def _gallery(gallery: Gallery | None) -> dict[str, Any]:
    """What the page shows of the gallery, and the function that gives a picture's bytes."""
    if gallery is None:
        return {"gallery": None, "found": None, "map": None, "map_svg": "", "written": [], "source": None}
    found = Answers(gallery)
    places = found.map()
    label = (
        f"Map of {len(places.image)} pictures and their captions. The centres of the two kinds are "
        f"{wording.number(places.gap)} apart."
    )

    @cache
    def source(index: int) -> str:
        return _source(gallery.images[index])

    return {
        "gallery": gallery,
        "found": found,
        "map": places,
        "map_svg": Markup(figures.embedding_map(places, "map", label)),
        "written": spread(len(gallery.images), QUERIES) if gallery.generated is not None else [],
        "source": source,
    }


def _source(image: Image.Image) -> str:
    """Turn a picture into a small WebP as a data address, transparency over white as the model sees it."""
    shown = image.convert("RGBA" if image.has_transparency_data else "RGB")
    shown.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
    if shown.mode == "RGBA":
        shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    if max(shown.size) < _PICTURE_SIZE // 2:  # a tiny picture is enlarged here, lest the browser blur it
        factor = _PICTURE_SIZE // max(shown.size)
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    shown.save(file, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _link(card: dict[str, str] | None) -> str | None:
    """The data set's address, if it is one that is safe to click."""
    url = (card or {}).get("url") or ""
    return url if url.startswith(("https://", "http://")) else None
