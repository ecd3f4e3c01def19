"""Numbers as text: one unit for a column, digits that the standard error supports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

MINUS = "\N{MINUS SIGN}"
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def common_unit(values: Iterable[float]) -> tuple[float, str]:
    """Choose one (divisor, SI prefix) for a column, so that its numbers line up."""
    top = max((abs(value) for value in values), default=0.0)
    return next(((size, prefix) for size, prefix in UNITS if top >= size), (1.0, ""))


def scaled(value: float, divisor: float) -> str:
    """Format ``value / divisor`` with one decimal for large and two for small numbers."""
    if divisor == 1:
        return f"{value:,.0f}"
    number = value / divisor
    return f"{number:,.1f}" if abs(number) >= 100 else f"{number:,.2f}"


def score_text(score: float, *, percent: bool) -> str:
    """Format a score: per cent with one decimal, other metrics with the digits they need."""
    if not math.isfinite(score):
        return "\N{INFINITY}" if score == math.inf else "n/a"
    if percent:
        return f"{100 * score:.1f}"
    if abs(score) >= 1e5:
        return f"{score:.2e}"
    return f"{score:,.{2 if abs(score) >= 1 else 3}f}"


def signed(difference: float, *, percent: bool) -> str:
    """Format a difference with its sign, using a real minus."""
    text = score_text(abs(difference), percent=percent)
    return ("+" if difference >= 0 else MINUS) + text


def duration(seconds: float) -> str:
    """Format a duration for reading: ``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def space_size(choices: Iterable[int]) -> str:
    """Format the number of sub-networks: exact when small, a power of ten when not."""
    log10 = sum(math.log10(max(count, 1)) for count in choices)
    return f"{round(10**log10):,}" if log10 < 6 else f"about 10^{log10:.0f}"


def one_line(value: Any) -> str:
    """Spell a recipe value on one line: a mapping by its name-like field or as ``a: 1, b: 2``."""
    if isinstance(value, Mapping):
        inner = value.get("name") or value.get("path")
        if inner is not None:
            return str(inner)
        return ", ".join(f"{key}: {one_line(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(one_line(item) for item in value)
    return str(value)
