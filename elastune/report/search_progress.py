"""How a search came to its result: what was found against the work done."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from elastune.report.plots import Line, line_chart
from elastune.report.trials import Searched

_BEYOND = 0.1  # of the front's range: so far behind its worst values the box of the volume ends
_WORK, _NUMBER = "work in whole evaluations", "trials"


def progress_figure(found: Searched) -> str:
    """Write the figure of the search's progress, as markup; nothing for fewer than two trials.

    With two objectives the volume that the trials so far dominate, and the best quality; each
    against work and against the number of trials. One drawing is shown at a time.
    """
    trials = found.trials
    if len(trials) < 2:
        return ""
    works = [point.equivalents for point in trials]
    axes: dict[str, list[float]] = {}
    if all(work is not None for work in works):
        axes[_WORK] = [float(x) for x in np.cumsum(np.array(works, dtype=float))]
    axes[_NUMBER] = [float(place + 1) for place in range(len(trials))]
    volumes = volumes_so_far(found)
    curves: dict[str, Sequence[float | None]] = {"hypervolume": volumes} if volumes else {}
    curves[f"best validation {found.quality} so far"] = best_so_far(found)
    drawn = []
    for title, values in curves.items():
        for axis, xs in axes.items():
            points = _steps([(x, y) for x, y in zip(xs, values, strict=True) if y is not None])
            line = [Line(title, points)]
            svg = line_chart(line, x_label=axis, y_label=title, title=f"{title} by {axis}")
            drawn.append((f"{title}, by {axis}", svg))
    note = (
        "Hypervolume: the part that the trials so far dominate of the box from the front's best "
        f"values to {100 * _BEYOND:.0f} % beyond its worst. "
        if volumes
        else ""
    )
    note += "Trials that the race dropped count as work only." if _has_dropped(found) else ""
    written = "".join(
        f'<div data-title="{escape(title)}"{" hidden" if place else ""}>{svg}</div>'
        for place, (title, svg) in enumerate(drawn)
    )
    return (
        '<figure data-choose="what is drawn"><figcaption><h3>Progress of the search</h3>'
        f'<span class="note">{escape(note.strip())}</span></figcaption>{written}</figure>'
    )


def _has_dropped(found: Searched) -> bool:
    return any(point.state == "dropped" for point in found.trials)


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Draw what changes at a trial as a step; the points between two steps are left out."""
    kept: list[tuple[float, float]] = []
    for place, (x, y) in enumerate(points):
        if not kept or y != kept[-1][1]:
            kept += [(x, kept[-1][1])] if kept else []
            kept.append((x, y))
        elif place == len(points) - 1:
            kept.append((x, y))
    return kept


def best_so_far(found: Searched) -> list[float | None]:
    """Return the best quality after each trial; None before the first that was measured whole."""
    values: list[float | None] = []
    best: float | None = None
    for point in found.trials:
        if point.whole and point.quality is not None:
            best = point.quality if best is None else min(best, point.quality)
        values.append(best)
    return values


def volumes_so_far(found: Searched) -> list[float] | None:
    """Return the hypervolume after each trial, 0 to 1; None without two objectives and a front."""
    front = found.front
    if found.cost is None or len(front) < 2:
        return None
    corner = np.array([[point.quality, point.costs[found.cost]] for point in front], dtype=float)
    low, high = corner.min(axis=0), corner.max(axis=0)
    high = high + _BEYOND * (high - low)
    values, members, volume = [], np.empty((0, 2)), 0.0
    for point in found.trials:
        if point.whole and point.quality is not None:
            new = (np.array([point.quality, point.costs[found.cost]]) - low) / (high - low)
            if (new < 1).all() and not (members <= new).all(axis=1).any():
                members = np.vstack([members[~(new <= members).all(axis=1)], new])
                volume = _volume(members)
        values.append(volume)
    return values


def _volume(members: np.ndarray) -> float:
    """Return the area between a front of two values and the corner (1, 1), ``(points, 2)``."""
    ordered = members[np.argsort(members[:, 0])]
    ends = np.append(ordered[1:, 0], 1.0)
    return float(((ends - ordered[:, 0]) * (1 - ordered[:, 1])).sum())
