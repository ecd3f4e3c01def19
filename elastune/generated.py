"""A generated search space and the points that it was made of. No torch.

A generator (`elastune.generate_space`) finds one sub-network for each of a few budgets; the space
is what they have between them (EFTNAS, Munoz et al. 2024, section 3.3): each dim's choices are the
sizes that it has in some point.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from elastune.errors import BadArtifact, InvalidSpace, InvalidSubnet
from elastune.space import ElasticDim, SearchSpace, SubnetConfig

SCHEMA = 1


@dataclass(frozen=True)
class Point:
    """One sub-network that a space was made of.

    Attributes:
        target: wanted cost, a part of the full model's.
        cost: reached cost, likewise.
        threshold: units with a larger score are kept; None where no score was cut at, as in the
            full model.
        config: the sub-network, of the generated space.
    """

    target: float
    cost: float
    threshold: float | None
    config: SubnetConfig


@dataclass(frozen=True)
class GeneratedSpace:
    """What a generator returns.

    Attributes:
        space: the union of the points, over the model without ``removed_blocks``.
        points: one for each target, in the order of the targets.
        removed_blocks: numbers, in the full model, of the blocks that no point has. Take them out
            with `elastune.drop_blocks.drop_blocks_` before a super-network is made.
        made_from: generator, unit of the cost, bounds, options, cost of the full model, seconds;
            ``full_sizes``: size of each half in the full model, by the full model's numbers.
    """

    space: SearchSpace
    points: tuple[Point, ...]
    removed_blocks: tuple[int, ...] = ()
    made_from: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``generated.json``."""
        return {
            "schema": SCHEMA,
            "space": self.space.to_dict(),
            "points": [
                {
                    "target": point.target,
                    "cost": point.cost,
                    "threshold": point.threshold,
                    "config": dict(point.config),
                }
                for point in self.points
            ],
            "removed_blocks": list(self.removed_blocks),
            "made_from": dict(self.made_from),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GeneratedSpace:
        """Build what `to_dict` was called on.

        Raises:
            BadArtifact: another schema, a field that is missing or of the wrong type, or a point
                that is not in the space.
        """
        try:
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']!r}, this version reads {SCHEMA}")
            space = SearchSpace.from_dict(data["space"])
            points = tuple(_point(row) for row in data["points"])
            for point in points:
                space.check(point.config)
            removed = tuple(int(number) for number in data["removed_blocks"])
            return cls(space, points, removed, dict(data["made_from"]))
        except (KeyError, TypeError, ValueError, InvalidSpace, InvalidSubnet) as error:
            raise BadArtifact(
                f"not a generated space: {error!r}", try_="generate it again"
            ) from error


def _point(row: Mapping[str, Any]) -> Point:
    threshold = row["threshold"]
    return Point(
        float(row["target"]),
        float(row["cost"]),
        None if threshold is None else float(threshold),
        SubnetConfig(row["config"]),
    )


def spaced_targets(
    low: float | None, high: float | None, points: int | Sequence[float]
) -> tuple[float, ...]:
    """Return the targets: parts of the full cost.

    Args:
        low: the smallest, above 0.
        high: the largest, at most 1.
        points: how many, equally spaced, ``low`` and ``high`` included; or the targets themselves,
            in the place of ``low`` and ``high``.

    Raises:
        InvalidSpace: bounds or targets that cannot be.
    """
    if not isinstance(points, int):
        targets = tuple(float(target) for target in points)
        wrong = [target for target in targets if not 0 < target <= 1]
        if wrong or not targets:
            raise InvalidSpace(
                f"targets are parts of the full cost, above 0 and at most 1, got {wrong or 'none'}",
                try_="such as points=[0.25, 0.5, 0.75]",
            )
        return targets
    if low is None or high is None or not 0 < low <= high <= 1:
        raise InvalidSpace(
            f"low and high are parts of the full cost with 0 < low <= high <= 1, got {low}, {high}",
            try_="such as low=0.2, high=1.0",
        )
    if points < 1 or (points == 1 and low != high):
        raise InvalidSpace(
            f"{points} points cannot hold both low ({low}) and high ({high})",
            try_="points=2 or more, or targets of your own such as points=[0.5]",
        )
    step = (high - low) / max(points - 1, 1)
    return (*(low + step * number for number in range(points - 1)), high)


@dataclass(frozen=True)
class Candidate:
    """One sub-network that a generator found, over the dims of the full model."""

    target: float
    cost: float
    config: SubnetConfig
    threshold: float | None = None


def generated(
    dims: Sequence[ElasticDim],
    candidates: Sequence[Candidate],
    made_from: Mapping[str, Any],
    full_sizes: Mapping[str, int],
) -> GeneratedSpace:
    """Unite sub-networks to a space.

    Dims take the sizes that they have where their block stands. One that has its full size
    everywhere is left out of the space; a block that no candidate has leaves the model.

    Args:
        dims: of the full model. Dims of kind depth say which module a block is.
        candidates: choices for exactly these dims, any sizes.
        made_from: as in `GeneratedSpace`.
        full_sizes: dim name -> the choice that is the same as no dim at all.

    Raises:
        InvalidSpace: nothing is left to choose or to cut.
    """
    configs = [candidate.config for candidate in candidates]
    depth = [dim for dim in dims if dim.kind == "depth"]
    gone = [dim for dim in depth if not any(config[dim.name] for config in configs)]
    rename = _Renaming([dim.modules[0] for dim in gone])
    united: list[tuple[str, ElasticDim]] = []  # name in the full model, dim
    for dim in dims:
        owner = _owner(dim, depth)
        standing = [c for c in configs if owner is None or dim is owner or c[owner.name]]
        sizes = tuple(sorted({config[dim.name] for config in standing}, reverse=True))
        new = rename.dim(dim, sizes)
        if new is not None and sizes != (full_sizes.get(dim.name),):
            united.append((dim.name, new))
    if not united:
        raise InvalidSpace(
            "all points are the same model, so that nothing is elastic",
            try_="lower targets, or another tolerance",
        )
    space = SearchSpace([dim for _, dim in united])
    points = [Point(c.target, c.cost, c.threshold, _within(united, c.config)) for c in candidates]
    return GeneratedSpace(space, tuple(points), rename.removed, made_from)


def _within(united: Sequence[tuple[str, ElasticDim]], config: SubnetConfig) -> SubnetConfig:
    """Return a candidate as a configuration of the space."""
    # In a block that is left out the widths do not matter: the largest stands for all.
    return SubnetConfig(
        {
            dim.name: config[old] if config[old] in dim.choices else dim.choices[0]
            for old, dim in united
        }
    )


def _owner(dim: ElasticDim, depth: Sequence[ElasticDim]) -> ElasticDim | None:
    """Return the depth dim of the block that holds all modules of a dim."""
    return next((d for d in depth if all(_inside(m, d.modules[0]) for m in dim.modules)), None)


def _inside(module: str, block: str) -> bool:
    return f"{module}.".startswith(f"{block}.")


class _Renaming:
    """Names of modules and dims once some blocks are gone.

    Args:
        blocks: full names of the modules of the blocks that go, such as ``model.layers.3``.
    """

    def __init__(self, blocks: Sequence[str]) -> None:
        self._blocks = blocks
        self._container = blocks[0].rpartition(".")[0] if blocks else ""
        self.removed = tuple(sorted(int(name.rpartition(".")[2]) for name in blocks))

    def dim(self, dim: ElasticDim, choices: tuple[int, ...]) -> ElasticDim | None:
        """Return a dim with other choices under its new names; None where nothing is left."""
        left = [m for m in dim.modules if not any(_inside(m, block) for block in self._blocks)]
        if not left or not choices:
            return None
        modules = tuple(self._renumber(module, f"{self._container}.") for module in left)
        return replace(
            dim, name=self._renumber(dim.name, "layers."), choices=choices, modules=modules
        )

    def _renumber(self, name: str, prefix: str) -> str:
        match = re.match(rf"{re.escape(prefix)}(\d+)(?=\.|$)", name) if self._blocks else None
        if match is None:
            return name
        number = int(match[1])
        place = number - sum(gone < number for gone in self.removed)
        return f"{prefix}{place}{name[match.end() :]}"


def within(target: float, cost: float, tolerance: float) -> bool:
    """Tell whether a reached cost is as near to its target as asked for."""
    return math.isfinite(cost) and abs(cost - target) <= tolerance + 1e-9
