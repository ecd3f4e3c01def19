"""Four kinds of plot as inline SVG: lines, scatter, bars, heatmap. Colours are CSS classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from elastune.report.svg import (
    CHARACTER_WIDTH,
    WIDTH,
    Frame,
    Scale,
    drawing,
    padded,
    path,
    tag,
    text,
    tip,
)

# Baselines are open rings, large enough to show around a dot in the same place.
RADII = {"chosen": 6.5, "baseline": 6.5, "small": 3.5}
SERIES = 6  # number of series colours in style.css (classes s0, s1, ...)


_LONGEST_LABEL = 28  # characters, of rows of a figure


@dataclass(frozen=True)
class Line:
    """A curve: the points drawn strongly, and the raw points that they smooth, drawn faintly."""

    name: str
    points: Sequence[tuple[float, float]]
    raw: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot; ``style`` is a CSS class, ``error`` half the error bar."""

    x: float
    y: float
    tip: str
    style: str = "dot"
    label: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Bar:
    """A horizontal bar; ``low`` and ``high`` draw a whisker, ``gap`` leaves room above."""

    label: str
    value: float
    text: str
    tip: str = ""
    style: str = "s0"
    low: float | None = None
    high: float | None = None
    gap: bool = False


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str, title: str) -> str:
    """Draw curves over whole numbers (steps), faint raw values behind."""
    xs = [x for line in lines for x, _ in line.points]
    smooth = [y for line in lines for _, y in line.points]
    raw = sorted(y for line in lines for _, y in line.raw if math.isfinite(y))
    # Spikes must not flatten the curves: the outer 2 % of raw values may leave the frame.
    kept = raw[len(raw) // 50 : len(raw) - len(raw) // 50] if raw else []
    x_range = (min(xs), max(xs)) if xs and max(xs) > min(xs) else padded(xs)
    frame = Frame.around(x_range, padded(smooth + kept), (x_label, y_label), whole_x=True)
    parts = [frame.markup()]
    for kind in ("raw", "smooth"):
        for place, line in enumerate(lines):
            points = line.raw if kind == "raw" else line.points
            placed = [(frame.x(x), frame.y(y)) for x, y in points if math.isfinite(y)]
            style = f"line {kind} s{place % SERIES}"
            name = tip(line.name)
            if len(placed) == 1:
                (x, y) = placed[0]
                parts.append(tag("circle", name, class_=f"dot s{place % SERIES}", cx=x, cy=y, r=4))
            elif placed:
                parts.append(tag("polyline", name, class_=style, points=path(placed)))
    return drawing(frame.height, title, *parts)


def scatter_chart(
    marks: Sequence[Mark],
    *,
    x_label: str,
    y_label: str,
    title: str,
    front: Sequence[tuple[float, float]] = (),
    line: Sequence[tuple[float, float]] = (),
) -> str:
    """Draw points with error bars, labels that keep clear of each other, and a staircase front.

    ``line`` is drawn straight through its points, behind the others.
    """
    marks = [mark for mark in marks if math.isfinite(mark.x) and math.isfinite(mark.y)]
    spread = [mark.y + sign * (mark.error or 0) for mark in marks for sign in (-1, 1)]
    x_range = padded([mark.x for mark in marks], 0.1)
    frame = Frame.around(x_range, padded(spread), (x_label, y_label))
    parts = [frame.markup()]
    if line:
        straight = path([(frame.x(x), frame.y(y)) for x, y in line])
        parts.append(tag("polyline", class_="leader straight", points=straight))
    parts.append(staircase(front, frame))
    for mark in marks:
        x, y = frame.x(mark.x), frame.y(mark.y)
        if mark.error:
            ends = {"y1": frame.y(mark.y - mark.error), "y2": frame.y(mark.y + mark.error)}
            parts.append(tag("line", class_=f"error {mark.style}", x1=x, x2=x, **ends))
        radius = next((r for style, r in RADII.items() if style in mark.style), 4.5)
        parts.append(tag("circle", tip(mark.tip), class_=mark.style, cx=x, cy=y, r=radius))
    parts += labels(_one_label_a_place(marks), frame, front)
    return drawing(frame.height, title, *parts)


def _one_label_a_place(marks: Sequence[Mark]) -> list[Mark]:
    """Give marks that lie on one another a label together, of two of theirs at most."""
    names: dict[tuple[float, float], list[str]] = {}
    for mark in marks:
        names.setdefault((mark.x, mark.y), []).append(mark.label)
    joined = []
    for mark in marks:
        mine = names.pop((mark.x, mark.y), [])
        more = ", …" if len(mine) > 2 else ""
        joined.append(replace(mark, label=", ".join(mine[:2]) + more))
    return joined


def staircase(front: Sequence[tuple[float, float]], frame: Frame) -> str:
    """Draw a Pareto front, given from left to right; nothing where it has no points."""
    corners = _corners(front, frame)
    return tag("polyline", class_="line front", points=path(corners)) if corners else ""


def _corners(front: Sequence[tuple[float, float]], frame: Frame) -> list[tuple[float, float]]:
    corners: list[tuple[float, float]] = []
    for x, y in front:
        if corners:
            corners.append((frame.x(x), corners[-1][1]))
        corners.append((frame.x(x), frame.y(y)))
    return corners


def labels(
    marks: Sequence[Mark], frame: Frame, front: Sequence[tuple[float, float]] = ()
) -> list[str]:
    """Place each label at the first spot near its point that covers no other label or point.

    Nor does it stand on the staircase of ``front``, nor on an error bar where it need not go far.
    """
    dots = [(frame.x(mark.x), frame.y(mark.y)) for mark in marks]
    bars = [
        (frame.x(m.x) - 1, frame.y(m.y + m.error), frame.x(m.x) + 1, frame.y(m.y - m.error))
        for m in marks
        if m.error
    ]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    taken += [
        (min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1)
        for (x0, y0), (x1, y1) in pairwise(_corners(front, frame))
    ]
    parts = []
    # From left to right, so that leaders of neighbours fan out instead of crossing.
    for mark, (x, y) in sorted(zip(marks, dots, strict=True), key=lambda pair: pair[1]):
        if not mark.label:
            continue
        width = 1.1 * CHARACTER_WIDTH * len(mark.label)  # phones enlarge the text
        boxes = [
            (left, middle - 9, left + width, middle + 9)
            for left, middle in _spots(x, y, width)
            if frame.x.start <= left and left + width <= WIDTH and 24 < middle < frame.y.start
        ] or [(x + 9, y - 9, x + 9 + width, y + 9)]
        free = [b for b in boxes if not any(_overlap(b, t) for t in taken)] or boxes[:1]
        near = [b for b in free if abs((b[1] + b[3]) / 2 - y) <= 18]
        box = next((b for b in near if not any(_overlap(b, bar) for bar in bars)), free[0])
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        if abs(middle - y) > 18:
            end = min(max(x, box[0]), box[2])
            edge = middle + (7 if middle < y else -7)
            parts.append(tag("line", class_="leader", x1=x, y1=y, x2=end, y2=edge))
        # Anchored where the point is: phones enlarge the text, which must grow away from it.
        left_of = box[2] <= x
        start, anchor = (box[2], "end") if left_of else (box[0], "start")
        parts.append(text(start, middle + 4, mark.label, class_="name halo", text_anchor=anchor))
    return parts


def _spots(x: float, y: float, width: float) -> list[tuple[float, float]]:
    """Places of a label (left edge, middle), nearest to its point first."""
    beside = [(x + 9, y), (x - 9 - width, y)]
    for far in range(16, 120, 14):
        for middle in (y - far, y + far):
            beside += [(left, middle) for left in (x - width / 2, x + 4, x - 4 - width)]
    return beside


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def bar_chart(bars: Sequence[Bar], *, title: str, reference: float | None = None) -> str:
    """Draw horizontal bars from zero, each with its label and its value written out."""
    bars = [replace(b, label=shown_label(b.label), tip=b.tip or b.label) for b in bars]
    left = 12 + CHARACTER_WIDTH * max(len(bar.label) for bar in bars)
    right = 12 + CHARACTER_WIDTH * max(len(bar.text) for bar in bars)
    top = max([bar.high or bar.value for bar in bars] + [reference or 0]) or 1.0
    scale = Scale(0.0, top, left, WIDTH - right)
    parts, y = [], 6.0
    for bar in bars:
        y += 12 if bar.gap else 0
        end = max(scale(bar.value), left + 1)
        box = {"x": left, "y": y, "width": end - left, "height": 15.0, "rx": 2}
        parts.append(text(left - 8, y + 12, bar.label, text_anchor="end", class_="name"))
        parts.append(tag("rect", tip(bar.tip or bar.label), class_=f"bar {bar.style}", **box))
        if bar.low is not None and bar.high is not None:
            ends = {"x1": scale(bar.low), "x2": scale(bar.high), "y1": y + 7.5, "y2": y + 7.5}
            parts.append(tag("line", class_="whisker", **ends))
        shown = max(end, scale(bar.high) if bar.high is not None else end)
        parts.append(text(shown + 7, y + 12, bar.text))
        y += 23
    if reference is not None:
        x = scale(reference)
        parts.append(tag("line", class_="leader", x1=x, x2=x, y1=2.0, y2=y))
    return drawing(y + 4, title, *parts)


def heatmap(
    rows: Sequence[str],
    columns: Sequence[int],
    cells: Mapping[tuple[str, int], tuple[float, str]],
    *,
    domain: tuple[float, float],
    x_label: str,
    title: str,
    gaps: Sequence[int] = (),
) -> str:
    """Draw ``cells[row, column] = (value, tooltip)``; darker is more, ``gaps`` part row groups."""
    low, high = domain
    left = 12 + CHARACTER_WIDTH * max(len(shown_label(row)) for row in rows)
    wide = min((WIDTH - left - 8) / max(len(columns), 1), 40.0)
    tall, y, parts = 18.0, 6.0, []
    for place, row in enumerate(rows):
        y += 10 if place in gaps else 0
        name = shown_label(row)
        parts.append(text(left - 7, y + 13, name, text_anchor="end", class_="name"))
        for index, column in enumerate(columns):
            if (row, column) not in cells:
                continue
            value, hint = cells[row, column]
            share = (value - low) / (high - low) if high > low else 1.0
            box = {"x": left + index * wide, "y": y, "width": wide - min(1.0, wide / 5)}
            opacity = f"{opacity_of(share):.2f}"
            parts.append(
                tag("rect", tip(hint), class_="heat", fill_opacity=opacity, height=tall - 1, **box)
            )
        y += tall
    every = next(
        k for k in (1, 2, 5, 10, 20, 50, 100, 1000) if k * wide >= 22 or k * 8 >= len(columns)
    )
    for index, column in enumerate(columns):
        if index % every == 0:
            parts.append(
                text(left + (index + 0.5) * wide, y + 15, str(column), text_anchor="middle")
            )
    parts.append(text(left - 7, y + 15, x_label, class_="label", text_anchor="end"))
    return drawing(y + 24, title, *parts)


def shown_label(label: str) -> str:
    """Return as much of a label as leaves room for what it is of."""
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"


def opacity_of(share: float) -> float:
    """Map a share of the range 0..1 to the opacity of a heatmap cell; never quite invisible."""
    return 0.12 + 0.88 * min(max(share, 0.0), 1.0)
