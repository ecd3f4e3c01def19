"""The top of the page: what was run, the main table, and what can be concluded from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from elastune.report import figures
from elastune.report.load import RunData
from elastune.report.markup import figure_grid, section
from elastune.report.quantities import NBSP, TIMES, one_line, score_text, signed, space_size
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
    trained = one_line(recipe["task"]) if recipe.get("task") else ""
    scored = ", ".join(dict.fromkeys(r["task"] for r in (run.metrics or {}).get("rows", ())))
    if trained == scored and trained:
        yield "task", trained
    else:
        yield from ((k, v) for k, v in (("trained on", trained), ("scored on", scored)) if v)
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
    finished = [
        str(row.get("finished") or "") for row in stages.values() if row["status"] == "done"
    ]
    if any(finished):
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
    few = chosen.values[column].n
    return text + ("." if few >= FEW_EXAMPLES else f"; only {few} examples were scored.")


def _score(row: System, column: Column) -> str:
    unit = " %" if column.percent else ""
    number = f"{column.full_text(row.values[column])}{unit}".replace(" ", NBSP)
    return f"{number} {column.metric}"


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
        f'{_verdicts(rows)}<p class="note">{_remark(run)}</p>'
    )
    return section("Results", markup + figure_grid(figures.score_scatters(rows)))


def _remark(run: RunData) -> str:
    tokens = _find(run.recipe or {}, "macs_length")
    length = f" of a forward pass over {escape(str(tokens))} tokens" if tokens else ""
    return (
        "Unstructured zeros save storage; they are not a speed-up on common runtimes. Latency "
        "appears only where it was measured, never inferred from sparsity. "
        f"MACs are the multiply-accumulates{length}, not FLOPs."
    )


def _head(header: Header) -> str:
    notes = (header.note, header.sample)
    lines = "".join(f"<small>{escape(note) or '&nbsp;'}</small>" for note in notes)
    return f'<th scope="col">{escape(header.title)}{lines}</th>'


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
    compared = list(dict.fromkeys(verdict.column for verdict in found))
    head = "".join(f'<th scope="col">{_comparison(column)}</th>' for column in compared)
    cells = {(verdict.name, verdict.column): _verdict(verdict) for verdict in found}
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(cells.get((name, column), "<td></td>") for column in compared)
        + "</tr>"
        for name in dict.fromkeys(verdict.name for verdict in found)
    )
    few = min(verdict.n for verdict in found)
    note = "Difference ± twice its standard error, which it must exceed to count."
    if few < FEW_EXAMPLES:
        note += f" With as few as {few} scored examples such a test means little."
    return (
        f"<h3>Different from {escape(found[0].reference)} beyond noise?</h3>"
        f'<div class="scroll"><table class="verdicts"><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="note">{note}</p>'
    )


def _comparison(column: Column) -> str:
    name = "average" if column == AVERAGE else column.task
    unit = f"{column.metric}, points" if column.percent else column.metric
    return f"{escape(name)}<small>{escape(unit)}</small>"


def _verdict(verdict: Verdict) -> str:
    percent, noise = verdict.column.percent, verdict.noise
    # Both numbers with the digits of the larger one.
    size = max(abs(verdict.difference), noise or 0) * 10
    gap = signed(verdict.difference, percent=percent, beside=size)
    if noise is None:
        return f"<td>unknown <small>{gap}, no standard error</small></td>"
    style = verdict.word.replace("within ", "")
    spread = score_text(noise, percent=percent, beside=size)
    return f'<td><span class="{style}">{verdict.word}</span> <small>{gap} ± {spread}</small></td>'
