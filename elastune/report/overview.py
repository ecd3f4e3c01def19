"""The top of the page: what was run, the main table, and what can be concluded from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from elastune.report import figures
from elastune.report.load import RunData
from elastune.report.markup import figure_grid, section
from elastune.report.quantities import TIMES, one_line, score_text, signed, space_size
from elastune.report.results import (
    AVERAGE,
    FEW_EXAMPLES,
    Column,
    System,
    Verdict,
    compare,
    reference,
    verdicts,
)
from elastune.report.tables import Cell, Header, main_table


def title(run: RunData) -> str:
    """Name the run: method and model, or the directory's name."""
    recipe = run.recipe or {}
    named = [one_line(recipe[key]) for key in ("method", "model") if recipe.get(key)]
    return " · ".join(named) or run.path.resolve().name


def heading(run: RunData, rows: Sequence[System]) -> str:
    """Write title, one sentence that tells the outcome, and the facts of the run."""
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(run)
    )
    lead = _lead(rows)
    return (
        f"<header><h1>{escape(title(run))}</h1>"
        + (f'<p class="lead">{escape(lead)}</p>' if lead else "")
        + (f'<dl class="facts">{facts}</dl>' if facts else "")
        + "</header>"
    )


def _facts(run: RunData) -> Iterable[tuple[str, str]]:
    recipe = run.recipe or {}
    for key in ("method", "model", "task"):
        value = _find(recipe, key)
        if value is not None:
            yield key, one_line(value)
    if "task" not in recipe and run.metrics:
        yield "task", ", ".join(dict.fromkeys(row["task"] for row in run.metrics["rows"]))
    if run.sparsity:
        share = f"{100 * run.sparsity['total']['sparsity']:.1f} %"
        how = [run.sparsity.get("method"), run.sparsity.get("pattern") or "unstructured"]
        yield "sparsity of the base", f"{share} ({', '.join(str(h) for h in how if h)})"
    elif _find(recipe, "sparsity") is not None:
        yield "sparsity", one_line(_find(recipe, "sparsity"))
    if run.space:
        dims = len(run.space["dims"])
        size = space_size(len(dim["choices"]) for dim in run.space["dims"])
        yield "search space", f"{size} sub-networks ({dims} dims)"
    if _find(recipe, "seed") is not None:
        yield "seed", one_line(_find(recipe, "seed"))
    stages = (run.manifest or {}).get("stages", {})
    finished = [str(row["finished"]) for row in stages.values() if row.get("finished")]
    if finished:
        yield "finished", max(finished).replace("T", " ")[:16]


def _find(recipe: Mapping[str, Any], key: str) -> Any:
    """The value of ``key`` in the recipe or in one of its sections."""
    if recipe.get(key) is not None:
        return recipe[key]
    inner = (part.get(key) for part in recipe.values() if isinstance(part, Mapping))
    return next((value for value in inner if value is not None), None)


def _lead(rows: Sequence[System]) -> str:
    results = [row for row in rows if not row.baseline]
    chosen = next((row for row in results if row.name == "best"), results[-1] if results else None)
    if chosen is None:
        return ""
    column = AVERAGE if AVERAGE in chosen.values else next(iter(chosen.values))
    on = "on average" if column == AVERAGE else f"on {column.task}"
    kind = "the best sub-network found" if chosen.name == "best" else f"sub-network {chosen.name}"
    text = f"{kind[0].upper()}{kind[1:]} reaches {_score(chosen, column)} {on}"
    dense = next((row for row in rows if row.name == "dense"), None)
    if dense is not None and chosen.nonzero and chosen.nonzero < dense.nonzero:
        fewer = f"{dense.nonzero / chosen.nonzero:.2f}{TIMES}"
        text += f" with {fewer} fewer non-zeros than the dense model"
    against = reference(rows)
    if against is not None and column in against.values:
        word = compare(chosen, against, column).word
        theirs = _score(against, column)
        told = {
            "within noise": f"within noise of {against.name} ({theirs})",
            "unknown": f"against {theirs} for {against.name}",
        }
        text += ", " + told.get(word, f"{word} than {against.name} ({theirs}) beyond noise")
    return text + "."


def _score(row: System, column: Column) -> str:
    unit = " %" if column.percent else ""
    return f"{column.full_text(row.values[column])}{unit} {column.metric}"


def results(run: RunData, rows: Sequence[System]) -> str:
    """Write the main table, the verdicts under it, and score against non-zeros."""
    if not run.metrics or not rows:
        return ""
    table = main_table(run.metrics)
    head = "".join(_head(header) for header in table.headers)
    bodies = ""
    for baseline, words in ((True, "baselines"), (False, "results")):
        lines = [row for row in table.rows if row[1] == baseline]
        if not lines:
            continue
        label = "Baselines" if baseline else "Sub-networks of the super-network"
        body = f'<tr class="group"><th colspan="{len(table.headers) + 1}">{label}</th></tr>'
        for name, _, cells in lines:
            body += f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, cells))}</tr>'
        bodies += f'<tbody class="{words}">{body}</tbody>'
    markup = (
        '<div class="scroll"><table class="main"><thead><tr><th scope="col">system</th>'
        f"{head}</tr></thead>{bodies}</table></div>"
        '<p class="note">± is one standard error. Bold: best sub-network of the column.</p>'
        + _verdicts(rows)
        + '<p class="note">Unstructured zeros save storage; they are not a speed-up on common '
        "runtimes. Latency appears only where it was measured, never inferred from sparsity. "
        "MACs are multiply-accumulates, not FLOPs.</p>"
    )
    return section("Results", markup + figure_grid(figures.score_scatters(rows)))


def _head(header: Header) -> str:
    note = f"<small>{escape(header.note)}</small>" if header.note else "<small>&nbsp;</small>"
    return f'<th scope="col">{escape(header.title)}{note}</th>'


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    text = f"<b>{text}</b>" if cell.best else text
    return f"<td>{text}{f' <small>± {escape(cell.error)}</small>' if cell.error else ''}</td>"


def _verdicts(rows: Sequence[System]) -> str:
    found = verdicts(rows)
    if not any(not row.baseline for row in rows):
        return ""
    if not found:
        return (
            '<p class="note">No baseline with plain LoRA on these tasks: whether the search for '
            "ranks helps cannot be told from this run.</p>"
        )
    lines: dict[str, list[str]] = {}
    for verdict in found:
        lines.setdefault(verdict.name, []).append(_verdict(verdict))
    items = "".join(
        f"<li><b>{escape(name)}</b>: {'; '.join(parts)}</li>" for name, parts in lines.items()
    )
    few = min(verdict.n for verdict in found)
    note = "In brackets: difference, and twice its standard error, which it must exceed to count."
    if few < FEW_EXAMPLES:
        note += f" With as few as {few} scored examples such a test means little."
    against = escape(found[0].reference)
    return (
        f"<p>Against <b>{against}</b>, is the difference more than noise?</p>"
        f'<ul class="verdicts">{items}</ul><p class="note">{note}</p>'
    )


def _verdict(verdict: Verdict) -> str:
    column = verdict.column
    task = "average" if column == AVERAGE else column.task
    if not column.percent:
        task = f"{task} {column.metric}"
    gap = signed(verdict.difference, percent=column.percent)
    unit = " points" if column.percent else ""
    if verdict.noise is None:
        return f"{escape(task)} unknown, no standard error ({gap}{unit})"
    style = {"within noise": "noise"}.get(verdict.word, verdict.word)
    noise = score_text(verdict.noise, percent=column.percent)
    return (
        f'{escape(task)} <span class="{style}">{verdict.word}</span> '
        f'<span class="quiet">({gap}{unit}, noise ±{noise})</span>'
    )
