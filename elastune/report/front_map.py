"""What the members of the front keep, block by block: a row for each, cheapest at the bottom."""

from __future__ import annotations

from collections.abc import Sequence

from elastune.report.markup import Figure
from elastune.report.quantities import DASH
from elastune.report.space_map import Cell, cell_legend, cell_map
from elastune.report.trials import Dim, Point, Searched, kind_title, left_out

MOST = 12
"""Members that are shown; of more, as many, spread evenly over the costs."""
_MOST_ROLES = 4
_LONGEST = 18


def shown_members(found: Searched) -> list[Point]:
    """Return at most `MOST` members of the front, cheapest first; its ends and the best stay."""
    front = found.front
    if len(front) <= MOST:
        return front
    places = {round(n * (len(front) - 1) / (MOST - 1)) for n in range(MOST)}
    if found.best in front and front.index(found.best) not in places:
        best = front.index(found.best)
        inner = places - {0, len(front) - 1}
        places = places - {min(inner, key=lambda place: abs(place - best))} | {best}
    return [front[place] for place in sorted(places)]


def front_maps(found: Searched) -> list[Figure | None]:
    """Draw a map for each role of dims, of many roles for each kind; none for one member."""
    members = shown_members(found)[::-1]
    if len(members) < 2:
        return []
    groups: dict[str, list[Dim]] = {}
    placed = [dim for dim in found.dims if dim.layer is not None and dim.kind != "depth"]
    roles = {_role(dim) for dim in placed}
    for dim in placed:
        group = _role(dim) if len(roles) <= _MOST_ROLES else kind_title(dim.kind)
        groups.setdefault(group, []).append(dim)
    labels = [_label(point, found) for point in members]
    skipped = len(found.front) - len(members)
    note = f"{len(members)} of {len(found.front)} members." if skipped else ""
    return [_map(name, dims, found, members, labels, note) for name, dims in groups.items()]


def _role(dim: Dim) -> str:
    """Name what a dim cuts in its block: the kind, and for adapters the part of the block."""
    kind = kind_title(dim.kind)
    return f"{kind} of {dim.name.rpartition('.')[2]}" if dim.kind == "rank" else kind


def _map(
    name: str,
    dims: Sequence[Dim],
    found: Searched,
    members: Sequence[Point],
    labels: Sequence[str],
    note: str,
) -> Figure | None:
    by_layer: dict[int, list[Dim]] = {}
    for dim in dims:
        if dim.layer is not None:
            by_layer.setdefault(dim.layer, []).append(dim)
    layers = sorted(by_layer)
    rows = [
        [_cell(point, layer, by_layer[layer], label, found) for layer in layers]
        for point, label in zip(members, labels, strict=True)
    ]
    cells = [cell for row in rows for cell in row]
    title = f"The front by layer: {name}"
    if all(cell.size == cell.full for cell in cells):
        return Figure(title, "", "Every member keeps the largest choice everywhere.")
    svg = cell_map(labels, layers, rows, f"{name} of the front by layer")
    absent = "rank 0" if dims[0].kind == "rank" else "absent"
    return Figure(title, svg, note, cell_legend(cells, absent))


def _cell(point: Point, layer: int, dims: Sequence[Dim], label: str, found: Searched) -> Cell:
    """Return the mean part of the largest choice over the dims of one layer."""
    if layer in left_out(point.config, found.dims):
        return Cell(None, 1.0, f"{point.key}, layer {layer}: left out")
    share = sum(dim.share(point.config) for dim in dims) / len(dims)
    choices = ", ".join(
        f"{point.config.get(dim.name)} of {dim.largest:g}" for dim in dims if dim.largest
    )
    hint = f"{point.key}, layer {layer}: {choices}"
    return Cell(share, 1.0, hint)


def _label(point: Point, found: Searched) -> str:
    """Name a member, and tell its cost as a part of the largest's where that is known."""
    name = "best" if point is found.best else (point.label.split(",")[0] or f"#{point.number}")
    name = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
    if found.cost is None:
        return name
    share = found.relative(found.cost, point.costs.get(found.cost))
    return f"{name} {DASH}" if share is None else f"{name} {100 * share:.0f} %"
