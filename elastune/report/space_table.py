"""A search space for the terminal: what is elastic, in which steps, and what its ends cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from elastune.report.quantities import cost_texts
from elastune.space import SearchSpace

COSTS = ("params", "nonzero", "macs", "block_macs", "decode_macs")


def space_table(space: SearchSpace) -> Table:
    """List the dims, those of all layers that have the same choices on one line."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for dim in space.dims:
        name = re.sub(r"\d+", "*", dim.name)
        groups.setdefault((name, dim.kind, dim.choices), []).append(dim.name)
    table = Table(title=Text(repr(space)), box=SIMPLE_HEAD, pad_edge=False)
    for title in ("dims", "kind", "count", "choices", "which"):
        table.add_column(title, overflow="fold")
    for (name, kind, choices), names in groups.items():
        listed = ", ".join(map(str, choices))
        table.add_row(*map(Text, (name, kind, str(len(names)), listed, _which(names))))
    return table


def _which(names: Sequence[str]) -> str:
    """Name the layers of dims that are called alike, neighbours as a range: ``0-4, 7``."""
    numbers = [int(found[0]) for name in names if (found := re.findall(r"\d+", name))]
    if len(numbers) != len(names):
        return ""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def ends_table(ends: Mapping[str, Mapping[str, Any]], tokens: int) -> Table:
    """Show what sub-networks cost, each as a part of the first.

    Args:
        ends: name -> costs, those of `COSTS`.
        tokens: that MACs are counted for.
    """
    rows = list(ends.values())
    table = Table(title=Text(f"costs, MACs of {tokens} tokens"), box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("sub-network")
    columns = []
    for cost in (cost for cost in COSTS if any(row[cost] for row in rows)):
        prefix, texts = cost_texts(cost, [row[cost] for row in rows])
        table.add_column(Text(cost + (f" ({prefix})" if prefix else "")), justify="right")
        parts = [100 * row[cost] / (rows[0][cost] or 1) for row in rows]
        columns.append([f"{t} {p:5.1f} %" for t, p in zip(texts, parts, strict=True)])
    for place, name in enumerate(ends):
        table.add_row(name, *(column[place] for column in columns))
    return table
