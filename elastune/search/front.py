"""Pareto ranks with limits, crowding, and the volume that a front dominates. All values minimised.

Arrays only: ``values`` is ``(points, values)``, ``violations`` is ``(points,)`` and at least 0.
"""

from __future__ import annotations

import numpy as np


def pareto_ranks(values: np.ndarray, violations: np.ndarray | None = None) -> np.ndarray:
    """Return in which front each point is, from 0: ``(points,)`` integers.

    A front is what no other point dominates once the fronts before it are taken away. With
    violations domination is constrained (Deb et al., 2002, section VI): points within the limits
    come before all others, and of these the less violating ones come first, whatever their values.
    Points of equal values share a rank.
    """
    import moocore

    values = np.asarray(values, dtype=np.float64)
    ranks = np.zeros(len(values), dtype=np.intp)
    within = np.ones(len(values), bool) if violations is None else np.asarray(violations) <= 0
    if within.any():
        ranks[within] = moocore.pareto_rank(values[within])
    if violations is not None and not within.all():
        first = ranks[within].max() + 1 if within.any() else 0
        ranks[~within] = first + np.unique(violations[~within], return_inverse=True)[1]
    return ranks


def crowding(values: np.ndarray) -> np.ndarray:
    """Return how far apart the two neighbours of each point of one front are: ``(points,)``.

    Deb et al. (2002, section III): per value the distance from the next smaller to the next larger
    point, as a part of the front's range; the mean over values. Infinite where a neighbour is
    missing. Of points with equal values all but the first get 0, since keeping them widens nothing.
    """
    values = np.asarray(values, dtype=np.float64)
    distances = np.zeros(len(values))
    unique, first = np.unique(values, axis=0, return_index=True)
    if len(unique) <= 2:
        distances[first] = np.inf
        return distances
    total = np.zeros(len(unique))
    for column in unique.T:
        order = np.argsort(column, kind="stable")
        in_order = column[order]
        span = in_order[-1] - in_order[0]
        if span > 0:
            total[order[1:-1]] += (in_order[2:] - in_order[:-2]) / span
            total[order[[0, -1]]] = np.inf
    distances[first] = total / unique.shape[1]
    return distances


def hypervolume(
    values: np.ndarray, reference: np.ndarray, ideal: np.ndarray | None = None
) -> float:
    """Return the part of the box from ``ideal`` to ``reference`` that the points dominate: 0 to 1.

    Args:
        values: dominated points and points beyond the reference add nothing.
        reference: the worst corner, ``(values,)``.
        ideal: the best corner; the origin by default. No point may be better in any value.
    """
    import moocore

    reference = np.asarray(reference, dtype=np.float64)
    ideal = np.zeros_like(reference) if ideal is None else np.asarray(ideal, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64).reshape(-1, len(reference))
    inside = values[(values < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    return float(moocore.hypervolume(inside, ref=reference) / np.prod(reference - ideal))
