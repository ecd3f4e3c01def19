"""Solve for budgets: single-choice losses, each measured once, and an exact knapsack.

Losses of single choices nearly add up, so that the sub-network of the least summed loss within a
budget is close to the best there is (`elastune.allocate`).
"""

from __future__ import annotations

import heapq
import itertools
import math
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from elastune.allocate import CostOf, Knapsack, spread_parts
from elastune.errors import InvalidSpace
from elastune.search import hill_climb
from elastune.search.base import Known, Losses, Trial, first_untried
from elastune.search.history import History
from elastune.search.surrogate import Additive
from elastune.space import SearchSpace, SubnetConfig

EVENLY = 7
"""Budgets between the cheapest and the largest that are solved for after those that are wanted."""
_SOLVES = 8  # budgets tried for one proposal
_LEAST_GAP = 1e-3  # of the costs there are, below which a gap is not looked into


def propose(
    space: SearchSpace, trials: Sequence[Trial], rng: np.random.Generator, known: Known
) -> SubnetConfig | None:
    """Return heuristic, largest and smallest first, then single choices, then answers to budgets.

    Single choices (the largest sub-network with one dim changed) are tried where no losses are
    known; those that fail are not used afterwards. Then ``known.budgets`` are solved for, then
    evenly spaced budgets, then the middle of the widest gap between the costs that were tried. With
    one value the least summed loss is the only answer. Where all answers were tried hill climbing
    goes on.
    """
    history = History.of(trials)
    tried = history.tried
    config = first_untried(space, tried)
    if config is None and known.losses is None:
        config = next((single for single in _singles(space) if single not in tried), None)
    if config is not None:
        return config
    losses = known.losses or single_losses(space, trials)
    if losses is None:
        return hill_climb.propose(space, history, rng, known)
    answers = answers_of(space, trials, known)
    budgets = _budgets(answers, losses, trials, known)
    found = (answers.at(losses, budget) for budget in budgets)
    config = next((c for c in found if c is not None and c not in tried), None)
    return config or hill_climb.propose(space, history, rng, known)


def single_losses(
    space: SearchSpace, trials: Sequence[Trial]
) -> dict[str, dict[int, float]] | None:
    """Return the single-choice losses that trials hold; infinite where a choice failed or is new.

    None if the largest sub-network was not measured.
    """
    quality = {t.config: next(iter(t.values.values())) for t in trials if not t.failed}
    largest = space.largest()
    if largest not in quality:
        return None
    losses = {dim.name: dict.fromkeys(dim.choices, math.inf) for dim in space.dims}
    for dim in space.dims:
        for choice in dim.choices:
            config = SubnetConfig({**largest, dim.name: choice})
            if config in quality:
                losses[dim.name][choice] = quality[config] - quality[largest]
    return losses


class Answers:
    """A knapsack that remembers its answers: proposals ask for the same ones again and again."""

    def __init__(self, space: SearchSpace, costs: CostOf) -> None:
        self.knapsack = Knapsack(space, costs)
        self._found: dict[tuple[int, float], SubnetConfig | None] = {}

    @property
    def range(self) -> tuple[float, float]:
        """What the smallest sub-network costs, and the largest."""
        smallest = self.knapsack.cost_of(self.knapsack.space.smallest())
        return min(smallest, self.knapsack.base_cost), self.knapsack.base_cost

    def at(self, losses: Losses, budget: float) -> SubnetConfig | None:
        """Return the configuration of the least summed loss; None if none is as cheap."""
        key = hash(tuple((name, *of_dim.items()) for name, of_dim in losses.items())), budget
        if key not in self._found:
            try:
                self._found[key] = self.knapsack.allocate(losses, budget)
            except InvalidSpace:
                self._found[key] = None
        return self._found[key]


_LATEST: list[tuple[weakref.ref[SearchSpace], weakref.ref[Known], Answers]] = []


def answers_of(space: SearchSpace, trials: Sequence[Trial], known: Known) -> Answers:
    """Return the knapsack over what sub-networks cost.

    Costs are counted where they can be. They are those of the second value; with one value, of the
    first limit on something that is counted. What cannot be counted is fitted to the trials.
    """
    if known.costs is None and len(known.values) > 1:
        fitted = Additive.fit(space, trials, value=known.values[1], bends=(math.inf,))
        return Answers(space, lambda config: float(fitted.predict([config])[0]))
    for of_space, of_known, answers in _LATEST:
        if of_space() is space and of_known() is known:
            return answers
    _LATEST.clear()
    answers = Answers(space, _cost_of(space, known))
    # Only as long as the search lasts: what counts costs may hold on to a model.
    forget = weakref.ref(known, lambda _: _LATEST.clear())
    _LATEST.append((weakref.ref(space), forget, answers))
    return answers


def limited_cost(space: SearchSpace, known: Known) -> str | None:
    """Return the name of the cost that the knapsack is over, or None."""
    if len(known.values) > 1:
        return known.values[1]
    if known.costs is None or not known.limits:
        return None
    counted = known.costs(space.largest())
    return next((name for name in known.limits if name in counted), None)


def _cost_of(space: SearchSpace, known: Known) -> CostOf:
    name, costs = limited_cost(space, known), known.costs
    if name is None or costs is None:
        return lambda config: 0.0
    return lambda config: float(costs(config)[name])


def seed_budgets(answers: Answers, space: SearchSpace, known: Known) -> list[float]:
    """Return the budgets that come first: the wanted, then evenly spaced ones, in the limits."""
    cheapest, dearest = answers.range
    name = limited_cost(space, known)
    low, high = known.limits.get(name or "", (-math.inf, math.inf))
    if len(known.values) == 1:
        return [min(high, dearest)]
    top = min(high, dearest)
    parts = itertools.islice(spread_parts(), 1, EVENLY + 1)
    evenly = [cheapest + part * (top - cheapest) for part in parts]
    wanted = [*known.budgets, *([high] if high < dearest else []), *evenly]
    return [budget for budget in wanted if low <= budget <= high]


def _singles(space: SearchSpace) -> Iterator[SubnetConfig]:
    """Yield the largest sub-network with each other choice of each dim."""
    largest = space.largest()
    for dim in space.dims:
        for choice in dim.choices[1:]:
            yield SubnetConfig({**largest, dim.name: choice})


def _budgets(
    answers: Answers, losses: Losses, trials: Sequence[Trial], known: Known
) -> Iterator[float]:
    """Yield the seeds' budgets, then the middles of gaps between tried costs, the widest first."""
    space = answers.knapsack.space
    yield from seed_budgets(answers, space, known)
    if len(known.values) == 1:
        return
    low, high = known.limits.get(known.values[1], (-math.inf, math.inf))
    cheapest, dearest = answers.range
    cheapest, dearest = max(cheapest, low), min(dearest, high)
    costs = {answers.knapsack.cost_of(t.config) for t in trials} if known.costs else set()
    costs |= {t.values[known.values[1]] for t in trials if not t.failed}
    ends = sorted({cheapest, dearest, *(cost for cost in costs if cheapest < cost < dearest)})
    gaps = [(a - b, a, b) for a, b in itertools.pairwise(ends)]
    heapq.heapify(gaps)
    for _ in range(_SOLVES):
        if not gaps or -gaps[0][0] <= _LEAST_GAP * (dearest - cheapest):
            return
        _, a, b = heapq.heappop(gaps)
        middle = (a + b) / 2
        yield middle
        # Asked again, so the answer was tried: nothing better lies between its cost and the middle.
        answer = answers.at(losses, middle)
        reached = a if answer is None else max(a, min(middle, answers.knapsack.cost_of(answer)))
        for start, end in ((a, reached), (middle, b)):
            if end > start:
                heapq.heappush(gaps, (start - end, start, end))
