"""What systems answered: counts by file, a sample of right and wrong answers, and error plots."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from elastune.report.load import RunData, kind_of, prediction_name
from elastune.report.markup import Figure, figure_grid, section
from elastune.report.plots import Bar, Mark, bar_chart, scatter_chart
from elastune.report.quantities import DASH, MINUS

Row = Mapping[str, Any]

MOST_SHOWN = 6  # right and as many wrong answers of a file, fewer where there are many files
ALL_SHOWN = 120  # answers of all files together: the page stays below 2 MB
MOST_POINTS = 200  # of a scatter plot
MOST_CLASSES = 12  # of a confusion matrix
BINS = 12
_FIRST = {"best": 0, "heuristic": 1, "largest": 2, "smallest": 3}


def predictions(run: RunData) -> str:
    """Write what every scored system answered, folded away by system and task."""
    files = sorted(run.predictions.items(), key=lambda item: (_FIRST.get(item[0][0], 9), item[0]))
    rows = (run.metrics or {}).get("rows", ())
    tasks = {prediction_name(row["task"]): row["task"] for row in rows}
    shown = max(1, min(MOST_SHOWN, ALL_SHOWN // (2 * max(len(files), 1))))
    return section(
        "Predictions",
        "".join(_file(name, tasks.get(task, task), rows, shown) for (name, task), rows in files),
    )


def _file(name: str, task: str, rows: Sequence[Row], shown: int) -> str:
    kind = kind_of(rows[0]) if rows else ""
    told, body = _WRITERS.get(kind, _unknown)(rows, shown)
    head = f"{name} on {task}: {told}"
    return f"<details><summary>{escape(head)}</summary>{body}</details>"


def is_right(row: Row) -> bool | None:
    """Tell whether an answer is right; None where the record does not say."""
    found = row.get("correct", row.get("exact"))
    return None if found is None else bool(found)


def _unknown(rows: Sequence[Row], shown: int) -> tuple[str, str]:
    return f"{len(rows):,} records", ""


def _answers(rows: Sequence[Row], shown: int, parts: Callable[[Row], _Parts]) -> tuple[str, str]:
    """Count right answers and write the first few wrong and right ones."""
    right = [row for row in rows if is_right(row)]
    wrong = [row for row in rows if is_right(row) is False]
    sample = wrong[:shown] + right[:shown]
    told = f"{len(right):,} right of {len(rows):,}"
    if not sample:
        sample, told = list(rows[:shown]), f"{len(rows):,} answers"
    note = (
        f"{len(sample):,} of {len(rows):,} answers: the first {len(wrong[:shown])} wrong and the "
        f"first {len(right[:shown])} right ones."
    )
    body = "".join(_answer(row, parts(row)) for row in sample)
    return told, f'<p class="note">{note}</p>{body}'


_Parts = Iterable[tuple[str, str]]


def _answer(row: Row, parts: _Parts) -> str:
    body = "".join(
        f'<dt>{name}</dt><dd><pre class="wrap">{escape(text)}</pre></dd>' for name, text in parts
    )
    right = is_right(row)
    if right is None:
        return f'<dl class="prediction">{body}</dl>'
    word, style = ("right", "better") if right else ("wrong", "worse")
    partly = row.get("f1") if not right and "exact" in row else None
    if partly:
        word = f"wrong, F1 {100 * partly:.0f} %"
    verdict = f'<dt>verdict</dt><dd><span class="{style}">{word}</span></dd>'
    return f'<dl class="prediction {"right" if right else "wrong"}">{verdict}{body}</dl>'


def _generation(rows: Sequence[Row], shown: int) -> tuple[str, str]:
    def parts(row: Row) -> _Parts:
        read = row.get("extracted")
        gold = f"{row.get('gold')} (read from the answer: {'nothing' if read is None else read})"
        yield "prompt", _clip(row["prompt"], 500, tail=True)
        yield "generated", _clip(row["text"], 800)
        yield "gold", _clip(gold, 300)

    return _answers(rows, shown, parts)


def _multiple_choice(rows: Sequence[Row], shown: int) -> tuple[str, str]:
    def parts(row: Row) -> _Parts:
        yield "prompt", _clip(row["prompt"], 500, tail=True)
        values = row["loglikelihoods"]
        choices = row.get("choices") or [""] * len(values)
        chosen = row.get("prediction")
        if chosen is None and len(values) > 1:
            chosen = max(range(len(values)), key=lambda place: values[place])
        lines = []
        for place, (choice, value) in enumerate(zip(choices, values, strict=False)):
            marks = ("gold", place == row.get("gold")), ("chosen", place == chosen)
            named = ", ".join(word for word, holds in marks if holds)
            number = f"{value:.2f}".replace("-", MINUS)
            lines.append(f"{number:>9}  {_clip(choice.strip(), 160)}{named and f'  ({named})'}")
        yield "choices", "\n".join(lines)
        if not isinstance(row.get("gold"), int):
            yield "gold", _clip(str(row.get("gold")), 200)

    told, body = _answers(rows, shown, parts)
    if all("correct_norm" in row for row in rows):
        told += f", {sum(map(bool, (row['correct_norm'] for row in rows))):,} by length"
    note = '<p class="note">Numbers are log-likelihoods of the choices in nats.</p>'
    return told, note + body


def _question_answering(rows: Sequence[Row], shown: int) -> tuple[str, str]:
    def parts(row: Row) -> _Parts:
        golds = list(dict.fromkeys(row.get("gold") or ()))
        yield "question", _clip(row["question"], 300)
        yield "context", _around(row["context"], golds[0] if golds else row["prediction"])
        yield "answer", _clip(row["prediction"], 300) or "(none)"
        yield "gold", _clip(" | ".join(golds), 300) or "(none)"

    told, body = _answers(rows, shown, parts)
    if all("f1" in row for row in rows):
        told += f", F1 {100 * sum(row['f1'] for row in rows) / len(rows):.1f} %"
    return told, body


def _around(context: str, answer: str, reach: int = 250) -> str:
    """Cut a context around the answer."""
    place = max(context.find(answer), 0)
    start, end = max(place - reach, 0), place + len(answer[:reach]) + reach
    head, tail = "… " * (start > 0), " …" * (end < len(context))
    return f"{head}{context[start:end].strip()}{tail}"


def _classification(rows: Sequence[Row], shown: int) -> tuple[str, str]:
    def parts(row: Row) -> _Parts:
        yield "text", _clip(_texts(row), 500)
        logits = row.get("logits")
        sure = f" (probability {_probability(logits, row['prediction']):.2f})" if logits else ""
        yield "answer", f"{row['prediction']}{sure}"
        yield "gold", str(row["gold"])

    told, body = _answers(rows, shown, parts)
    return told, _confusion(rows) + body


def _texts(row: Row) -> str:
    pair = row.get("text_pair")
    return row["text"] if pair is None else f"{row['text']}\n{pair}"


def _probability(logits: Sequence[float], label: int) -> float:
    top = max(logits)
    odds = [math.exp(value - top) for value in logits]
    return odds[label] / sum(odds) if 0 <= label < len(odds) else math.nan


def _confusion(rows: Sequence[Row]) -> str:
    """Write how often each class was taken for which."""
    counts = Counter((int(row["gold"]), int(row["prediction"])) for row in rows)
    totals = Counter(int(row["gold"]) for row in rows)
    # Classes by how often they occur where there are too many, then by number.
    seen = Counter(label for pair in counts for label in pair for _ in range(counts[pair]))
    labels = sorted(sorted(seen, key=lambda label: (-seen[label], label))[:MOST_CLASSES])
    head = "".join(f'<th scope="col">{label}</th>' for label in labels)
    body = ""
    for gold in labels:
        cells = "".join(
            _confusion_cell(counts[gold, told], totals[gold], gold == told) for told in labels
        )
        body += f'<tr><th scope="row">{gold}</th>{cells}<td>{totals[gold]:,}</td></tr>'
    note = "Rows: gold class. Columns: predicted class. Per cent of the row."
    if len(seen) > len(labels):
        note += f" The {len(labels)} most frequent of {len(seen)} classes."
    return (
        f'<div class="scroll"><table class="confusion"><thead><tr><th>gold</th>{head}<th>all</th>'
        f'</tr></thead><tbody>{body}</tbody></table></div><p class="note">{note}</p>'
    )


def _confusion_cell(count: int, total: int, diagonal: bool) -> str:
    share = count / total if total else 0.0
    style = "hit" if diagonal else "miss"
    return (
        f'<td class="{style}" style="--share:{share:.2f}">{count:,} '
        f"<small>{100 * share:.0f} %</small></td>"
    )


def _regression(rows: Sequence[Row], shown: int) -> tuple[str, str]:
    known = [row for row in rows if math.isfinite(row["prediction"])]
    errors = sorted(known, key=lambda row: -abs(row["prediction"] - row["gold"]))
    if not errors:
        return f"{len(rows):,} answers, none of them a number", ""
    mean = sum(abs(row["prediction"] - row["gold"]) for row in errors) / len(errors)
    lines = "".join(
        f'<tr><td class="words">{escape(_clip(_texts(row), 300))}</td>'
        f"<td>{row['prediction']:.3f}</td><td>{row['gold']:.3f}</td>"
        f"<td>{abs(row['prediction'] - row['gold']):.3f}</td></tr>"
        for row in errors[:shown]
    )
    table = (
        '<div class="scroll"><table class="errors"><thead><tr><th>text</th><th>answer</th>'
        f"<th>gold</th><th>error</th></tr></thead><tbody>{lines}</tbody></table></div>"
    )
    note = f"The {len(errors[:shown])} largest errors of {len(rows):,} answers."
    body = f'{figure_grid([_regression_scatter(known)])}<p class="note">{note}</p>{table}'
    return f"mean absolute error {mean:.3f} over {len(rows):,}", body


def _regression_scatter(rows: Sequence[Row]) -> Figure:
    every = math.ceil(len(rows) / MOST_POINTS)
    marks = [
        Mark(
            row["gold"],
            row["prediction"],
            f"{row['prediction']:.2f}, gold {row['gold']:.2f}",
            "dot small trial",
        )
        for row in rows[::every]
    ]
    golds = [row["gold"] for row in rows]
    ends = [(end, end) for end in (min(golds), max(golds))]
    svg = scatter_chart(
        marks, x_label="gold", y_label="answer", title="answer against gold", line=ends
    )
    note = f"One in {every} answers. " if every > 1 else ""
    return Figure("Answer against gold", svg, f"{note}Line: equal.")


def _perplexity(rows: Sequence[Row], shown: int) -> tuple[str, str]:
    losses = [row["nll"] / row["tokens"] for row in rows if row["tokens"]]
    tokens = sum(row["tokens"] for row in rows)
    told = f"{tokens:,} tokens in {len(rows):,} windows"
    low, high = min(losses, default=0.0), max(losses, default=0.0)
    if len(losses) < 2 or not math.isfinite(high) or high <= low:
        return told, ""
    width = (high - low) / BINS
    counts = Counter(min(int((loss - low) / width), BINS - 1) for loss in losses)
    bars = [
        Bar(
            f"{low + place * width:.2f}{DASH}{low + (place + 1) * width:.2f}",
            counts[place],
            f"{counts[place]:,}",
        )
        for place in range(BINS)
    ]
    title = "Windows by loss (nats per token)"
    return told, figure_grid([Figure(title, bar_chart(bars, title=title))])


def _clip(text: str, limit: int, *, tail: bool = False) -> str:
    text = text.strip("\n")
    if len(text) <= limit:
        return text
    return f"… {text[-limit:]}" if tail else f"{text[:limit]} …"


_WRITERS: dict[str, Callable[[Sequence[Row], int], tuple[str, str]]] = {
    "generation": _generation,
    "multiple-choice": _multiple_choice,
    "question-answering": _question_answering,
    "classification": _classification,
    "regression": _regression,
    "perplexity": _perplexity,
}
