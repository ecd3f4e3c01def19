"""Training, scores, search and time as figures: what is drawn against what, with legends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from elastune.report.layers import config_text
from elastune.report.load import Curve, RunData
from elastune.report.markup import Figure
from elastune.report.plots import Bar, Line, Mark, bar_chart, line_chart, scatter_chart
from elastune.report.quantities import common_unit, duration
from elastune.report.results import AVERAGE, Column, System, first_columns

MOST_POINTS = 600  # of a curve: more only makes the page heavy


def training_curves(run: RunData) -> Figure | None:
    """Draw the training loss of the super-network and of the baselines against the step."""
    curves = {n: c for n, c in run.curves.items() if any(map(math.isfinite, c.losses))}
    if not curves:
        return None
    lines = [Line(name, _smooth(curve), _thin(_points(curve))) for name, curve in curves.items()]
    svg = line_chart(
        lines, x_label="optimizer step", y_label="training loss", title="training loss"
    )
    legend = tuple(("line", f"s{place}", line.name) for place, line in enumerate(lines))
    bad = sum(not math.isfinite(loss) for curve in curves.values() for loss in curve.losses)
    note = "Faint: every step. Strong: moving average over 5 % of the steps."
    if bad:
        note += f" {bad} steps have no finite loss and are left out."
    return Figure("Training loss", svg, note, legend if len(lines) > 1 else ())


def _points(curve: Curve) -> list[tuple[float, float]]:
    pairs = zip(curve.steps, curve.losses, strict=True)
    return [(step, loss) for step, loss in pairs if math.isfinite(loss)]


def _smooth(curve: Curve) -> list[tuple[float, float]]:
    points = _points(curve)
    half = max(len(points) // 40, 1)
    sums = [0.0]
    for _, loss in points:
        sums.append(sums[-1] + loss)
    smooth = []
    for place, (step, _) in enumerate(points):
        # The window shrinks evenly at the ends, so that the curve does not lean there.
        reach = min(half, place, len(points) - 1 - place)
        total = sums[place + reach + 1] - sums[place - reach]
        smooth.append((step, total / (2 * reach + 1)))
    return _thin(smooth)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = math.ceil(len(points) / MOST_POINTS) or 1
    kept = list(points[::every])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def score_scatters(rows: Sequence[System]) -> list[Figure]:
    """Draw score against non-zero parameters: one figure for the average, or one per task.

    Bars of the scores instead where all systems are of about the same size.
    """
    wanted = first_columns(rows)
    if AVERAGE in wanted:
        wanted = [AVERAGE] + [
            column for column in wanted if column.metric != "accuracy" and column != AVERAGE
        ]
    sizes = [row.nonzero for row in rows]
    draw = _score_bars if sizes and min(sizes) > 0.9 * max(sizes) else _score_scatter
    figures = [draw(rows, column) for column in wanted]
    return [figure for figure in figures if figure is not None][:4]


def _score_bars(rows: Sequence[System], column: Column) -> Figure | None:
    bars = []
    for row in rows:
        value = row.values.get(column)
        if value is None or not math.isfinite(value.score):
            continue
        ends = (None, None) if value.stderr is None else (-value.stderr, value.stderr)
        low, high = (None if end is None else value.score + end for end in ends)
        text = column.full_text(value)
        style = "s0" if row.trained else "s5"
        hint = f"{row.name}: {text}, {row.nonzero:,} non-zeros"
        bars.append(Bar(row.name, max(value.score, 0.0), text, hint, style, low, high))
    if len(bars) < 2:
        return None
    title = _titled(column)
    return Figure(title, bar_chart(bars, title=title), "Whiskers: ± one standard error.")


def _titled(column: Column) -> str:
    where = "on average" if column == AVERAGE else f"on {column.task}"
    return f"{column.title[0].upper()}{column.title[1:]} {where}"


def _score_scatter(rows: Sequence[System], column: Column) -> Figure | None:
    rows = [row for row in rows if column in row.values]
    if len(rows) < 2:
        return None
    divisor, prefix = common_unit(row.nonzero for row in rows)
    times = 100 if column.percent else 1
    marks = []
    for row in rows:
        value = row.values[column]
        hint = f"{row.name}: {column.full_text(value)}, {row.nonzero:,} non-zeros"
        if row.config:
            hint += f"\n{config_text(row.config)}"
        marks.append(
            Mark(
                row.nonzero / divisor,
                value.score * times,
                hint,
                "dot baseline" if row.baseline else "dot s0",
                row.name,
                None if value.stderr is None else value.stderr * times,
            )
        )
    unit = " (%)" if column.percent else ""
    title = f"{_titled(column)}, against size"
    x_label = f"non-zero parameters ({prefix})" if prefix else "non-zero parameters"
    svg = scatter_chart(marks, x_label=x_label, y_label=f"{column.title}{unit}", title=title)
    legend = (("dot", "baseline", "baseline"), ("dot", "s0", "sub-network"))
    return Figure(title, svg, "Bars: ± one standard error.", legend)


def stage_times(run: RunData) -> Figure | None:
    """Draw how long each stage took; parts of a stage (``extract/best``) are added up."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, row in (run.manifest or {}).get("stages", {}).items():
        groups.setdefault(name.split("/")[0], {})[name] = row
    bars = []
    for stage, parts in groups.items():
        open_parts = [row["status"] for row in parts.values() if row["status"] != "done"]
        seconds = sum(row.get("seconds") or 0.0 for row in parts.values())
        shown = " ".join([*open_parts[:1], duration(seconds)])
        hint = "\n".join(
            f"{name}: {row['status']}, {duration(row.get('seconds') or 0.0)}"
            for name, row in parts.items()
        )
        bars.append(Bar(stage, seconds, shown, hint, style="s4" if open_parts else "s0"))
    if not bars:
        return None
    total = sum(bar.value for bar in bars)
    svg = bar_chart(bars, title="time by stage")
    return Figure("Time by stage", svg, f"{duration(total)} in all.")
