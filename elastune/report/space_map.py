"""A generated search space: what every point keeps of every layer's heads and feed-forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastune.report.layers import split_name
from elastune.report.load import RunData
from elastune.report.markup import Figure
from elastune.report.plots import opacity_of, shown_label
from elastune.report.quantities import DASH, TIMES
from elastune.report.svg import CHARACTER_WIDTH, WIDTH, drawing, tag, text, tip

_HALVES = {"heads": "heads", "ffn": "feed-forward channels"}
_COSTS = {
    "macs": "MACs of the blocks",
    "params": "parameters of the blocks",
    "latency": "latency of the model",
}
_TALL = 18.0


@dataclass(frozen=True)
class Cell:
    """What one layer keeps of ``full``; None where the whole block is left out."""

    size: float | None
    full: float
    hint: str


def space_figures(run: RunData) -> list[Figure | None]:
    """Draw heads and feed-forward side by side: a row for each point, a column for each layer."""
    made = run.generated
    if not made:
        return []
    points = sorted(made["points"], key=lambda point: point["target"], reverse=True)
    labels = [_label(point) for point in points]
    drawn: list[Figure | None] = []
    for part, noun in _HALVES.items():
        layers, rows = _rows(made, points, part)
        title = f"Generated space: {noun}"
        cells = [cell for row in rows for cell in row]
        if not cells:
            continue
        if all(cell.size == cell.full for cell in cells):
            drawn.append(Figure(title, "", f"Every point keeps all {noun} of every layer."))
            continue
        svg = cell_map(labels, layers, rows, f"{noun} by point and layer")
        drawn.append(Figure(title, svg, _note(made, points), cell_legend(cells)))
    return drawn


def _label(point: Mapping[str, Any]) -> str:
    return f"{100 * point['target']:.3g} % ({100 * point['cost']:.1f})"


def _note(made: Mapping[str, Any], points: Sequence[Any]) -> str:
    cost = _COSTS.get(made["made_from"].get("cost", ""), "cost")
    removed = made["removed_blocks"]
    words = ", ".join(map(str, removed))
    gone = f" Layers that no point has: {words}." if removed else ""
    return f"{len(points)} points by {cost}: target (reached), of the full model's.{gone}"


def _rows(
    made: Mapping[str, Any], points: Sequence[Mapping[str, Any]], part: str
) -> tuple[list[int], list[list[Cell]]]:
    """Return the numbers of the full model's layers that have this half, and a row a point."""
    sizes = made["made_from"]["full_sizes"]
    full = {}
    for name, size in sizes.items():
        layer, role = split_name(name)
        if layer is not None and role == part and size:
            full[layer] = size
    removed = set(made["removed_blocks"])
    rows = []
    for point in points:
        row = []
        for layer in sorted(full):
            place = f"layers.{layer - sum(gone < layer for gone in removed)}"
            config = point["config"]
            size = config.get(f"{place}.{part}", full[layer])
            is_out = layer in removed or config.get(f"{place}.block", 1) == 0
            kept = "the layer is left out" if is_out else f"{size} of {full[layer]}"
            hint = f"{_label(point)}, layer {layer} {part}: {kept}"
            row.append(Cell(None if is_out else size, full[layer], hint))
        rows.append(row)
    return sorted(full), rows


def cell_map(
    labels: Sequence[str], layers: Sequence[int], rows: Sequence[Sequence[Cell]], title: str
) -> str:
    """Draw a row for each label and a column for each layer.

    A dash stands for what is absent from a block, a cross for a block that is left out.
    """
    labels = list(map(shown_label, labels))
    left = 12 + CHARACTER_WIDTH * max(map(len, labels))
    wide = min((WIDTH - left - 8) / len(layers), 40.0)
    y, parts = 6.0, []
    for label, row in zip(labels, rows, strict=True):
        parts.append(text(left - 7, y + 13, label, text_anchor="end", class_="name"))
        for index, cell in enumerate(row):
            parts.append(_cell(cell, left + index * wide, y, wide - min(1.0, wide / 5)))
        y += _TALL
    every = next(k for k in (1, 2, 5, 10, 20, 50, 100) if k * wide >= 22 or k >= 100)
    for index, layer in enumerate(layers):
        if index % every == 0:
            middle = left + (index + 0.5) * wide
            parts.append(text(middle, y + 15, str(layer), text_anchor="middle"))
    parts.append(text(left - 7, y + 15, "layer", class_="label", text_anchor="end"))
    return drawing(y + 24, title, *parts)


def _cell(cell: Cell, x: float, y: float, wide: float) -> str:
    box = {"x": x, "y": y, "width": wide, "height": _TALL - 1}
    hint = tip(cell.hint)
    if cell.size:
        opacity = f"{opacity_of(cell.size / cell.full):.2f}"
        return tag("rect", hint, class_="heat", fill_opacity=opacity, **box)
    # Empty, but there to be pointed at.
    ground = tag("rect", hint, class_="heat", fill_opacity="0", **box)
    reach, middle_x, middle_y = min(wide / 2 - 1, 4.0), x + wide / 2, y + (_TALL - 1) / 2
    ends = {"x1": middle_x - reach, "x2": middle_x + reach}
    if cell.size == 0:
        return ground + tag("line", class_="tick", y1=middle_y, y2=middle_y, **ends)
    return ground + "".join(
        tag("line", class_="tick", y1=middle_y - s * reach, y2=middle_y + s * reach, **ends)
        for s in (-1, 1)
    )


def cell_legend(
    cells: Sequence[Cell], absent: str = "half absent"
) -> tuple[tuple[str, str, str], ...]:
    """Return the legend of the marks that `cell_map` draws these cells with."""
    legend = [
        ("heat", f"{opacity_of(share):.2f}", f"{100 * share:.0f} %") for share in (1.0, 0.5, 0.05)
    ]
    legend.append(("text", "", "of all"))
    if any(cell.size == 0 for cell in cells):
        legend.append(("text", "", f"{DASH} {absent}"))
    if any(cell.size is None for cell in cells):
        legend.append(("text", "", f"{TIMES} layer left out"))
    return tuple(legend)
