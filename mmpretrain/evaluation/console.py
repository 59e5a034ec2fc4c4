"""Metrics on a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table


def show(metrics: Mapping[str, float]) -> None:
    """Print the metrics that have a chance level as a short table."""
    table = Table("metric", "value", "95 % interval", "chance")
    for name, value in metrics.items():
        if f"{name}/chance" in metrics:
            low, high = metrics[f"{name}/ci_low"], metrics[f"{name}/ci_high"]
            table.add_row(name, f"{value:.1%}", f"{low:.1%} to {high:.1%}", f"{metrics[f'{name}/chance']:.1%}")
    if table.row_count:
        Console().print(table)
