"""The Pareto front to point at: every trial, for every known cost, and the details of each.

The drawing is whole without the script: `search.js` moves the points to the other costs, for which
axes, front and labels are drawn here and hidden, and fills in the details of a point.
"""

from __future__ import annotations

import json
import shlex
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from elastune.report.exports import standing
from elastune.report.layers import config_text
from elastune.report.load import RunData
from elastune.report.loading import load_code
from elastune.report.markup import legend_markup
from elastune.report.plots import Mark, labels, staircase
from elastune.report.quantities import common_unit
from elastune.report.results import System
from elastune.report.svg import Frame, drawing, padded, tag, text, tip
from elastune.report.trials import (
    COST_TITLES,
    Point,
    Searched,
    blocks,
    kind_title,
    left_out,
    mean_share,
    thinned,
)

MOST_TRIALS = 1500  # that are drawn: more only makes the page heavy
_TOP = 40.0  # of the frame, where failed trials are marked
_LETTERS = string.digits + string.ascii_letters  # for the index of a choice; search.js has them too
_STYLES = {
    "front": "dot small front",
    "trial": "dot small trial",
    "dropped": "dot small dropped",
    "random": "dot small random",
    "failed": "failed",
}
_ORDER = ("failed", "dropped", "trial", "random", "front")
"""Drawing order is importance: what comes last lies on top."""


@dataclass(frozen=True)
class _View:
    """The drawing for one cost: axes and where every point lies; None where it is not known."""

    name: str
    frame: Frame
    xs: tuple[float | None, ...]
    front: tuple[int, ...]
    under: str
    over: str


def front_figure(run: RunData, found: Searched, rows: Sequence[System]) -> str:
    """Write the figure with its details and their data, as markup.

    Points are numbered in drawing order: their marks carry ``data-point``, and `search.js` finds
    the rest under that number in the data.
    """
    points = sorted(
        thinned(found.points, MOST_TRIALS),
        key=lambda p: (p is found.best, _ORDER.index(p.state), p.key),
    )
    y_range, cut = _y_range(points)
    views = [_view(found, points, name, y_range) for name in found.costs or ("",)]
    marks = [_mark(point, number, views[0], found.best) for number, point in enumerate(points)]
    layers = [_layer(view, view.under, view is views[0]) for view in views]
    layers += marks
    layers += [_layer(view, view.over, view is views[0]) for view in views]
    svg = drawing(views[0].frame.height, "trials of the search", *layers)
    note = _note(found, points, cut)
    data = _data(run, found, points, views, rows)
    return (
        '<div class="explore"><figure id="front"><figcaption><h3>Trials of the search</h3>'
        f'<span class="note">{escape(note)}</span></figcaption>'
        f"{legend_markup(_legend(found, points))}{svg}</figure>"
        '<div id="point" class="point" aria-live="polite" hidden></div></div>'
        f'<script type="application/json" id="trials">{script_json(data)}</script>'
    )


def script_json(value: Any) -> str:
    """Write JSON that can stand in a script element: nothing in it ends the element."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return written


def _y_range(points: Sequence[Point]) -> tuple[tuple[float, float], int]:
    """Return the range of the quality, and how many trials are worse than it goes.

    Broken sub-networks must not flatten the front: far beyond the worst of nine in ten, and of
    what is marked, the frame ends.
    """
    known = sorted(p.quality for p in points if p.quality is not None)
    marked = [
        p.quality for p in points if p.quality is not None and (p.names or p.state == "front")
    ]
    most = known[int(0.9 * (len(known) - 1))]
    end = max([most + 0.5 * (most - known[0]), *marked])
    if known[-1] <= end + (end - known[0]):
        return padded(known), 0
    return padded([known[0], end]), sum(value > end for value in known)


def _view(
    found: Searched, points: Sequence[Point], cost: str, y_range: tuple[float, float]
) -> _View:
    """Draw the axes, the front and the names for one cost; the number of the trial for none."""
    values = [p.costs.get(cost) if cost else float(p.number) for p in points]
    known = [value for value in values if value is not None]
    divisor, prefix = (
        common_unit(known) if cost not in ("latency_ms", "decode_latency_ms") else (1.0, "")
    )
    title = COST_TITLES.get(cost, "trial")
    x_label = f"{title} ({prefix})" if prefix else title
    x_range = padded([value / divisor for value in known], 0.1)
    frame = Frame.around(x_range, y_range, (x_label, f"validation {found.quality}"))
    front = found.front_by(cost) if cost else []
    numbers = {id(point): number for number, point in enumerate(points)}
    corners = [(p.costs[cost] / divisor, p.quality) for p in front if p.quality is not None]
    under = frame.markup() + _limit(found, cost, divisor, frame)
    corners = corners if len(corners) > 1 else []
    under += staircase(corners, frame)
    marked = [
        Mark(value / divisor, _inside(point.quality, frame), "", "", point.label)
        for point, value in zip(points, values, strict=True)
        if value is not None and point.quality is not None and (point.label or point in front)
    ]
    # A sub-network that was drawn at random and tried, too, has two points in one place.
    marked = list({(m.x, m.y, m.label): m for m in marked}.values())
    return _View(
        cost,
        frame,
        tuple(None if value is None else frame.x(value / divisor) for value in values),
        tuple(numbers[id(point)] for point in front if id(point) in numbers),
        under,
        "".join(labels(marked, frame, corners)),
    )


def _inside(quality: float, frame: Frame) -> float:
    return min(max(quality, frame.y.low), frame.y.high)


def _limit(found: Searched, cost: str, divisor: float, frame: Frame) -> str:
    """Draw the limits of the search on a cost, where they lie in the frame."""
    parts = []
    for end in found.bounds.get(cost, ()):
        if end is not None and frame.x.low < end / divisor < frame.x.high:
            x = frame.x(end / divisor)
            ends = {"x1": x, "x2": x, "y1": frame.y.stop, "y2": frame.y.start}
            parts.append(tag("line", tip("limit of the search"), class_="limit", **ends))
            parts.append(text(x + 4, frame.y.stop + 10, "limit"))
    return "".join(parts)


def _layer(view: _View, markup: str, shown: bool) -> str:
    return tag("g", markup, data_view=view.name, class_="view" if shown else "view off")


def _mark(point: Point, number: int, view: _View, best: Point | None) -> str:
    """Draw a trial at the origin and move it to its place, which the script can change."""
    x = view.xs[number]
    y = _TOP if point.quality is None else view.frame.y(point.quality)
    style = "dot chosen" if point is best else _STYLES[point.state]
    place = {
        "transform": f"translate({0 if x is None else x:.1f} {y:.1f})",
        "data_point": number,
        "class_": style if x is not None else f"{style} off",
    }
    hint = tip(_hint(point))
    if point.state == "failed":
        return tag("path", hint, d="M-3.5-3.5l7 7m0-7l-7 7", **place)
    return tag("circle", hint, r=6.5 if point is best else 3.5, **place)


def _hint(point: Point) -> str:
    told = "failed" if point.quality is None else f"{_value_text(point.quality)}"
    costs = ", ".join(f"{COST_TITLES[k]} {_value_text(v)}" for k, v in point.costs.items())
    lines = [f"{_title(point)}: {', '.join(part for part in (told, costs) if part)}"]
    return "\n".join([*lines, config_text(point.config)])


def _title(point: Point) -> str:
    names = f" ({', '.join(point.names)})" if point.names else ""
    dropped = ", dropped: an estimate" if point.state == "dropped" else ""
    return f"{point.key}{names}{dropped}"


def _value_text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"


def _note(found: Searched, points: Sequence[Point], cut: int) -> str:
    trials = found.trials
    examples = found.about.get("examples")
    on = f" on {examples:,} validation examples" if examples else ""
    parts = [f"{len(trials):,} sub-networks tried{on}."]
    if len(points) < len(found.points):
        parts.append(f"{len(points):,} of the points are drawn.")
    if cut:
        parts.append(f"{cut} worse than the frame goes are drawn at its edge.")
    unplaced = sum(p.quality is None and not p.costs for p in trials)
    if unplaced:
        parts.append(f"{unplaced} failed, at no known cost.")
    return " ".join(parts)


def _legend(found: Searched, points: Sequence[Point]) -> tuple[tuple[str, str, str], ...]:
    words = {
        "trial": "trial",
        "front": "Pareto front",
        "dropped": "dropped by the race, estimate",
        "random": "drawn at random, for comparison",
        "failed": "failed",
    }
    there = {point.state for point in points if point is not found.best}
    kinds = [
        ("cross" if s == "failed" else "dot", _STYLES[s][4:], w)
        for s, w in words.items()
        if s in there
    ]
    if found.best is not None:
        kinds.append(("dot", "chosen", "chosen"))
    return tuple(kinds)


def _data(
    run: RunData,
    found: Searched,
    points: Sequence[Point],
    views: Sequence[_View],
    rows: Sequence[System],
) -> dict[str, Any]:
    """Gather what the script shows of the points and where it puts them."""
    scored = {row.name for row in rows if row.config}
    names = {name for point in points for name in point.names}
    return {
        "quality": found.quality,
        "costs": [[name, COST_TITLES[name]] for name in found.costs],
        "largest": [found.largest.get(name) for name in found.costs],
        "kinds": [kind_title(kind) for kind in found.kinds if kind != "depth"],
        "dims": [[dim.name, dim.kind, list(dim.choices)] for dim in found.dims],
        "blocks": len(blocks(found.dims)),
        "views": [
            {"name": v.name, "x": [_short(x) for x in v.xs], "front": v.front} for v in views
        ],
        "y": [_short(_TOP if p.quality is None else views[0].frame.y(p.quality)) for p in points],
        "points": [_row(point, found) for point in points],
        "best": next((n for n, point in enumerate(points) if point is found.best), None),
        "loads": {
            name: [kind, load_code(run, name)]
            for name, kind in run.subnets.items()
            if name in names
        },
        "exports": {
            name: [f"{made['label']} ({made['loads_with']})" for made in mine]
            for name in sorted(names)
            if (mine := [made for made in standing(run) if made["subnet"] == name])
        },
        "scored": sorted(names & scored | names & {"largest", "heuristic", "smallest"}),
        "extract": f"elastune extract {shlex.quote(str(run.path))} --config",
    }


def _short(x: float | None) -> float | None:
    return None if x is None else round(x, 1)


def _row(point: Point, found: Searched) -> list[Any]:
    """Return what the script shows of a point, in the order in which it takes it apart."""
    shares = [mean_share(point, found.dims, kind) for kind in found.kinds if kind != "depth"]
    layers = blocks(found.dims)
    return [
        point.key,
        point.quality,
        [point.costs.get(name) for name in found.costs],
        [None if share is None else round(share, 4) for share in shares],
        len(set(layers) - left_out(point.config, found.dims)),
        _choices(point.config, found),
        list(point.names),
        point.state,
        list(point.breaks),
    ]


def _choices(config: Mapping[str, Any], found: Searched) -> str | list[int]:
    """Write which choice every dim takes, a character each where the lists are short enough."""
    places = []
    for dim in found.dims:
        choice = config.get(dim.name)
        places.append(dim.choices.index(choice) if choice in dim.choices else -1)
    if all(0 <= place < len(_LETTERS) for place in places):
        return "".join(_LETTERS[place] for place in places)
    return places
