"""The main table once, written for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from elastune.report.layers import by_role
from elastune.report.quantities import DASH, SUPERSCRIPT, TIMES, cost_texts, count_texts
from elastune.report.results import (
    AVERAGE,
    Column,
    System,
    averaged,
    best_names,
    columns,
    footnotes,
    systems,
    with_average,
)
from elastune.report.trials import COST_TITLES, dims_of, from_search

_WIDE = 9
"""Columns above which a terminal's table has tasks as rows."""


@dataclass(frozen=True)
class Cell:
    """A number, its standard error where it has one, and whether it is the best of its column."""

    text: str
    error: str = ""
    best: bool = False

    @property
    def full(self) -> str:
        """The number with its standard error."""
        return f"{self.text} ± {self.error}" if self.error else self.text


@dataclass(frozen=True)
class Header:
    """A column's name and what its numbers are: metric or unit, and the sample size."""

    title: str
    note: str = ""
    sample: str = ""

    @property
    def full(self) -> str:
        """Name, unit and sample size on one line."""
        notes = ", ".join(note for note in (self.note, self.sample) if note)
        return f"{self.title} ({notes})" if notes else self.title


@dataclass(frozen=True)
class MainTable:
    """Headers, and per system a name, whether it is a baseline beside results, and its cells.

    ``notes`` are footnotes of tasks, with the mark that their headers bear.
    """

    headers: tuple[Header, ...]
    rows: tuple[tuple[str, bool, tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = ()

    @property
    def bold(self) -> str:
        """What bold means here."""
        some = any(baseline for _, baseline, _ in self.rows)
        return "best sub-network" if some else "best system"


def main_table(metrics: Mapping[str, Any]) -> MainTable:
    """Build the main table: scores ± standard error, then what each system costs.

    Raises:
        BadArtifact: a row of ``metrics`` lacks a field or is there twice.
    """
    rows = with_average(systems(metrics))
    scores = sorted(columns(rows), key=lambda column: column == AVERAGE)
    noted = footnotes(metrics)
    texts = list(dict.fromkeys(noted.values()))
    marks = {task: _mark(texts.index(text)) for task, text in noted.items()}
    made = [_score_column(rows, column, marks.get(column.task, "")) for column in scores]
    made += _cost_columns(rows)
    beside = any(not row.baseline for row in rows)
    body = (
        (row.name, row.baseline and beside, tuple(cells[place] for _, cells in made))
        for place, row in enumerate(rows)
    )
    notes = tuple(f"{_mark(place)} {text}" for place, text in enumerate(texts))
    return MainTable(tuple(header for header, _ in made), tuple(body), notes)


def _mark(place: int) -> str:
    return str(place + 1).translate(SUPERSCRIPT)


def _score_column(rows: Sequence[System], column: Column, mark: str) -> tuple[Header, list[Cell]]:
    best = best_names(rows, column)
    cells = []
    for row in rows:
        value = row.values.get(column)
        if value is None:
            cells.append(Cell(DASH))
            continue
        cells.append(Cell(column.text(value), column.error_text(value), row.name in best))
    return _score_header(rows, column, mark), cells


def _score_header(rows: Sequence[System], column: Column, mark: str) -> Header:
    arrow = "↑" if column.higher_is_better else "↓"
    note = f"{column.title}{' %' if column.percent else ''} {arrow}"
    if column == AVERAGE:
        return Header(column.task, note, f"{len(averaged(rows))} tasks")
    counts = sorted({row.values[column].n for row in rows if column in row.values})
    n = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,}{DASH}{counts[-1]:,}"
    return Header(f"{column.task}{mark}", note, f"n = {n}")


def _cost_columns(rows: Sequence[System]) -> list[tuple[Header, list[Cell]]]:
    made = [_count_column(rows, "params", "params")]
    made.append(_count_column(rows, "non-zeros", "nonzero"))
    dense = next((row for row in rows if row.name == "dense"), None)
    if dense is not None and any(row.nonzero < dense.nonzero for row in rows):
        fewer = [Cell(f"{dense.nonzero / row.nonzero:.2f}{TIMES}") for row in rows if row.nonzero]
        if len(fewer) == len(rows):
            made.append((Header("fewer", "vs dense"), fewer))
    made.append(_count_column(rows, "MACs", "macs"))
    for title, unit, name in (
        ("latency", "ms", "latency_ms"),
        ("decode", "ms a token", "decode_latency_ms"),
    ):
        values = [getattr(row, name) for row in rows]
        if any(value is not None for value in values):
            cells = [Cell(DASH if value is None else f"{value:,.1f}") for value in values]
            made.append((Header(title, unit), cells))
    seconds = [Cell(f"{row.seconds:,.1f}") for row in rows]
    made.append((Header("eval", "s"), seconds))
    return made


def _count_column(rows: Sequence[System], title: str, name: str) -> tuple[Header, list[Cell]]:
    prefix, texts = count_texts([getattr(row, name) for row in rows])
    return Header(title, prefix), [Cell(text) for text in texts]


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """Make the main table for a terminal: baselines dim, the best sub-network of a column bold.

    Raises:
        BadArtifact: a row of ``metrics`` lacks a field or is there twice.
    """
    main = main_table(metrics)
    table = Table(
        caption="\n".join([f"± is one standard error; bold: {main.bold}", *main.notes]),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    if len(main.headers) > _WIDE and len(main.rows) < len(main.headers):
        return _turned(table, main)
    table.add_column("system", no_wrap=True)
    for header in main.headers:
        lines = [line for line in (header.title, header.note, header.sample) if line]
        table.add_column(Text("\n".join(lines)), justify="right", overflow="fold")
    for place, (name, baseline, cells) in enumerate(main.rows):
        style = "dim" if baseline else ""
        texts = [Text(cell.full, style="bold" if cell.best else style) for cell in cells]
        turning = baseline and place + 1 < len(main.rows) and not main.rows[place + 1][1]
        table.add_row(Text(name, style=style), *texts, end_section=turning)
    return table


def _turned(table: Table, main: MainTable) -> Table:
    """Fill a table whose rows are the tasks, for those that would be too wide."""
    table.add_column("", overflow="fold")
    for name, baseline, _ in main.rows:
        table.add_column(Text(name, style="dim" if baseline else ""), justify="right")
    for place, header in enumerate(main.headers):
        title = " ".join(line for line in (header.title, header.note, header.sample) if line)
        cells = [row[2][place] for row in main.rows]
        texts = [Text(cell.full, style="bold" if cell.best else "") for cell in cells]
        table.add_row(Text(title), *texts)
    return table


def markdown_table(metrics: Mapping[str, Any]) -> str:
    """Write the main table as Markdown; baselines say so, the best sub-network is bold.

    Raises:
        BadArtifact: a row of ``metrics`` lacks a field or is there twice.
    """
    main = main_table(metrics)
    titles = [header.full for header in main.headers]
    lines = [_markdown_row(["system", *titles]), "|---|" + "---:|" * len(titles)]
    for name, baseline, cells in main.rows:
        texts = [f"**{cell.full}**" if cell.best else cell.full for cell in cells]
        lines.append(_markdown_row([f"{name} (baseline)" if baseline else name, *texts]))
    if main.notes:
        lines += ["", *(f"{note}  " for note in main.notes)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def search_table(search: Mapping[str, Any], names: Mapping[int, str] | None = None) -> Table:
    """Make a terminal table of a search's Pareto front: a row a member, cheapest first.

    Columns: the trial, its quality, and each cost that is known of a member, beside the objective
    in per cent of the largest sub-network that was tried. The best is bold.

    Args:
        search: what `SearchResult.to_dict` returns, or the content of ``search/trials.json``.
        names: of trials, by their number.
    """
    found = from_search(search, dims_of(None, [trial["config"] for trial in search["trials"]]))
    front = found.front if found is not None else []
    title = f"Pareto front: {len(front)} of {len(search['trials'])} trials"
    table = Table(title=Text(title), box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    if found is None or not front:
        return table
    table.add_column(found.quality, justify="right")
    made: list[tuple[list[str], list[float | None]]] = []
    for cost in (name for name in found.costs if any(name in p.costs for p in front)):
        prefix, texts = cost_texts(cost, [point.costs.get(cost) for point in front])
        shares = [found.relative(cost, point.costs.get(cost)) for point in front]
        unit = f"\n({prefix})" if prefix else ""
        table.add_column(Text(COST_TITLES[cost] + unit), justify="right")
        made.append((texts, shares if cost == found.cost else [None] * len(front)))
    for place, point in enumerate(front):
        name = (names or {}).get(point.number)
        cells = [f"{point.number} {name}" if name else str(point.number), f"{point.quality:.4f}"]
        for texts, shares in made:
            share = shares[place]
            cells.append(texts[place] if share is None else f"{texts[place]} {100 * share:5.1f} %")
        style = "bold" if point is found.best else ""
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def sparsity_table(sparsity: Mapping[str, Any]) -> Table:
    """Make a terminal table of a sparsity report (``base/sparsity.json``): one row a role.

    Columns: tensors, weights, zeros, sparsity in per cent of all weights of the role, and the
    lowest and highest sparsity of one tensor.
    """
    tensors = sparsity["tensors"]
    title = " ".join(str(sparsity[k]) for k in ("method", "pattern") if sparsity.get(k))
    table = Table(
        title=Text(f"zeros in the base model ({title})" if title else "zeros"), box=SIMPLE_HEAD
    )
    table.add_column("role", no_wrap=True)
    for header in ("tensors", "weights", "zeros", "sparsity %", f"lowest{DASH}highest %"):
        table.add_column(header, justify="right")
    for role, names in by_role(tensors).items():
        rows = [tensors[name] for name in names]
        weights, zeros = sum(map(_weights, rows)), sum(row["zeros"] for row in rows)
        low, high = min(r["sparsity"] for r in rows), max(r["sparsity"] for r in rows)
        table.add_row(
            Text(role),
            str(len(rows)),
            f"{weights:,}",
            f"{zeros:,}",
            f"{100 * zeros / max(weights, 1):.1f}",
            f"{100 * low:.1f}{DASH}{100 * high:.1f}",
        )
    table.add_section()
    total = sparsity["total"]
    figures = (f"{total['weights']:,}", f"{total['zeros']:,}", f"{100 * total['sparsity']:.1f}")
    table.add_row("total", str(len(tensors)), *figures, "")
    return table


def _weights(row: Mapping[str, Any]) -> int:
    count = 1
    for size in row["shape"]:
        count *= size
    return count
