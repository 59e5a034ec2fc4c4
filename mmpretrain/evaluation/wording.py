"""How the report writes names and numbers."""

from __future__ import annotations

import math


def words(name: str) -> str:
    """Write a name of the code for people: "val/text_to_image" as "val · text → image"."""
    return name.replace("_to_", " → ").replace("_", " ").replace("/", " · ")


def number(value: float) -> str:
    """Write a number with four significant digits, and what is not one as such."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    return (f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}").replace("-", "−")


def percent(value: float) -> str:
    """Write a share in percent; small ones keep two significant digits."""
    if math.isnan(value):
        return number(value)
    return f"{value:.2%}" if 0 < value < 0.01 else f"{value:.1%}"


def times(value: float) -> str:
    """Write a multiple of chance."""
    return f"{value:,.0f}×" if value >= 10 else f"{value:.1f}×"


def cosine(value: float) -> str:
    """Write a similarity with two decimals."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # + 0.0: no minus before zero
