"""Which cuts to make for a budget: a knapsack over the loss that each single choice costs.

The loss increases of single choices add up almost exactly (reference measurement on SmolLM2-135M:
Pearson 0.99), so one pass of single measurements answers every budget. No torch.

A block that is left out neither costs nor loses anything by the choices of its own widths.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from elastune.errors import BadArtifact, BadData, InvalidSpace, nearest
from elastune.seals import with_checksum, without_checksum
from elastune.space import ElasticDim, SearchSpace, SubnetConfig

Losses = Mapping[str, Mapping[int, float]]
"""Dim -> choice -> increase of the loss when this choice alone differs from the base."""

CostOf = Callable[[SubnetConfig], float]
"""Configuration -> what it costs, in any unit."""

_SLACK = 1e-9
"""Part of the budget by which sums of floating-point costs may miss it."""
_TRIES = 50
_SECONDS = 60.0


def single_choice_losses(
    objective: Callable[[SubnetConfig], float],
    space: SearchSpace,
    base: SubnetConfig | None = None,
    *,
    kinds: Collection[str] | None = None,
    path: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[int, float]]:
    """Measure every choice of every dim alone.

    Args:
        objective: configuration -> loss.
        space: one measurement for each choice that is not the base's, and one for the base.
        base: all other dims' choices; the largest sub-network by default.
        kinds: kinds of dims that are measured; all by default.
        path: JSON lines, one for each measurement as it is made. What is there already is not
            measured again.
        progress: called with (measurements there are, measurements in all).

    Returns:
        Dim -> choice -> loss increase over the base; 0 for the base's own choices.

    Raises:
        InvalidSubnet: the base is not in the space.
        BadArtifact: the file at ``path`` belongs to another base, or is damaged.
    """
    base = space.largest() if base is None else base
    space.check(base)
    measured = _Measured(path, base)
    dims = [dim for dim in space.dims if kinds is None or dim.kind in kinds]
    wanted: list[tuple[str, int]] = [("", 0)]
    wanted += [(dim.name, c) for dim in dims for c in dim.choices if c != base[dim.name]]
    for done, (name, choice) in enumerate(wanted):
        if progress is not None:
            progress(done, len(wanted))
        if (name, choice) not in measured.losses:
            config = SubnetConfig({**base, name: choice}) if name else base
            measured.add(name, choice, float(objective(config)))
    if progress is not None:
        progress(len(wanted), len(wanted))
    zero = measured.losses["", 0]
    return {
        dim.name: {
            choice: 0.0 if choice == base[dim.name] else measured.losses[dim.name, choice] - zero
            for choice in dim.choices
        }
        for dim in dims
    }


def additive_loss(space: SearchSpace, losses: Losses, config: SubnetConfig) -> float:
    """Return the sum of a configuration's single-choice losses: what the knapsack minimises.

    Raises:
        InvalidSubnet: the configuration is not in the space.
        BadData: a dim of ``losses`` that the space lacks, or a choice without a loss.
    """
    space.check(config)
    _check_losses(space, losses)
    blocks = owners(space)
    counted = [name for name in losses if name not in blocks or config[blocks[name]] != 0]
    return sum(losses[name][config[name]] for name in counted)


def allocate(
    space: SearchSpace,
    losses: Losses,
    costs: CostOf,
    budget: float,
    *,
    at_least: float | None = None,
) -> SubnetConfig:
    """Return the configuration of the least summed loss that costs no more than a budget.

    An integer programme, solved exactly, in which costs are taken to add up over dims. Where they
    do not quite (the rank of an adapter times the width it follows) the answer's own cost is
    checked and the budget tightened until it holds; the answer is then good, not always the best.
    Blocks are never all left out.

    Args:
        space: of the configurations.
        losses: as `single_choice_losses` returns; a choice whose loss is not finite is never taken.
            Dims without losses stay at their largest.
        costs: called once for each choice alone, and for each answer.
        budget: largest cost, in the unit of ``costs``.
        at_least: least cost, where there is such a configuration. Measured losses are noisy, and
            where cuts seem to do good the best for a budget may be far below it.

    Returns:
        The configuration; dims inside a block that is left out are at their largest.

    Raises:
        BadData: a dim of ``losses`` that the space lacks, or a choice without a loss.
        InvalidSpace: nothing in the space is as cheap as the budget; the message says what is the
            cheapest.
    """
    return Knapsack(space, costs).allocate(losses, budget, at_least)


def uniform_config(
    space: SearchSpace, costs: CostOf, budget: float, *, kinds: Collection[str] = ("heads", "ffn")
) -> SubnetConfig:
    """Return equal cuts everywhere: the largest part of all widths that meets a budget.

    Every dim takes the choice nearest to the same part of its largest one (of two equally near,
    the larger). The baseline that `allocate` is compared with.

    Args:
        space: of the configurations.
        costs: configuration -> cost.
        budget: largest cost.
        kinds: kinds of dims that are cut; others stay at their largest.

    Raises:
        InvalidSpace: no equal cut is as cheap; the message says what is the cheapest.
    """
    cut = [dim for dim in space.dims if dim.kind in kinds and dim.choices[0] > 0]
    parts = sorted({choice / dim.choices[0] for dim in cut for choice in dim.choices} | {1.0})
    cost = math.inf
    for part in reversed(parts):
        nearest_choices = {
            dim.name: min(dim.choices, key=lambda c, d=dim: (abs(c - part * d.choices[0]), -c))  # type: ignore[misc]
            for dim in cut
        }
        config = SubnetConfig({**space.largest(), **nearest_choices})
        cost = costs(config)
        if cost <= budget * (1 + _SLACK):
            return config
    raise InvalidSpace(
        f"no equal cut costs {budget:.6g} or less: the smallest costs {cost:.6g}",
        try_="a larger budget, smaller choices, or cuts of more kinds",
    )


def spread_parts() -> Iterator[float]:
    """Yield 0, 1/2, 1/4, 3/4, 1/8, ...: any first few are spread evenly (van der Corput, 1935)."""
    for number in itertools.count():
        yield int(f"{number:b}"[::-1], 2) / 2 ** max(number.bit_length(), 1)


class Knapsack:
    """Choices as columns of 0 and 1, and the rules between them; solved for any number of budgets.

    Args:
        space: of the configurations.
        costs: called once for each choice alone, and for each answer.
    """

    def __init__(self, space: SearchSpace, costs: CostOf) -> None:
        self.cost_of = costs
        self.space = space
        self.columns = [(dim.name, choice) for dim in space.dims for choice in dim.choices]
        self.base = space.largest()
        self.base_cost = float(costs(self.base))
        self.costs = np.array(
            [
                float(costs(SubnetConfig({**self.base, name: choice}))) - self.base_cost
                if choice != self.base[name]
                else 0.0
                for name, choice in self.columns
            ]
        )
        # The solver's tolerances are absolute: numbers must be around 1.
        self.scale = max(float(np.abs(self.costs).max()), 1e-300)
        self.owners = owners(space)

    def allocate(
        self, losses: Losses, budget: float, at_least: float | None = None
    ) -> SubnetConfig:
        """Return what `allocate` says of these losses; an infinite budget is none."""
        _check_losses(self.space, losses)
        weights = np.array([_loss(losses, self.base, *column) for column in self.columns])
        allowed = np.isfinite(weights)
        weights = np.where(allowed, weights, 0.0)
        limit = float(budget)
        for _ in range(_TRIES):
            config = self._solve(weights, None if math.isinf(limit) else limit, allowed, at_least)
            if config is None and at_least is not None:
                at_least = None
                continue
            if config is None:
                break
            excess = self.cost_of(config) - budget
            if excess <= abs(budget) * _SLACK:
                return config
            limit -= max(excess, abs(budget) * _SLACK)
        config = self._solve(self.costs / self.scale, None, allowed)
        if config is None:
            raise InvalidSpace(
                "some dim has no choice of finite loss", try_="measure the losses anew"
            )
        cheapest = self.cost_of(config)
        if cheapest <= budget:
            return config
        raise InvalidSpace(
            f"no sub-network costs {budget:.6g} or less: the cheapest costs {cheapest:.6g}, "
            f"the largest {self.base_cost:.6g}",
            try_="a larger budget, or smaller choices",
        )

    def _solve(
        self,
        weights: np.ndarray,
        limit: float | None,
        allowed: np.ndarray,
        at_least: float | None = None,
    ) -> SubnetConfig | None:
        """Return the allowed configuration of the least weight within a limit; None if none is."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        rules, wanted = self._one_of_each()
        constraints = [LinearConstraint(rules, wanted, wanted)]
        if limit is not None:
            room = (limit - self.base_cost) / self.scale
            floor = -np.inf if at_least is None else (at_least - self.base_cost) / self.scale
            constraints.append(LinearConstraint(self.costs[None] / self.scale, floor, room))
        if _may_lose_all(self.space):
            kept = [float(self._keeps(name, choice)) for name, choice in self.columns]
            constraints.append(LinearConstraint(np.array([kept]), 1, np.inf))
        with _silent_solver():
            answer = milp(
                weights,
                integrality=np.ones(len(self.columns)),
                bounds=Bounds(0, allowed.astype(float)),
                constraints=constraints,
                options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
            )
        if answer.x is None:
            return None
        taken = [c for c, value in zip(self.columns, answer.x, strict=True) if value > 0.5]
        return SubnetConfig({**self.base, **dict(taken)})

    def _one_of_each(self) -> tuple[Any, np.ndarray]:
        """Each dim takes one choice; a dim inside a block that is left out takes none."""
        from scipy.sparse import lil_matrix

        row_of = {dim.name: row for row, dim in enumerate(self.space.dims)}
        rules = lil_matrix((len(row_of), len(self.columns)))
        for column, (name, _) in enumerate(self.columns):
            rules[row_of[name], column] = 1
        for name, owner in self.owners.items():
            for column, (other, choice) in enumerate(self.columns):
                if other == owner and choice:
                    rules[row_of[name], column] = -1
        wanted = np.array([float(dim.name not in self.owners) for dim in self.space.dims])
        return rules.tocsr(), wanted

    def _keeps(self, name: str, choice: int) -> bool:
        return choice != 0 and name in {d.name for d in self.space.dims if d.kind == "depth"}


@contextmanager
def _silent_solver() -> Iterator[None]:
    """Keep the solver's debug lines off standard output, which machines may be reading.

    It writes them from C++, past Python's own stream.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
            ctypes.CDLL(None).fflush(None)  # what C still holds back goes nowhere, too
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def owners(space: SearchSpace) -> dict[str, str]:
    """Return the depth dim of every dim whose modules are all in the blocks that it leaves out."""
    depth = [dim for dim in space.dims if dim.kind == "depth"]
    found = {}
    for dim in space.dims:
        if dim.kind != "depth":
            owner = next((d for d in depth if all(_inside(m, d) for m in dim.modules)), None)
            if owner is not None:
                found[dim.name] = owner.name
    return found


def _may_lose_all(space: SearchSpace) -> bool:
    """Tell whether the space knows no module outside of the blocks that can be left out."""
    depth = [dim for dim in space.dims if dim.kind == "depth"]
    others = [dim for dim in space.dims if dim.kind not in ("depth", "embedding")]
    modules = [m for dim in others for m in dim.modules]
    return bool(depth) and all(any(_inside(m, d) for d in depth) for m in modules)


def _inside(module: str, block: ElasticDim) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in block.modules)


def _loss(losses: Losses, base: SubnetConfig, name: str, choice: int) -> float:
    if name in losses:
        return losses[name][choice]
    return 0.0 if choice == base[name] else math.inf


def _check_losses(space: SearchSpace, losses: Losses) -> None:
    known = {dim.name: dim for dim in space.dims}
    for name in losses:
        if name not in known:
            raise BadData(
                f"there are losses of {name!r}, no dim of the space{nearest(name, known)}"
            )
        missing = [choice for choice in known[name].choices if choice not in losses[name]]
        if missing:
            raise BadData(
                f"{name}: no loss of {missing}; there are losses of {sorted(losses[name])}",
                try_="measure every choice of a dim: single_choice_losses does",
            )
    if not losses:
        raise BadData("there are no losses", try_="single_choice_losses measures them")


class _Measured:
    """Measurements on disk: one line for the base configuration, one for each loss."""

    def __init__(self, path: Path | None, base: SubnetConfig) -> None:
        self.path = path
        self.losses: dict[tuple[str, int], float] = {}
        header = {"schema": 1, "base": dict(base)}
        if path is None:
            return
        lines = _whole_lines(path)
        try:
            rows: Sequence[Any] = [without_checksum(json.loads(line)) for line in lines]
            if rows and rows[0].get("base") != header["base"]:
                raise BadArtifact(f"{path} holds losses beside another base", try_="delete it")
            self.losses = {(row["dim"], row["choice"]): float(row["loss"]) for row in rows[1:]}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadArtifact(f"{path} is damaged: {error!r}", try_="delete it") from error
        if not rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(with_checksum(header)) + "\n", encoding="utf-8")

    def add(self, name: str, choice: int, loss: float) -> None:
        """Keep one measurement."""
        self.losses[name, choice] = loss
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                row = with_checksum({"dim": name, "choice": choice, "loss": loss})
                file.write(json.dumps(row) + "\n")


def _whole_lines(path: Path) -> list[str]:
    """Return a file's lines, after cutting off a last one that a kill left unfinished."""
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return content[:end].decode("utf-8", errors="replace").splitlines()
