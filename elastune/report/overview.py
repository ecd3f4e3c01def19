"""The top of the page: what was run, the main table, and what can be concluded from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from elastune.report import figures
from elastune.report.load import RunData
from elastune.report.markup import figure_grid, section
from elastune.report.quantities import NBSP, TIMES, one_line, p_text, space_size
from elastune.report.results import (
    AVERAGE,
    FEW_EXAMPLES,
    Column,
    System,
    averaged,
    contenders,
)
from elastune.report.tables import Cell, Header, MainTable, main_table
from elastune.report.verdicts import Verdict, compare, opponents, verdicts


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
    lead = _lead(run, rows)
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
    if run.sparsity and not run.sparsity["total"]["sparsity"]:
        pass  # nothing to tell of a dense base
    elif run.sparsity:
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


def _lead(run: RunData, rows: Sequence[System]) -> str:
    chosen = _chosen(rows)
    if chosen is None:
        return ""
    most = 2 * len(averaged(rows)) > len(chosen.first)
    column = AVERAGE if AVERAGE in chosen.values and most else chosen.first[0]
    on = "on average" if column == AVERAGE else f"on {column.task}"
    kind = "the best sub-network found" if chosen.name == "best" else f"sub-network {chosen.name}"
    kind = chosen.name if chosen.baseline else f"{kind[0].upper()}{kind[1:]}"
    text = f"{kind} reaches {_score(chosen, column)} {on}"
    dense = next((row for row in rows if row.name == "dense"), None)
    if dense is not None and chosen.nonzero and 0 < chosen.nonzero < dense.nonzero:
        fewer = f"{dense.nonzero / chosen.nonzero:.2f}{TIMES}"
        text += f" with {fewer} fewer non-zeros than the dense model"
    against = next((other for row, other in opponents(rows) if row is chosen), None)
    if against is not None and column in against.values:
        word = compare(chosen, against, column, run.predictions).word
        theirs = _score(against, column)
        told = {
            "within noise": f"within noise of {against.name} ({theirs})",
            "unknown": f"against {theirs} for {against.name}",
        }
        text += ", " + told.get(word, f"{word} than {against.name} ({theirs}) beyond noise")
    few = chosen.values[column].n
    return text + ("." if few >= FEW_EXAMPLES else f"; only {few} examples were scored.")


def _chosen(rows: Sequence[System]) -> System | None:
    """Choose the system that the page is about: the best sub-network, or what did best trained."""
    results = [row for row in contenders(rows) if row.trained]
    if not results:
        return None
    if not results[0].baseline:
        return next((row for row in results if row.name == "best"), results[-1])
    column = results[0].first[0]
    sign = 1 if column.higher_is_better else -1
    scored = [row for row in results if column in row.values]
    return max(scored, key=lambda row: sign * row.values[column].score)


def _score(row: System, column: Column) -> str:
    unit = " %" if column.percent else ""
    number = f"{column.full_text(row.values[column])}{unit}".replace(" ", NBSP)
    return f"{number} {column.title}"


def results(run: RunData, rows: Sequence[System]) -> str:
    """Write the main table, the verdicts under it, and score against non-zeros."""
    if not run.metrics or not rows:
        return ""
    table = main_table(run.metrics)
    head = "".join(_head(header) for header in table.headers)
    bodies = "".join(_group(table, baseline) for baseline in (True, False))
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    markup = (
        '<div class="scroll"><table class="main"><thead><tr><th scope="col">system</th>'
        f"{head}</tr></thead>{bodies}</table></div>"
        f'<p class="note">± is one standard error. Bold: {table.bold} of the column.</p>{notes}'
        f'{_verdicts(run, rows)}<p class="note">{_remark(run)}</p>'
    )
    return section("Results", markup + figure_grid(figures.score_scatters(rows)))


def _group(table: MainTable, baseline: bool) -> str:
    """Write the baselines or the results; without a heading where there are no others."""
    lines = [row for row in table.rows if row[1] == baseline]
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, cells))}</tr>'
        for name, _, cells in lines
    )
    if any(row[1] for row in table.rows) and lines:
        label = "Baselines" if baseline else "Sub-networks of the super-network"
        width = len(table.headers) + 1
        body = f'<tr class="group"><th colspan="{width}">{label}</th></tr>{body}'
    return f'<tbody class="{"baselines" if baseline else "results"}">{body}</tbody>' * bool(lines)


def _remark(run: RunData) -> str:
    tokens = _find(run.recipe or {}, "macs_length")
    length = f" of a forward pass over {escape(str(tokens))} tokens" if tokens else ""
    macs = f"MACs are the multiply-accumulates{length}, not FLOPs."
    if (run.recipe or {}).get("method") == "finetune" and not run.sparsity:
        return macs
    return (
        "Unstructured zeros save storage; they are not a speed-up on common runtimes. Latency "
        f"appears only where it was measured, never inferred from sparsity. {macs}"
    )


def _head(header: Header) -> str:
    notes = (header.note, header.sample)
    lines = "".join(f"<small>{escape(note) or '&nbsp;'}</small>" for note in notes)
    return f'<th scope="col">{escape(header.title)}{lines}</th>'


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    text = f"<b>{text}</b>" if cell.best else text
    return f"<td>{text}{f' <small>± {escape(cell.error)}</small>' if cell.error else ''}</td>"


def _verdicts(run: RunData, rows: Sequence[System]) -> str:
    found = verdicts(rows, run.predictions)
    if not found:
        if all(row.baseline for row in rows):
            return ""
        return (
            '<p class="note">No trained baseline on these tasks: what the search gains or loses '
            "cannot be told from this run.</p>"
        )
    names = list(dict.fromkeys(verdict.reference for verdict in found))
    tables = (_verdict_table([v for v in found if v.reference == name]) for name in names)
    return "".join(tables) + f'<p class="note">{_how_compared(found)}</p>'


def _verdict_table(found: Sequence[Verdict]) -> str:
    """Write what became of the systems compared with one reference: tasks down, or systems down.

    Whichever there are more of stands down the page, so that the table is as narrow as can be.
    """
    names = list(dict.fromkeys(verdict.name for verdict in found))
    columns = list(dict.fromkeys(verdict.column for verdict in found))
    cells = {(verdict.column, verdict.name): _verdict(verdict) for verdict in found}
    tall = len(names) > len(columns)
    if tall:
        across = [_comparison(column) for column in columns]
        down = [
            (escape(name), [cells.get((column, name), "<td></td>") for column in columns])
            for name in names
        ]
    else:
        across = [escape(name) for name in names]
        down = [
            (_comparison(column), [cells.get((column, name), "<td></td>") for name in names])
            for column in columns
        ]
    head = "".join(f'<th scope="col">{title}</th>' for title in across)
    body = "".join(f'<tr><th scope="row">{title}</th>{"".join(line)}</tr>' for title, line in down)
    return (
        f"<h3>Different from {escape(found[0].reference)} beyond noise?</h3>"
        f'<div class="scroll"><table class="verdicts{" tall" * tall}">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _how_compared(found: Sequence[Verdict]) -> str:
    """Explain the verdicts, and warn of what they do not tell."""
    notes = []
    paired = [verdict.paired for verdict in found if verdict.paired is not None]
    if paired:
        tests = ", ".join(dict.fromkeys(comparison.test for comparison in paired))
        notes.append(
            f"Paired: on the same examples; difference, {paired[0].confidence:.0%} interval, "
            f"two-sided p ({tests})."
        )
    if len(paired) < len(found):
        notes.append("Unpaired: difference ± twice its standard error, which it must exceed.")
    if len(found) > 1:
        notes.append(
            f"{len(found)} comparisons, not corrected for their number: one in twenty is found "
            "where there is no difference."
        )
    few = min(verdict.n for verdict in found)
    if few < FEW_EXAMPLES:
        notes.append(f"With as few as {few} scored examples such a test means little.")
    return " ".join(notes)


def _comparison(column: Column) -> str:
    name = "average" if column == AVERAGE else column.task
    unit = f"{column.title}, points" if column.percent else column.title
    return f"{escape(name)}<small>{escape(unit)}</small>"


def _verdict(verdict: Verdict) -> str:
    column, noise, paired = verdict.column, verdict.noise, verdict.paired
    style = verdict.word.replace("within ", "")
    word = f'<span class="{style}">{verdict.word}</span>'
    if paired is not None:
        size = max(abs(paired.low), abs(paired.high))
        gap, low, high = (
            column.difference(number, size)
            for number in (verdict.difference, paired.low, paired.high)
        )
        facts = f"{gap} [{low}, {high}]"
        return (
            f"<td>{word} <small>{facts}</small>"
            f'<small class="how">paired, n = {verdict.n:,}, {escape(p_text(paired.p))}</small></td>'
        )
    # Both numbers with the digits of the larger one.
    size = max(abs(verdict.difference), noise or 0) * 10
    gap = column.difference(verdict.difference, size)
    if noise is None:
        return f"<td>unknown <small>{gap}, no standard error</small></td>"
    return (
        f"<td>{word} <small>{gap} ± {column.number(noise, size)}</small>"
        '<small class="how">unpaired</small></td>'
    )
