"""Local search from the Pareto front: one search, the best sub-networks of every size.

Shears (section 3.3) climbs from the heuristic sub-network over neighbours, by quality alone. With
one value, or a second one that is constant, the front is the best trial and this is that search.
With a cost beside the quality every size on the front is climbed from in turn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from elastune.search import random_search
from elastune.search.base import Known, Trial, first_untried
from elastune.search.history import History
from elastune.space import SearchSpace, SubnetConfig

_DRAWS = 32  # neighbours drawn before those that are left are listed
_BEYOND = 0.05  # of the front's length, at both ends: fronts grow outwards, too
_MIXED = 0.5  # of the proposals lie between two trials of the front
_TOWARDS = 0.75  # of the others change all their dims in one direction
_TAIL = 1.5  # exponent of the number of dims that change


def propose(
    space: SearchSpace, trials: Sequence[Trial], rng: np.random.Generator, known: Known
) -> SubnetConfig | None:
    """Return heuristic, largest and smallest first, then untried neighbours of the front.

    A place is drawn evenly along the front's convex part, so that all sizes get their share and
    gaps most of it. Half of the proposals take some dims from the trial before that place and the
    others from the trial behind it. The other half change the nearest trial by one step of one or a
    few dims, mostly all of them towards that place. How many dims follows a power law (Doerr et
    al., 2017, Fast Genetic Algorithms): one is likeliest, half of them possible. Where no neighbour
    within two steps is left, random search goes on; None where all were tried.
    """
    history = History.of(trials)
    tried = history.tried
    first = first_untried(space, tried)
    if first is not None:
        return first
    front = _convex_part(history.front)
    if not front:  # all have failed so far
        return random_search.propose(space, history, rng, known)
    places = _places(front)
    for _ in range(_DRAWS):
        goal = rng.uniform(-_BEYOND, 1 + _BEYOND) * places[-1]
        nearest = int(np.abs(places - goal).argmin())
        # Later choices are smaller, as are later trials of the front.
        direction = int(np.sign(goal - places[nearest]))
        behind = nearest + direction
        origin = front[nearest].config
        if direction and 0 <= behind < len(front) and rng.random() < _MIXED:
            share = (goal - places[nearest]) / (places[behind] - places[nearest])
            config = _between(space, origin, front[behind].config, share, rng)
        else:
            config = _neighbour(space, origin, direction, rng)
        if config not in tried:
            return config
    left = _left_over(space, origin, tried, rng)
    return left or random_search.propose(space, history, rng, known)


def _convex_part(front: Sequence[Trial]) -> list[Trial]:
    """Return the trials that lie on the front's lower convex hull, from costliest to cheapest.

    The others are usually ones that little was tried around yet. A front of one value or of more
    than two stays whole.
    """
    ordered = sorted(front, key=lambda trial: tuple(trial.values.values())[1:], reverse=True)
    if not front or len(front[0].values) != 2:
        return ordered
    hull: list[Trial] = []
    for trial in ordered:
        while len(hull) >= 2 and not _is_below(hull[-1], hull[-2], trial):
            hull.pop()
        hull.append(trial)
    return hull


def _is_below(middle: Trial, costly: Trial, cheap: Trial) -> bool:
    """Tell whether a trial is better than the line between a costlier and a cheaper one."""
    (y, x), (y0, x0), (y1, x1) = (tuple(t.values.values()) for t in (middle, costly, cheap))
    return (y - y0) * (x0 - x1) < (y1 - y0) * (x0 - x)


def _places(front: Sequence[Trial]) -> np.ndarray:
    """Return how far along the front each trial is, all values on one scale; ``(trials,)``."""
    values = np.array([list(trial.values.values()) for trial in front])
    span = np.ptp(values, axis=0)
    steps = np.abs(np.diff(values, axis=0)) / np.where(span > 0, span, 1.0)
    return np.concatenate([[0.0], np.cumsum(steps.sum(axis=1))])


def _between(
    space: SearchSpace,
    first: SubnetConfig,
    second: SubnetConfig,
    share: float,
    rng: np.random.Generator,
) -> SubnetConfig:
    """Return a configuration that takes about ``share`` of its dims from the second."""
    from_second = rng.random(len(space)) < share
    pairs = zip(space.dims, from_second, strict=True)
    return SubnetConfig({d.name: (second if there else first)[d.name] for d, there in pairs})


def _neighbour(
    space: SearchSpace, origin: SubnetConfig, direction: int, rng: np.random.Generator
) -> SubnetConfig:
    """Return a configuration one step away in one dim or more; the origin where none can move."""
    indices = list(space.encode(origin))
    most = max(1, len(indices) // 2)
    weights = np.arange(1.0, most + 1) ** -_TAIL
    count = 1 + int(rng.choice(most, p=weights / weights.sum()))
    one_way = direction != 0 and rng.random() < _TOWARDS
    for position in rng.permutation(len(indices)):
        last = len(space.dims[position].choices) - 1
        steps = (direction,) if one_way else (-1, 1)
        possible = [step for step in steps if 0 <= indices[position] + step <= last]
        if possible:
            indices[position] += possible[int(rng.integers(len(possible)))]
            count -= 1
        if not count:
            break
    return space.decode(indices)


def _left_over(
    space: SearchSpace,
    origin: SubnetConfig,
    tried: Collection[SubnetConfig],
    rng: np.random.Generator,
) -> SubnetConfig | None:
    """Return one of the untried neighbours, or of their neighbours, or None."""
    near = space.neighbours(origin)
    untried = [config for config in near if config not in tried]
    if not untried:
        around = (config for neighbour in near for config in space.neighbours(neighbour))
        untried = list(dict.fromkeys(config for config in around if config not in tried))
    return untried[int(rng.integers(len(untried)))] if untried else None
