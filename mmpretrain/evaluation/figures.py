"""The report's drawings as inline SVG whose colours follow the page, so that they read in light and in dark.

Figures are drawn with matplotlib's object interface and no global settings, so that any thread may draw them.
They carry no text from the data: a caption in a script the font lacks would warn, and `$` would be read as
mathematics.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from mmpretrain.evaluation.gallery import Map

# Drawn colour -> CSS variable of report.html.j2: unlikely colours stand in for the variables.
_INK, _MUTED, _GRID = "#0a0b01", "#0a0b02", "#0a0b03"
_SERIES = ("#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14", "#0a0b15", "#0a0b16")
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, start=1)},
}
_STYLES = ("-", "--", "-.", ":")  # lines differ by more than colour

Points = tuple[Sequence[float], Sequence[float]]
"""Steps and the value at each."""

Range = tuple[float, float, float]
"""A value and the ends of its interval, which are the value itself where no interval is known."""


def curves(series: Mapping[str, Points], name: str, label: str, from_zero: bool = False) -> str:
    """Draw values over steps, a line per name of `series`; returns SVG whose ids begin with `name`."""
    figure, axes = _figure(4.4, 2.5)
    for number, (line, (steps, values)) in enumerate(series.items()):
        colour, style = _SERIES[number % len(_SERIES)], _STYLES[number % len(_STYLES)]
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, style, color=colour, marker=marker, linewidth=1.6, label=line)
    axes.set_xlabel("step", color=_MUTED, fontsize=9)
    every = {step for steps, _ in series.values() for step in steps}
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True) if len(every) > 1 else FixedLocator(list(every)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    if from_zero:
        axes.set_ylim(bottom=0)
    if len(series) > 1:
        for text in axes.legend(frameon=False, fontsize=9, labelcolor=_INK).get_texts():
            text.set_parse_math(False)
    return _svg(figure, name, label)


def scores(values: Mapping[str, Range], chance: float | None, name: str, label: str) -> str:
    """Draw a value with its interval for each name of `values`, the first on top, and the chance level; returns SVG."""
    figure, axes = _figure(4.4, 0.7 + 0.24 * len(values))
    for number, (value, low, high) in enumerate(values.values()):
        axes.plot((low, high), (-number, -number), color=_SERIES[0], linewidth=1.6)
        axes.plot((value,), (-number,), "o", color=_SERIES[0], markersize=5)
    _chance(axes.axvline, chance)
    axes.yaxis.set_major_locator(FixedLocator([-number for number in range(len(values))]))
    axes.set_yticklabels(list(values), color=_INK)
    axes.set_ylim(0.6 - len(values), 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    return _svg(figure, name, label)


def progress(runs: Mapping[str, Mapping[int, Range]], chance: float | None, name: str, label: str) -> str:
    """Draw a value over steps with its interval as a band, a line per run, and the chance level; returns SVG."""
    figure, axes = _figure(4.4, 2.5)
    for number, (run, points) in enumerate(runs.items()):
        colour, style = _SERIES[number % len(_SERIES)], _STYLES[number % len(_STYLES)]
        values, lows, highs = zip(*points.values())
        axes.fill_between(list(points), lows, highs, color=colour, alpha=0.18, linewidth=0)
        axes.plot(list(points), values, style, color=colour, marker="o", markersize=3, linewidth=1.6, label=run)
    _chance(axes.axhline, chance)
    axes.set_xlabel("step", color=_MUTED, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    return _svg(figure, name, label)


def _chance(line: Callable[..., Any], chance: float | None) -> None:
    if chance is not None:
        line(chance, color=_SERIES[1], linewidth=1.2, linestyle=":")


def embedding_map(embeddings: Map, name: str, label: str) -> str:
    """Draw pictures and captions in the plane, each pair joined by a line; returns SVG."""
    figure, axes = _figure(4.4, 3.4)
    image, text = embeddings.image.tolist(), embeddings.text.tolist()
    for (x, y), (u, v) in zip(image, text):
        axes.plot((x, u), (y, v), color=_GRID, linewidth=0.8, zorder=1)
    for points, colour, marker, what in (
        (image, _SERIES[0], "o", "picture"),
        (text, _SERIES[1], "^", "caption"),
    ):
        x, y = zip(*points)
        axes.scatter(x, y, s=15, c=colour, marker=marker, alpha=0.8, linewidths=0, label=what, zorder=2)
    for axis, share, number in (
        (axes.xaxis, embeddings.variance[0], 1),
        (axes.yaxis, embeddings.variance[1], 2),
    ):
        axis.set_label_text(f"component {number} ({share:.0%} of variance)", color=_MUTED, fontsize=9)
        axis.set_ticks([])
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=_INK, handletextpad=0.1)
    return _svg(figure, name, label)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """Make a transparent figure of `width` x `height` inches with one plain pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.tick_params(color=_GRID, labelcolor=_MUTED, labelsize=9)
    return figure, axes


def _svg(figure: Figure, name: str, label: str) -> str:
    """Write a figure as an SVG element for inside a page: own ids, the page's colours, a text alternative."""
    file = io.StringIO()
    figure.savefig(file, format="svg")
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # The metadata hold a date and web addresses; the style sheet would reach the whole page.
    drawn = re.sub(r"<(metadata|style)\b.*?</\1>", "", drawn, flags=re.DOTALL)
    # matplotlib's ids are random or repeat from one figure to the next: number them, each is once on a page.
    number = {old: f"{name}-{new}" for new, old in enumerate(re.findall(r'\bid="([^"]+)"', drawn))}
    drawn = re.sub(r'(\bid="|href="#|url\(#)([^")]+)', lambda match: match[1] + number.get(match[2], match[2]), drawn)
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, variable)
    head = f'<svg role="img" aria-label="{html.escape(label)}"'
    return re.sub(r'^<svg([^>]*?) width="[^"]*"([^>]*?) height="[^"]*"|^<svg', head + r"\1\2", drawn, count=1)
