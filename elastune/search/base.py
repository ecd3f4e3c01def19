"""Search: propose a configuration, measure it, remember it. Knows spaces and numbers, never torch.

An algorithm is a stateless function of the history: ``propose(space, trials, rng, known)`` with
``rng = (seed, trial number)``. Resuming, repeating and searching with several workers then need no
saved state but the trials.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from elastune.allocate import Losses
from elastune.errors import BadRecipe, ElastuneError, nearest
from elastune.search.limits import Range, resolve, violation
from elastune.space import SearchSpace, SubnetConfig

Objective = Callable[[SubnetConfig], Mapping[str, float]]
"""Configuration -> named values, all to be minimised; the first is the quality."""

BROKEN_WAY_OUT = "dtype=float32, or training again with a lower learning rate"


@dataclass(frozen=True)
class Trial:
    """A configuration and what was measured of it.

    Attributes:
        number: from 0, in the order in which trials were proposed.
        config: what was tried.
        values: the objectives, all minimised, quality first. NaN while a worker still measures it.
        measured: whatever else was measured or counted, such as the costs that limits are on.
        dropped: a race took it out before all examples were seen: its quality is an estimate, and
            it is never best, never on the front.
        outcomes: quality of each example of the race, ``(examples,)`` float32, NaN where it was
            not looked at; None where nothing is raced.
        equivalents: work that the measurement took, in whole evaluations of the largest
            sub-network on all examples.
        violation: by how much it misses the limits of the search, as a part of them; 0 within.
    """

    number: int
    config: SubnetConfig
    values: Mapping[str, float]
    measured: Mapping[str, float] = field(default_factory=dict)
    dropped: bool = False
    outcomes: np.ndarray | None = field(default=None, compare=False, repr=False)
    equivalents: float = field(default=1.0, compare=False)
    violation: float = field(default=0.0, compare=False)

    @cached_property
    def failed(self) -> bool:
        """Whether a value is NaN or infinite: such a trial is never best, never on the front."""
        return not all(map(math.isfinite, self.values.values()))

    @cached_property
    def rank(self) -> tuple[float, ...]:
        """The values and the number: whatever dominates a trial has a smaller one."""
        return (*self.values.values(), self.number)


@dataclass(frozen=True)
class Measurement:
    """What an objective that races, or that reuses work, says of a configuration."""

    values: Mapping[str, float]
    """The objectives and everything else by name."""
    dropped: bool = False
    outcomes: np.ndarray | None = None
    equivalents: float = 1.0


class RacingObjective(Protocol):
    """An objective that may stop early, knowing the trials a configuration competes with."""

    def __call__(self, config: SubnetConfig) -> Mapping[str, float]:
        """Measure on all examples."""

    def measure(self, config: SubnetConfig, rivals: Sequence[Trial]) -> Measurement:
        """Measure until it is clear that a rival is better and no dearer; else on all examples."""


@dataclass(frozen=True)
class Known:
    """What an algorithm may know besides the history.

    Attributes:
        values: names of the objectives, quality first.
        costs: counts what a configuration costs without evaluating it; holds the cost objectives.
        losses: single-choice losses (`elastune.allocate.single_choice_losses`, or
            `elastune.estimate_choice_losses`).
        budgets: bounds on the second value that sub-networks are wanted for.
        limits: name of a value -> the least and the most that it may be.
        population: trials of a generation, for evolutionary algorithms.
        reference_points: aspired values, one tuple each, on the scale of the front found so far
            (0 is the best of a value, 1 the worst), for rnsga2.
    """

    values: tuple[str, ...]
    costs: Objective | None = None
    losses: Losses | None = None
    budgets: tuple[float, ...] = ()
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    population: int = 40
    reference_points: tuple[tuple[float, ...], ...] = ()


Propose = Callable[[SearchSpace, Sequence[Trial], np.random.Generator, Known], SubnetConfig | None]
"""(space, history, rng, known) -> a configuration that is not in the history; None: no more.

The history holds failed trials, and those that other workers are measuring now (both are
``failed``): they are not to be proposed again, and have no values.
"""


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search."""

    trials: tuple[Trial, ...]

    def best(
        self,
        limits: Mapping[str, float | Range] | str | Sequence[str] | None = None,
        *,
        costs: Objective | None = None,
        references: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Trial:
        """Return the trial of the best quality; of equals, the cheapest, then the earliest.

        Args:
            limits: as text, such as ``"params<=2M"`` or ``["params<=60%", "macs<=1G"]``; or name
                of a value -> the most, or the least and the most, that it may be, such as
                ``{"params": 2e6}``; in the value's own unit.
            costs: counts the values that trials do not hold, such as
                ``lambda config: vars(cost_model(config))``.
            references: system -> name of a value -> what it has, for limits such as ``60%``.

        Raises:
            ElastuneError: nothing was tried, or all trials failed.
            BadRecipe: no trial keeps the limits; a limit on an unknown value, or that is NaN; a
                text that is no limit.
        """
        if not self.trials:
            raise ElastuneError("the search tried nothing", try_="search.trials of at least 1")
        valid = [trial for trial in self.trials if not trial.failed and not trial.dropped]
        if not valid:
            raise ElastuneError(
                f"all {len(self.trials)} sub-networks that were tried measure as NaN or infinite",
                try_=BROKEN_WAY_OUT,
            )
        if limits:
            valid = _within(valid, _ranges(limits, references), costs)
        return min(valid, key=operator.attrgetter("rank"))

    def best_within(self, limits: Mapping[str, Range]) -> Trial:
        """Return the best trial within limits; where there is none, the one that misses them least.

        Raises:
            ElastuneError: nothing was tried, or all trials failed.
        """
        best = self.best()
        whole = [trial for trial in self.trials if not trial.failed and not trial.dropped]
        if not limits:
            return best
        return min(whole, key=lambda t: (violation({**t.measured, **t.values}, limits), *t.rank))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: trials, numbers of the Pareto front, number of the best.

        Values that are NaN or infinite are null, which JSON has.
        """
        front = self.pareto()
        return {
            "schema": 1,
            "trials": [
                {
                    "number": t.number,
                    "config": dict(t.config),
                    "values": _or_null(t.values),
                    "measured": _or_null(t.measured),
                    "dropped": t.dropped,
                    "equivalents": t.equivalents,
                }
                for t in self.trials
            ],
            "pareto": [trial.number for trial in front],
            "best": min(front, key=operator.attrgetter("rank")).number if front else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchResult:
        """Read back what `to_dict` returned."""
        return cls(
            tuple(
                Trial(
                    row["number"],
                    SubnetConfig(row["config"]),
                    _or_nan(row["values"]),
                    _or_nan(row.get("measured", {})),
                    row.get("dropped", False),
                    equivalents=row.get("equivalents", 1.0),
                )
                for row in data["trials"]
            )
        )

    def pareto(self) -> list[Trial]:
        """Return the trials that no other is at least as good as in every value, and better in one.

        Of trials with equal values the earliest stays. In the order of their numbers.
        """
        return non_dominated(self.trials)


def non_dominated(trials: Sequence[Trial]) -> list[Trial]:
    """Return the Pareto front of the trials that did not fail, in the order of their numbers."""
    whole = [trial for trial in trials if not (trial.failed or trial.dropped)]
    kept: list[Trial] = []
    for trial in sorted(whole, key=operator.attrgetter("rank")):
        values = trial.rank[:-1]
        # Of two values the last kept has the least second one, so that it alone can dominate.
        rivals = kept[-1:] if len(values) <= 2 else kept
        # All first values are at most this one's, by the order.
        if not any(all(map(operator.le, rival.rank[1:-1], values[1:])) for rival in rivals):
            kept.append(trial)
    return sorted(kept, key=lambda trial: trial.number)


def first_untried(space: SearchSpace, tried: Collection[SubnetConfig]) -> SubnetConfig | None:
    """Return which of heuristic, largest and smallest, in this order, is to be tried first."""
    named = (space.heuristic(), space.largest(), space.smallest())
    return next((config for config in named if config not in tried), None)


def _ranges(
    limits: Mapping[str, float | Range] | str | Sequence[str],
    references: Mapping[str, Mapping[str, float]] | None,
) -> dict[str, Range]:
    """Return limits in any form as the least and the most."""
    if not isinstance(limits, Mapping):
        return resolve(limits, references)
    return {
        name: limit if isinstance(limit, tuple) else (-math.inf, limit)
        for name, limit in limits.items()
    }


def _within(
    trials: Sequence[Trial], limits: Mapping[str, Range], costs: Objective | None
) -> list[Trial]:
    """Return the trials whose limited values are all within their limits."""
    tables = [{**trial.measured, **trial.values} for trial in trials]
    if costs is not None and not set(limits) <= set(tables[0]):
        pairs = zip(trials, tables, strict=True)
        tables = [{**costs(trial.config), **table} for trial, table in pairs]
    for name, (low, high) in limits.items():
        if name not in tables[0]:
            raise BadRecipe(
                f"no limit can be set on {name!r}{nearest(name, tables[0])}; "
                f"trials have {', '.join(tables[0])}"
            )
        if math.isnan(low) or math.isnan(high):
            raise BadRecipe(f"the limit on {name} must be a number, got nan")
    kept = [
        trial
        for trial, table in zip(trials, tables, strict=True)
        if all(low <= table.get(name, math.nan) <= high for name, (low, high) in limits.items())
    ]
    if not kept:
        raise BadRecipe(
            f"none of the {len(trials)} trials has {_nearest_found(tables, limits)}",
            try_="larger limits, more trials, or smaller choices in the search space",
        )
    return kept


def _nearest_found(tables: Sequence[Mapping[str, float]], limits: Mapping[str, Range]) -> str:
    """Return the limits in words, and how near to each the trials came."""
    wanted, least, most = [], [], []
    for name, (low, high) in limits.items():
        values = [table[name] for table in tables if name in table]
        if high < math.inf:
            wanted.append(f"{name} <= {high:.10g}")
            least.append(f"{name} {min(values):.10g}")
        if low > -math.inf:
            wanted.append(f"{name} >= {low:.10g}")
            most.append(f"{name} {max(values):.10g}")
    found = [("smallest", least), ("largest", most)]
    reached = [f"the {which} found: {', '.join(names)}" for which, names in found if names]
    return "; ".join([" and ".join(wanted), *reached])


def _or_null(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _or_nan(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}
