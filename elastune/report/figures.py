"""Training, scores, search and time as figures: what is drawn against what, with legends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from elastune.report.layers import config_text
from elastune.report.load import Curve, RunData
from elastune.report.markup import Figure
from elastune.report.plots import Bar, Line, Mark, bar_chart, line_chart, scatter_chart
from elastune.report.quantities import common_unit, duration, is_number
from elastune.report.results import AVERAGE, Column, System, first_columns

_COUNTED = ("params", "nonzero", "macs", "block_macs")
COSTS = (*_COUNTED, "latency_ms", "decode_latency_ms", "memory_bytes")
COST_TITLES = {"nonzero": "non-zeros", "macs": "MACs", "latency_ms": "latency (ms)"}
COST_TITLES |= {"block_macs": "MACs of the blocks"}
MOST_POINTS = 600  # of a curve, and
MOST_TRIALS = 1500  # of a search: more only makes the page heavy


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


def search_scatter(run: RunData) -> Figure | None:
    """Draw the search: objective against cost of every trial, Pareto front and chosen marked."""
    trials = (run.search or {}).get("trials", [])
    keys = list(dict.fromkeys(key for trial in trials for key in trial["values"]))
    quality = next((key for key in keys if key not in COSTS), None)
    if run.search is None or quality is None:
        return None
    cost = next((key for key in COSTS if key in keys), None)
    front = set(run.search.get("pareto") or ())
    known = [t for t in trials if is_number(t["values"].get(quality))]
    known = [t for t in known if cost is None or is_number(t["values"].get(cost))]
    if not known:
        return None
    divisor, prefix = common_unit(t["values"][cost] for t in known) if cost else (1.0, "")
    every = math.ceil(len(known) / MOST_TRIALS)
    shown = [
        t
        for place, t in enumerate(known)
        if place % every == 0 or t["number"] in front or t["number"] == run.search.get("best")
    ]
    marks = [_trial_mark(t, quality, cost, divisor, run.search) for t in shown]
    # Drawing order is importance: the chosen and the front lie on top.
    marks.sort(key=lambda mark: ("front" in mark.style) + 2 * ("chosen" in mark.style))
    corners = sorted((m.x, m.y) for m in marks if "front" in m.style or "chosen" in m.style)
    two = len(keys) == 2 and cost is not None
    x_label = COST_TITLES.get(cost, cost) if cost else "trial"
    svg = scatter_chart(
        marks,
        x_label=f"{x_label} ({prefix})" if prefix else str(x_label),
        y_label=f"validation {quality}",
        title="search",
        front=corners if two and front else (),
    )
    legend = [("dot", "small trial", f"{len(known):,} trials")]
    legend += [("dot", "front", f"Pareto front ({len(front)})")] if front else []
    legend += [("dot", "chosen", "chosen")] if run.search.get("best") is not None else []
    note = f"One in {every} of the dominated trials is drawn." if every > 1 else ""
    return Figure("Trials of the search", svg, note, tuple(legend))


def _trial_mark(
    trial: Mapping[str, Any],
    quality: str,
    cost: str | None,
    divisor: float,
    search: Mapping[str, Any],
) -> Mark:
    number, values = trial["number"], trial["values"]
    x = values[cost] / divisor if cost else float(number)
    listed = ", ".join(
        f"{key} {_value_text(value)}" for key, value in values.items() if is_number(value)
    )
    hint = f"trial {number}: {listed}\n{config_text(trial['config'])}"
    if number == search.get("best"):
        return Mark(x, values[quality], hint, "dot chosen", "chosen")
    style = "dot small front" if number in (search.get("pareto") or ()) else "dot small trial"
    return Mark(x, values[quality], hint, style)


def _value_text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"


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
