"""Numbers as text: one unit for a column, digits that the standard error supports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MINUS, DASH, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
NBSP = "\N{NO-BREAK SPACE}"
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def common_unit(values: Iterable[float]) -> tuple[float, str]:
    """Choose one (divisor, SI prefix) for a column, so that its numbers line up."""
    top = max((abs(value) for value in values), default=0.0)
    return next(((size, prefix) for size, prefix in UNITS if top >= size), (1.0, ""))


def count_texts(counts: Sequence[int]) -> tuple[str, list[str]]:
    """Format a column of counts in one unit and with the same decimals: (SI prefix, texts)."""
    divisor, prefix = common_unit(counts)
    if divisor == 1:
        return prefix, [f"{count:,}" for count in counts]
    decimals = 1 if max(counts) >= 100 * divisor else 2
    return prefix, [f"{count / divisor:,.{decimals}f}" for count in counts]


def cost_texts(cost: str, values: Sequence[float | None]) -> tuple[str, list[str]]:
    """Format a column of one cost: (unit prefix, texts), a dash for what is not known.

    Milliseconds (names that end so) keep their unit, counts share an SI prefix.
    """
    known = [value for value in values if value is not None]
    divisor, prefix = (1.0, "") if cost.endswith("_ms") else common_unit(known)
    decimals = 0 if divisor == 1 and not cost.endswith("_ms") else 2
    return prefix, [
        DASH if value is None else f"{value / divisor:,.{decimals}f}" for value in values
    ]


def score_text(
    score: float, *, percent: bool, beside: float | None = None, decimals: int | None = None
) -> str:
    """Format a score: per cent with one decimal, other metrics with the digits they need.

    ``beside`` is the number that sets the digits, so that an error matches its score; ``decimals``
    fixes them.
    """
    if not math.isfinite(score):
        return "\N{INFINITY}" if score == math.inf else "n/a"
    if percent:
        return f"{100 * score:.1f}".replace("-", MINUS)
    if decimals is not None:
        return f"{score:.{decimals}f}".replace("-", MINUS)
    size = abs(score if beside is None else beside)
    if size >= 1e5:
        return f"{score:.2e}"
    return f"{score:,.{2 if size >= 1 else 3}f}"


def signed(
    difference: float, *, percent: bool, beside: float | None = None, decimals: int | None = None
) -> str:
    """Format a difference with its sign, using a real minus; the rest as in ``score_text``."""
    text = score_text(abs(difference), percent=percent, beside=beside, decimals=decimals)
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
    if log10 < 6:
        return f"{round(10**log10):,}"
    return f"about 10{f'{log10:.0f}'.translate(SUPERSCRIPT)}"


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


def p_text(p: float) -> str:
    """Format a p-value: ``p = 0.24``, ``p = 0.013``, ``p < 0.001``."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.{2 if p >= 0.1 else 3}f}"


def is_number(value: Any) -> bool:
    """Tell whether ``value`` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
