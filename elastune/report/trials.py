"""The trials of a search as points: what they are called, what they cost, what they keep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastune.report.layers import largest_choices, share_of, split_name
from elastune.report.load import RunData
from elastune.report.quantities import is_number
from elastune.report.results import FRONT, ORDER, System

COST_TITLES = {
    "params": "parameters",
    "nonzero": "non-zeros",
    "macs": "MACs",
    "block_macs": "MACs of the blocks",
    "decode_macs": "MACs a decoded token",
    "latency_ms": "latency (ms)",
    "decode_latency_ms": "latency a decoded token (ms)",
    "memory_bytes": "memory (bytes)",
}
COSTS = tuple(COST_TITLES)
_HALVES = ("heads", "ffn")
KIND_TITLES = {"rank": "ranks", "ffn": "feed-forward", "depth": "blocks"}


@dataclass(frozen=True)
class Dim:
    """A decision of the search space; ``layer`` is None for what belongs to no block."""

    name: str
    kind: str
    layer: int | None
    choices: tuple[Any, ...]
    largest: float | None

    def share(self, config: Mapping[str, Any]) -> float:
        """Return what a configuration takes, as a part of the largest choice."""
        return share_of(config.get(self.name), self.largest)


@dataclass(frozen=True)
class Point:
    """A trial, or one of the random sub-networks that the search is held against.

    Attributes:
        key: ``trial 12`` or ``random 3``.
        quality: None where it failed.
        costs: those that are known, by name.
        state: ``front``, ``trial``, ``dropped`` (its quality is an estimate), ``failed`` or
            ``random``.
        names: of the same sub-network among the scored ones.
        equivalents: work in whole evaluations; None where it was not kept.
        breaks: names of the limits of the search that it breaks.
    """

    key: str
    number: int
    config: Mapping[str, Any]
    quality: float | None
    costs: Mapping[str, float]
    state: str
    names: tuple[str, ...] = ()
    equivalents: float | None = None
    breaks: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it was measured on all examples."""
        return self.state in ("front", "trial", "random")

    @property
    def label(self) -> str:
        """What it is called beside its mark: two of its names at most, those of fronts left out."""
        shown = [name for name in self.names if not name.startswith(FRONT)]
        return ", ".join(shown[:2]) + (", …" if len(shown) > 2 else "")


@dataclass(frozen=True)
class Searched:
    """What a search found, ready to be drawn.

    Attributes:
        quality: name of the value that is to be small.
        cost: name of the cost that is an objective besides; None where quality is the only one.
        costs: names of the costs that can be drawn, the objective first.
        points: the trials, then the random sub-networks.
        largest: costs of the largest sub-network, as far as they are known.
        bounds: limit of a value: lowest and highest, None where there is none.
    """

    quality: str
    cost: str | None
    costs: tuple[str, ...]
    points: tuple[Point, ...]
    dims: tuple[Dim, ...]
    best: Point | None
    largest: Mapping[str, float]
    bounds: Mapping[str, tuple[float | None, float | None]]
    about: Mapping[str, Any]

    @property
    def trials(self) -> list[Point]:
        """The points that the search itself tried."""
        return [point for point in self.points if point.state != "random"]

    @property
    def front(self) -> list[Point]:
        """The Pareto front, cheapest first."""
        members = [point for point in self.points if point.state == "front"]
        cost = self.cost
        return sorted(members, key=lambda p: (p.costs[cost] if cost else 0.0, p.number))

    @property
    def kinds(self) -> list[str]:
        """Kinds of dims, in the order of the space."""
        return list(dict.fromkeys(dim.kind for dim in self.dims))

    def relative(self, cost: str, value: float | None) -> float | None:
        """Return a cost as a part of the largest sub-network's; None where that is not known."""
        top = self.largest.get(cost)
        return value / top if value is not None and top else None

    def front_by(self, cost: str) -> list[Point]:
        """Return what no whole trial beats in quality and in ``cost``, cheapest first."""
        if cost == self.cost:
            return self.front
        known = [p for p in self.trials if p.whole and cost in p.costs]
        members: list[Point] = []
        for point in sorted(known, key=lambda p: (p.costs[cost], p.quality, p.number)):
            if not members or point.quality < members[-1].quality:  # type: ignore[operator]
                members.append(point)
        return members


def searched(run: RunData, rows: Sequence[System]) -> Searched | None:
    """Gather the trials of a run; None where nothing was searched, or nothing can be drawn."""
    if run.search is None:
        return None
    configs = [trial["config"] for trial in run.search["trials"]]
    return from_search(run.search, dims_of(run.space, configs), rows)


def from_search(
    search: Mapping[str, Any], dims: Sequence[Dim], rows: Sequence[System] = ()
) -> Searched | None:
    """Gather the trials of ``search/trials.json``; None where no value of quality is among them."""
    trials = search["trials"]
    about = search.get("about") or {}
    keys = list(dict.fromkeys(key for trial in trials for key in trial["values"]))
    quality = next((key for key in keys if key not in COSTS), None)
    if quality is None:
        return None
    cost = next((key for key in keys if key in COSTS), None)
    named = _names(dims, rows)
    front = set(search.get("pareto") or ())
    bounds = _bounds(about)
    points = [_point(t, quality, cost, front, named, bounds) for t in trials]
    points += [
        _point(t, quality, cost, set(), named, bounds, random=True)
        for t in about.get("random") or ()
    ]
    if all(point.quality is None for point in points):
        return None
    # What costs nothing for all, such as a decoded token of an encoder, is none of their costs.
    found = {key for point in points for key, value in point.costs.items() if value}
    order = sorted(found, key=lambda key: (key != cost, COSTS.index(key)))
    return Searched(
        quality=quality,
        cost=cost,
        costs=tuple(order),
        points=tuple(points),
        dims=tuple(dims),
        best=_best(points, search.get("best"), bounds),
        largest=_largest(points, dims, rows),
        bounds=bounds,
        about=about,
    )


def dims_of(
    space: Mapping[str, Any] | None, configs: Sequence[Mapping[str, Any]]
) -> tuple[Dim, ...]:
    """Return the dims of ``space.json``; without it, those that the configurations have."""
    tops = largest_choices(space, configs)
    if space is not None:
        parts = [(dim["name"], dim["kind"], dim["choices"]) for dim in space["dims"]]
    else:
        parts = []
        for name in dict.fromkeys(name for config in configs for name in config):
            used = {json.dumps(c[name]): c[name] for c in configs if name in c}
            ordered = sorted(used.values(), key=lambda v: (is_number(v) and -v, str(v)))
            parts.append((name, split_name(name)[1], ordered))
    return tuple(
        Dim(name, kind, split_name(name)[0], tuple(choices), tops.get(name))
        for name, kind, choices in parts
    )


def _point(
    trial: Mapping[str, Any],
    quality: str,
    cost: str | None,
    front: set[int],
    named: Mapping[str, tuple[str, ...]],
    bounds: Mapping[str, tuple[float | None, float | None]],
    random: bool = False,
) -> Point:
    known = {**(trial.get("measured") or {}), **trial["values"]}
    number, value = trial["number"], trial["values"].get(quality)
    state = "front" if number in front else "trial"
    if not is_number(value) or (cost is not None and not is_number(known.get(cost))):
        state, value = "failed", None
    elif random:
        state = "random"
    elif trial.get("dropped"):
        state = "dropped"
    return Point(
        key=f"{'random' if random else 'trial'} {number}",
        number=number,
        config=trial["config"],
        quality=value,
        costs={key: float(known[key]) for key in COSTS if is_number(known.get(key))},
        state=state,
        names=named.get(_spelt(trial["config"]), ()),
        equivalents=trial.get("equivalents"),
        breaks=tuple(name for name, pair in bounds.items() if not _within(known.get(name), pair)),
    )


def _within(value: Any, pair: tuple[float | None, float | None]) -> bool:
    low, high = pair
    return not is_number(value) or (
        (low is None or value >= low) and (high is None or value <= high)
    )


def _bounds(about: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    found = {}
    for name, pair in (about.get("bounds") or {}).items():
        low, high = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        found[name] = (low if is_number(low) else None, high if is_number(high) else None)
    return found


def _best(
    points: Sequence[Point],
    number: int | None,
    bounds: Mapping[str, tuple[float | None, float | None]],
) -> Point | None:
    """Return what was chosen: the scored "best"; else the best within the limits; else as told."""
    trials = [point for point in points if point.state in ("front", "trial")]
    for point in trials:
        if "best" in point.names:
            return point
    if bounds:
        within = [point for point in trials if not point.breaks]
        return min(within, key=lambda p: (p.quality, p.number), default=None)
    return next((point for point in trials if point.number == number), None)


def _names(dims: Sequence[Dim], rows: Sequence[System]) -> dict[str, tuple[str, ...]]:
    """Return the names of configurations: of the scored ones, and of those that need no search."""
    rank = {name: place for place, name in enumerate((*ORDER[::-1], FRONT))}
    named: dict[str, Mapping[str, Any]] = {
        row.name: row.config for row in rows if row.config and not row.baseline
    }
    if all(dim.choices for dim in dims):
        for name, place in (("largest", 0.0), ("heuristic", 0.5), ("smallest", 1.0)):
            named.setdefault(name, {d.name: d.choices[_index(len(d.choices), place)] for d in dims})
    found: dict[str, list[str]] = {}
    for name, config in named.items():
        found.setdefault(_spelt(config), []).append(name)
    return {
        config: tuple(sorted(names, key=lambda name: rank.get(name, len(rank))))
        for config, names in found.items()
    }


def _index(count: int, place: float) -> int:
    """Return the first, the middle (as Shears counts it) or the last index of a list."""
    return min(int(place * count), count - 1)


def _largest(
    points: Sequence[Point], dims: Sequence[Dim], rows: Sequence[System]
) -> dict[str, float]:
    """Return the costs of the largest sub-network, from its trial and from its row of scores."""
    found: dict[str, float] = {}
    for row in rows:
        if row.name == "largest":
            costs = {key: getattr(row, key, None) for key in COSTS}
            found |= {key: float(value) for key, value in costs.items() if value is not None}
    # What the search was told comes before what was measured later.
    for point in points:
        if dims and all(
            point.config.get(dim.name) == dim.choices[0] for dim in dims if dim.choices
        ):
            found |= point.costs
    return found


def _spelt(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def mean_share(
    point: Point, dims: Sequence[Dim], kind: str, layers: range | None = None
) -> float | None:
    """Return the mean part of the largest choice, over the dims of a kind (in some layers)."""
    shares = [
        dim.share(point.config)
        for dim in dims
        # What can only be left out is no choice.
        if dim.kind == kind
        and dim.largest != 0
        and (layers is None or (dim.layer is not None and dim.layer in layers))
    ]
    return sum(shares) / len(shares) if shares else None


def left_out(config: Mapping[str, Any], dims: Sequence[Dim]) -> set[int]:
    """Return the layers that a configuration leaves out, whole or both halves one by one."""
    gone = {d.layer for d in dims if d.kind == "depth" and not config.get(d.name)}
    halves: dict[int, dict[str, bool]] = {}
    for dim in dims:
        if dim.kind in _HALVES and dim.layer is not None:
            halves.setdefault(dim.layer, {})[dim.kind] = bool(config.get(dim.name))
    gone |= {layer for layer, kept in halves.items() if len(kept) == 2 and not any(kept.values())}
    return {layer for layer in gone if layer is not None}


def blocks(dims: Sequence[Dim]) -> list[int]:
    """Return the layers of a space whose blocks are elastic; none where only ranks are."""
    kinds = {dim.kind for dim in dims}
    if not kinds & {*_HALVES, "depth"}:
        return []
    return sorted({dim.layer for dim in dims if dim.layer is not None})


def kind_title(kind: str) -> str:
    """Name a kind of dims in words."""
    return KIND_TITLES.get(kind, kind)


def thinned(points: Sequence[Point], most: int) -> Iterator[Point]:
    """Yield every named point and the front, and evenly as many of the others as fit."""
    others = [p for p in points if p.state != "front" and not p.names]
    every = -(-len(others) // most) or 1
    kept = set(map(id, others[::every]))
    return (p for p in points if p.state == "front" or p.names or id(p) in kept)
