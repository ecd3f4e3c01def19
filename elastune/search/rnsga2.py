"""R-NSGA-II (Deb and Sundar, 2006): NSGA-II that looks for trials near aspired values (Shears)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elastune.errors import BadRecipe
from elastune.search.base import Known, Trial
from elastune.search.front import pareto_ranks
from elastune.search.nsga2 import by_front, evolve
from elastune.space import SearchSpace, SubnetConfig

EPSILON = 0.001
"""Trials of a front closer than this part of its range crowd each other out (Deb and Sundar)."""


def propose(
    space: SearchSpace, trials: Sequence[Trial], rng: np.random.Generator, known: Known
) -> SubnetConfig | None:
    """Return what `nsga2.propose` does, with nearness to the aspired values instead of crowding.

    The aspired values are `Known.reference_points`; by default the origin, as in Shears: the best
    of every value at once. None where all were tried.

    Raises:
        BadRecipe: a reference point that has not one number for each value.
    """
    points = known.reference_points or ((0.0,) * len(known.values),)
    for point in points:
        if len(point) != len(known.values) or not np.isfinite(point).all():
            raise BadRecipe(
                f"the reference point {point} must have one number for each of "
                f"{', '.join(known.values)}",
                try_="parts of the front's range, such as " + str((0.0,) * len(known.values)),
            )
    aspired = np.array(points, dtype=np.float64)

    def nearest(values: np.ndarray, violations: np.ndarray, count: int) -> np.ndarray:
        return nearest_to(aspired, values, violations, count)

    return evolve(space, trials, rng, known, nearest)


def nearest_to(
    aspired: np.ndarray, values: np.ndarray, violations: np.ndarray, count: int
) -> np.ndarray:
    """Return rows by front and, within a front, by nearness to the aspired values.

    Every reference point ranks the front by distance; a row counts by the best of its ranks, so
    that each point gets its share. Rows within `EPSILON` of a better one come after all others.

    Args:
        aspired: ``(reference points, values)``; 0 is the best of a value on the first front, 1 the
            worst one.
        values: ``(trials, values)``.
        violations: ``(trials,)``.
        count: the most rows returned.
    """
    first = values[pareto_ranks(values, violations) == 0]
    best, span = first.min(axis=0), np.ptp(first, axis=0)
    scaled = (values - best) / np.where(span > 0, span, 1.0)

    def preference(front: np.ndarray) -> np.ndarray:
        to_points = _distances(scaled[front], aspired)
        ranks = to_points.argsort(axis=0, kind="stable").argsort(axis=0)
        # Of equal ranks the nearer one comes first.
        near = to_points.min(axis=1)
        order = np.lexsort((near, ranks.min(axis=1)))
        return _cleared(scaled[front], order)

    return by_front(values, violations, count, preference)


def _distances(rows: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return root mean squared differences, ``(rows, points)``."""
    return np.sqrt(((rows[:, None] - points[None]) ** 2).mean(axis=2))


def _cleared(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the place of each row in the order, those near an earlier one moved behind: (rows,).

    Only rows that were not moved themselves push others back.
    """
    places = np.empty(len(rows))
    waiting = order
    place = 0
    while len(waiting):
        chosen, waiting = waiting[0], waiting[1:]
        places[chosen] = place
        near = _distances(rows[waiting], rows[chosen][None])[:, 0] < EPSILON
        places[waiting[near]] = len(rows) + place
        waiting = waiting[~near]
        place += 1
    return places
