"""Parallel coordinates of the front: what its members keep, cost and reach, a line for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from elastune.report.markup import Figure
from elastune.report.svg import WIDTH, drawing, tag, text, tip
from elastune.report.trials import (
    COST_TITLES,
    Point,
    Searched,
    blocks,
    kind_title,
    left_out,
    mean_share,
)

_HEIGHT, _TOP, _BOTTOM, _SIDE = 330.0, 62.0, 290.0, 40.0
_MOST = 8  # axes that are still told apart on a phone
_SHORT = {
    "block_macs": "block MACs",
    "decode_macs": "decode MACs",
    "decode_latency_ms": "decode latency",
    "memory_bytes": "memory",
}
"""Titles of costs whose usual ones are too long for an axis, or not to be told apart."""


@dataclass(frozen=True)
class _Axis:
    """A quantity of a sub-network, with the text of a value."""

    title: tuple[str, ...]
    value: Callable[[Point], float | None]
    spell: Callable[[float], str]


def parallel_figure(found: Searched) -> Figure | None:
    """Draw the front, a line for each member; None where it has fewer than two."""
    front = found.front
    if len(front) < 2:
        return None
    drawn = []
    for axis in _axes(found):
        values = [axis.value(point) for point in front]
        if not any(value is None for value in values):
            drawn.append((axis, values))
    step = (WIDTH - 2 * _SIDE) / max(len(drawn) - 1, 1)
    parts, places = [], []
    for number, (axis, values) in enumerate(drawn):
        x = _SIDE + number * step
        low, high = min(values), max(values)  # type: ignore[type-var]
        parts.append(_axis_markup(axis, x, low, high, number))  # type: ignore[arg-type]
        places.append([(x, _place(value, low, high)) for value in values])  # type: ignore[arg-type]
    # The chosen one lies on top.
    order = sorted(range(len(front)), key=lambda n: front[n] is found.best)
    parts += [
        _strand(front[n], [place[n] for place in places], drawn, front[n] is found.best)
        for n in order
    ]
    legend = [("strand", "strand", f"front ({len(front)})")]
    if found.best in front:
        legend.append(("strand", "strand chosen", "chosen"))
    note = "Every axis from the lowest value on the front to the highest. Per cent: of the largest."
    if any(len(axis.title) > 1 for axis, _ in drawn):
        note += " A span such as 0-9 is of layers."
    svg = drawing(_HEIGHT, "the front as parallel coordinates", *parts)
    return Figure("The front: what is kept, cost and quality", svg, note, tuple(legend))


def _place(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return _BOTTOM - share * (_BOTTOM - _TOP)


def _axis_markup(axis: _Axis, x: float, low: float, high: float, number: int) -> str:
    parts = [tag("line", class_="axis", x1=x, x2=x, y1=_TOP, y2=_BOTTOM)]
    # Titles of neighbours stand at two heights, so that they have room.
    y = 14.0 + 15 * (number % 2)
    parts.append(text(x, y, " ".join(axis.title), text_anchor="middle", class_="name"))
    parts.append(text(x, _TOP - 8, axis.spell(high), text_anchor="middle"))
    if low < high:
        parts.append(text(x, _BOTTOM + 17, axis.spell(low), text_anchor="middle"))
    return "".join(parts)


def _strand(
    point: Point,
    places: list[tuple[float, float]],
    drawn: list[tuple[_Axis, list[float | None]]],
    chosen: bool,
) -> str:
    told = ", ".join(
        f"{' '.join(axis.title)} {axis.spell(value)}"
        for axis, _ in drawn
        if (value := axis.value(point)) is not None
    )
    names = f" ({', '.join(point.names)})" if point.names else ""
    spots = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = "strand chosen" if chosen else "strand"
    hint = tip(f"{point.key}{names}: {told}")
    return tag("polyline", hint, class_=style, points=spots, data_key=point.key)


def _axes(found: Searched) -> list[_Axis]:
    """List the axes: kinds of dims (by thirds of the blocks where few), costs, quality."""
    kinds = [kind for kind in found.kinds if kind != "depth"]
    layers = sorted({dim.layer for dim in found.dims if dim.layer is not None})
    axes: list[_Axis] = []
    if "depth" in found.kinds:
        every = blocks(found.dims)
        axes.append(_Axis(("blocks",), _blocks_kept(found, every), lambda v: f"{v:.0f}"))
    thirds = 3 * len(kinds) <= _MOST - 2 and len(layers) >= 3
    for kind in kinds:
        if thirds and any(dim.kind == kind and dim.layer is not None for dim in found.dims):
            axes += _thirds(found, kind, layers)
        else:
            axes.append(_Axis((kind_title(kind),), _share(found, kind, None), _percent))
    for cost in found.costs[: max(1, _MOST - 1 - len(axes))]:
        title = _SHORT.get(cost, COST_TITLES[cost].removesuffix(" (ms)"))
        axes.append(_Axis((title,), *_cost(found, cost)))
    axes.append(_Axis((found.quality,), lambda point: point.quality, lambda v: f"{v:.3g}"))
    return axes


def _thirds(found: Searched, kind: str, layers: list[int]) -> list[_Axis]:
    ends = [round(part * len(layers) / 3) for part in range(4)]
    axes = []
    for start, end in pairwise(ends):
        span = range(layers[start], layers[end - 1] + 1)
        spelt = f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}"
        title = (kind_title(kind), spelt)
        axes.append(_Axis(title, _share(found, kind, span), _percent))
    return axes


def _share(found: Searched, kind: str, layers: range | None) -> Callable[[Point], float | None]:
    return lambda point: mean_share(point, found.dims, kind, layers)


def _blocks_kept(found: Searched, layers: list[int]) -> Callable[[Point], float | None]:
    return lambda point: float(len(set(layers) - left_out(point.config, found.dims)))


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _cost(
    found: Searched, cost: str
) -> tuple[Callable[[Point], float | None], Callable[[float], str]]:
    """Return a cost relative to the largest; as it is where that is not known."""
    if found.largest.get(cost):
        return (lambda point: found.relative(cost, point.costs.get(cost))), _percent
    return (lambda point: point.costs.get(cost)), lambda value: f"{value:.3g}"
