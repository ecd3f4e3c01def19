"""What was kept, layer by layer: sub-networks, choices drawn in training, zeros of the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from elastune.errors import BadArtifact
from elastune.report.layers import grid, largest_choices, share_of, uniform_text
from elastune.report.load import RunData
from elastune.report.markup import Figure
from elastune.report.plots import Bar, bar_chart, heatmap, opacity_of
from elastune.report.results import System


def subnet_map(run: RunData, rows: Sequence[System]) -> Figure | None:
    """Draw what each sub-network keeps, layer by layer; uniform ones are told in words."""
    configs = {
        row.name: row.config for row in rows if row.config and not row.baseline and not row.on_front
    }
    if not configs:
        return None
    words = {name: uniform_text(config) for name, config in configs.items()}
    note = "; ".join(f"{name}: {word}" for name, word in words.items() if word)
    note = f"Not drawn, uniform: {note}." if note else ""
    drawn = {name: configs[name] for name, word in words.items() if word is None}
    if not drawn:
        return Figure("Sub-networks", "", "; ".join(f"{n}: {w}" for n, w in words.items()) + ".")
    tops = largest_choices(run.space, configs.values())
    labels: list[str] = []
    gaps: list[int] = []
    layers: set[int] = set()
    cells: dict[tuple[str, int], tuple[float, str]] = {}
    for name, config in drawn.items():
        roles, numbers, values = grid({dim: (dim, choice) for dim, choice in config.items()})
        gaps.append(len(labels))
        labels += [f"{name} {role}" for role in roles]
        layers.update(numbers)
        for (role, layer), (dim, choice) in values.items():
            share = share_of(choice, tops.get(dim))
            cells[f"{name} {role}", layer] = (share, f"{name}, {dim}: {choice}")
    if not cells:
        return None
    seen = sorted({round(share, 4) for share, _ in cells.values()}, reverse=True)
    low = min(0.5, min(seen))
    svg = heatmap(
        labels,
        sorted(layers),
        cells,
        domain=(low, 1.0),
        x_label="layer",
        title="choices by layer",
        gaps=gaps[1:],
    )
    steps = seen if len(seen) <= 5 else [1.0, (1 + low) / 2, low]
    legend = [_heat_key((s - low) / (1 - low or 1), f"{100 * s:.0f} %") for s in steps]
    legend.append(("text", "", "of the largest choice"))
    return Figure("Sub-networks, layer by layer", svg, note, tuple(legend))


def _heat_key(share: float, words: str) -> tuple[str, str, str]:
    return "heat", f"{opacity_of(share):.2f}", words


def choice_draws(run: RunData) -> Figure | None:
    """Draw how often training drew each choice, over all dims of a kind.

    Raises:
        BadArtifact: the training log has another number of dims than the space.
    """
    curve = run.curves.get("supernet")
    if curve is None or not curve.draws or run.space is None:
        return None
    dims = run.space["dims"]
    if len(dims) != len(curve.draws):
        raise BadArtifact(
            f"{run.path / 'supernet/train.jsonl'}: configs of {len(curve.draws)} dims, "
            f"but space.json has {len(dims)}",
            try_="the two files are of different runs: run the training stage again",
        )
    groups: dict[str, list[tuple[str, list[float]]]] = {}
    for kind in dict.fromkeys(dim["kind"] for dim in dims):
        pairs = [(d, c) for d, c in zip(dims, curve.draws, strict=True) if d["kind"] == kind]
        groups[kind] = _shares(pairs)
    bars = [
        Bar(
            label,
            sum(shares) / len(shares),
            f"{100 * sum(shares) / len(shares):.1f} %",
            f"{label}: {_range(shares)} over {len(shares)} dims",
            low=min(shares),
            high=max(shares),
            gap=bool(number) and not place,
        )
        for number, group in enumerate(groups.values())
        for place, (label, shares) in enumerate(group)
    ]
    total = sum(curve.draws[0].values())
    note = f"Mean over the dims; whiskers: lowest and highest dim. {total:,} sub-networks drawn."
    return Figure("Choices drawn in training", bar_chart(bars, title="choices drawn"), note)


def _shares(pairs: Sequence[tuple[Mapping[str, Any], Any]]) -> list[tuple[str, list[float]]]:
    """Per choice, its share of the draws of every dim that offers it."""
    lists = {tuple(map(str, dim["choices"])) for dim, _ in pairs}
    # Dims with lists of their own have no common choice: count by place in the list.
    by_value = len({choice for choices in lists for choice in choices}) <= 10
    shares: dict[str, list[float]] = {}
    for dim, counter in pairs:
        total = sum(counter.values()) or 1
        for index, choice in enumerate(dim["choices"]):
            label = f"{dim['kind']} {choice if by_value else f'choice {index + 1}'}"
            shares.setdefault(label, []).append(counter[index] / total)
    return list(shares.items())


def _range(shares: Sequence[float]) -> str:
    return f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %"


def sparsity_map(run: RunData) -> Figure | None:
    """Draw the sparsity of every weight of the base: roles by layers."""
    if not run.sparsity or not run.sparsity["tensors"] or not run.sparsity["total"]["sparsity"]:
        return None
    tensors = run.sparsity["tensors"]
    roles, layers, found = grid(tensors)
    if not layers:
        return None
    cells = {}
    for (role, layer), row in found.items():
        shape = " x ".join(map(str, row["shape"]))
        hint = f"layer {layer} {role} ({shape}): {100 * row['sparsity']:.1f} % zeros"
        cells[role, layer] = (row["sparsity"], hint)
    values = [value for value, _ in cells.values()]
    low, high = math.floor(min(values) * 10) / 10, math.ceil(max(values) * 10) / 10
    low, high = (max(low - 0.1, 0.0), min(high + 0.1, 1.0)) if high - low < 0.2 else (low, high)
    svg = heatmap(
        roles, layers, cells, domain=(low, high), x_label="layer", title="sparsity by layer"
    )
    steps = [low + (high - low) * k / 2 for k in range(3)]
    legend = [_heat_key(k / 2, f"{100 * step:.0f} %") for k, step in enumerate(steps)]
    span = f"{_range(values)} zeros"
    if max(values) - min(values) < 0.001:
        span = f"{100 * values[0]:.1f} % zeros in every one"
    note = f"{len(values)} weights, {span}."
    return Figure("Sparsity by layer", svg, note, tuple(legend))
