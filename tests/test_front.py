"""Ranks, crowding and hypervolume: against pymoo's and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from pymoo.indicators.hv import HV
from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from elastune.search import nsga2, rnsga2
from elastune.search.front import crowding, hypervolume, pareto_ranks


def points(n: int, n_values: int, seed: int, levels: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, levels, (n, n_values)) / levels if levels else rng.random((n, n_values))


def dominates(values: np.ndarray, violations: np.ndarray, i: int, j: int) -> bool:
    """Constrained domination, word by word (Deb et al., 2002, definition 1)."""
    if violations[i] <= 0 and violations[j] > 0:
        return True
    if violations[i] > 0 and violations[j] > 0:
        return bool(violations[i] < violations[j])
    better = (values[i] <= values[j]).all() and (values[i] < values[j]).any()
    return bool(violations[i] <= 0 and violations[j] <= 0 and better)


@pytest.mark.parametrize("levels", [0, 8])
@pytest.mark.parametrize("n_values", [1, 2, 3, 4])
def test_ranks_are_those_of_pymoo(n_values: int, levels: int) -> None:
    values = points(120, n_values, n_values, levels)
    _, ranks = NonDominatedSorting().do(values, return_rank=True)
    assert pareto_ranks(values).tolist() == ranks.tolist()
    assert len(set(ranks)) > 1


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_peel_off_what_nothing_dominates_within_limits(seed: int, kept: float) -> None:
    values = points(50, 2, seed, levels=9)
    rng = np.random.default_rng(seed)
    violations = np.where(rng.random(50) < kept, 0.0, rng.integers(1, 6, 50) / 3)
    expected = np.full(50, -1)
    left, rank = set(range(50)), 0
    while left:
        front = {j for j in left if not any(dominates(values, violations, i, j) for i in left)}
        expected[list(front)] = rank
        left, rank = left - front, rank + 1
    assert pareto_ranks(values, violations).tolist() == expected.tolist()


@pytest.mark.parametrize("n_values", [2, 3])
@pytest.mark.parametrize("n", [3, 4, 60])
def test_crowding_is_that_of_pymoo(n: int, n_values: int) -> None:
    values = points(n, n_values, n)
    assert np.allclose(crowding(values), get_crowding_function("cd").do(values))


def test_crowding_does_not_depend_on_scale() -> None:
    values = points(30, 2, 0)
    assert np.allclose(crowding(values), crowding(values * [1e9, 1e-3] + [5e9, 1]))


def test_copies_of_a_point_are_crowded_and_change_no_other_distance() -> None:
    values = points(20, 2, 1)
    alone = crowding(values)
    with_copies = crowding(np.concatenate([values, values[4:9], values[4:9]]))
    assert np.array_equal(with_copies[:20], alone)
    assert (with_copies[20:] == 0).all()


@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_points_are_not_crowded(n: int) -> None:
    assert np.isinf(crowding(points(n, 2, 0))).all()
    assert crowding(np.ones((3, 2))).tolist() == [np.inf, 0, 0]


def test_a_value_that_is_constant_does_not_crowd() -> None:
    values = np.stack([np.array([0.0, 1, 2, 4]), np.full(4, 7.0)], axis=1)
    assert crowding(values).tolist() == [np.inf, 2 / 4 / 2, 3 / 4 / 2, np.inf]


@pytest.mark.parametrize("n_values", [2, 3, 4])
def test_hypervolume_is_that_of_pymoo(n_values: int) -> None:
    values = points(40, n_values, n_values) * 1.3
    reference = np.full(n_values, 1.1)
    assert hypervolume(values, reference) == pytest.approx(
        HV(ref_point=reference)(values) / 1.1**n_values, rel=1e-12
    )


def test_hypervolume_is_the_part_of_the_box_that_is_dominated() -> None:
    values, ideal = points(10, 2, 3) * [4, 90] + [2, 10], np.array([2.0, 10.0])
    reference = np.array([6.0, 100.0])
    draws = np.random.default_rng(0).uniform(ideal, reference, (100_000, 2))
    dominated = (values[:, None] <= draws).all(axis=2).any(axis=0).mean()
    assert hypervolume(values, reference, ideal) == pytest.approx(dominated, abs=0.01)
    assert hypervolume(ideal[None], reference, ideal) == 1
    assert hypervolume(reference[None], reference, ideal) == 0
    assert hypervolume(np.zeros((0, 2)), reference, ideal) == 0


@pytest.mark.parametrize("count", [1, 5, 17, 40])
def test_survivors_are_those_of_nsga2_by_hand(count: int) -> None:
    values, violations = points(40, 2, 2), np.where(np.arange(40) % 4 == 0, 0.5, 0.0)
    _, ranks = NonDominatedSorting().do(values[violations == 0], return_rank=True)
    distances = np.zeros(40)
    key = np.full(40, 99)  # all that violate do so by as much
    key[violations == 0] = ranks
    for rank in set(key):
        front = np.flatnonzero(key == rank)
        distances[front] = get_crowding_function("cd").do(values[front])
    expected = sorted(range(40), key=lambda i: (key[i], -distances[i], i))[:count]
    assert nsga2.least_crowded(values, violations, count).tolist() == expected


def test_near_ones_come_first_and_each_reference_point_gets_its_share() -> None:
    x = np.linspace(0, 1, 101)
    values = np.stack([3 + 2 * x, 50 - 40 * x], axis=1)  # one front, of any scale
    free = np.zeros(101)
    one = rnsga2.nearest_to(np.array([[0.25, 0.75]]), values, free, 11)
    assert sorted(one) == list(range(20, 31))
    assert one[0] == 25
    two = rnsga2.nearest_to(np.array([[0.25, 0.75], [0.9, 0.1]]), values, free, 10)
    assert sorted(two) == [23, 24, 25, 26, 27, 88, 89, 90, 91, 92]


def test_what_is_dominated_comes_after_what_is_not_however_near() -> None:
    values = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.51, 0.51], [0.1, 0.95]])
    order = rnsga2.nearest_to(np.array([[0.51, 0.51]]), values, np.zeros(5), 5)
    assert order[0] == 2
    assert order[-1] == 3
    beyond = rnsga2.nearest_to(np.array([[0.5, 0.5]]), values, np.array([0, 0, 0.1, 0, 0]), 5)
    assert beyond[-1] == 2


def test_those_within_epsilon_of_a_better_one_come_last() -> None:
    x = np.array([0.0, 0.5, 0.5 + 4e-4, 0.5 + 8e-4, 0.7, 1.0])
    values = np.stack([x, 1 - x], axis=1)
    order = rnsga2.nearest_to(np.array([[0.5, 0.5]]), values, np.zeros(6), 6).tolist()
    assert order[0] == 1
    assert order[-2:] == [2, 3]
    # Three epsilons apart nothing is cleared.
    wide = np.stack([x * 1, 1 - x], axis=1)[[0, 1, 4, 5]]
    assert rnsga2.nearest_to(np.array([[0.5, 0.5]]), wide, np.zeros(4), 2).tolist() == [1, 2]
