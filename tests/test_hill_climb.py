"""Hill climbing: against random search and against the true front, for one value and for two."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from pymoo.indicators.hv import HV

from elastune.search import ALGORITHMS, Known, Trial
from elastune.search.base import non_dominated
from elastune.search.hill_climb import _convex_part
from elastune.space import ElasticDim, SearchSpace, SubnetConfig

Measure = Callable[[SubnetConfig], dict[str, float]]


def space_of(n_dims: int, n_choices: int = 3) -> SearchSpace:
    choices = tuple(range(8 * n_choices, 0, -8))
    return SearchSpace([ElasticDim(f"d{i}", "rank", choices, (f"m{i}",)) for i in range(n_dims)])


def additive(space: SearchSpace, seed: int, *, bend: float = 0.0) -> Measure:
    """Return losses and costs that add up over dims; ``bend`` is how far losses stray from it."""
    rng = np.random.default_rng(seed)
    n, k = len(space), len(space.dims[0].choices)
    steps = rng.exponential(1, (n, k - 1)) * np.exp(rng.normal(0, 1, (n, 1))) * np.arange(1, k)
    losses = np.concatenate([np.zeros((n, 1)), np.cumsum(steps, axis=1)], axis=1)
    costs = np.arange(k - 1, -1, -1) * rng.uniform(0.5, 1.5, (n, 1))
    waves = rng.normal(0, 1, (n, k))
    losses, costs = losses / losses[:, -1].sum(), costs / costs[:, 0].sum()

    def measure(config: SubnetConfig) -> dict[str, float]:
        at = np.arange(n), np.array(space.encode(config))
        loss = losses[at].sum() * (1 + bend * np.sin(waves[at].sum()))
        return {"loss": float(loss), "params": float(costs[at].sum())}

    return measure


def climb(
    space: SearchSpace,
    measure: Measure,
    n: int,
    *,
    seed: int = 0,
    algorithm: str = "hill_climb",
    history: Sequence[Trial] = (),
) -> list[Trial]:
    trials = list(history)
    while len(trials) < n:
        rng = np.random.default_rng((seed, len(trials)))
        config = ALGORITHMS[algorithm](space, trials, rng, Known(("loss", "params")))
        trials.append(Trial(len(trials), config, measure(config)))
    return trials


def hypervolume(trials: Sequence[Trial]) -> float:
    """Return the part of the square from (0, 0) to (1.05, 1.05) that trials dominate."""
    points = np.array([list(trial.values.values()) for trial in trials])
    return float(HV(ref_point=np.array([1.05, 1.05]))(points)) / 1.05**2


def of_all(space: SearchSpace, measure: Measure) -> list[Trial]:
    codes = itertools.product(*(range(len(dim.choices)) for dim in space.dims))
    configs = [space.decode(code) for code in codes]
    return [Trial(i, config, measure(config)) for i, config in enumerate(configs)]


def distance(space: SearchSpace, a: SubnetConfig, b: SubnetConfig) -> np.ndarray:
    return np.abs(np.subtract(space.encode(a), space.encode(b)))


@pytest.mark.parametrize(
    ("n_dims", "n_choices", "n", "bend", "margin"),
    [
        (7, 3, 60, 0.0, 0.08),
        (7, 3, 60, 0.05, 0.08),
        (24, 5, 80, 0.0, 0.12),
        (60, 3, 80, 0.05, 0.14),
    ],
)
def test_it_dominates_more_than_random_search_does_in_as_many_trials(
    n_dims: int, n_choices: int, n: int, bend: float, margin: float
) -> None:
    space = space_of(n_dims, n_choices)
    gains = []
    for seed in range(10):
        measure = additive(space, seed, bend=bend)
        climbed = climb(space, measure, n, seed=seed)
        drawn = climb(space, measure, n, seed=seed, algorithm="random")
        gains.append(hypervolume(climbed) - hypervolume(drawn))
    assert np.mean(gains) > margin
    assert min(gains) > 0


def test_it_comes_close_to_the_front_of_all_configurations() -> None:
    space = space_of(7)  # 2,187 of them
    parts = []
    for seed in range(5):
        measure = additive(space, seed)
        found = climb(space, measure, 150, seed=seed)
        parts.append(hypervolume(found) / hypervolume(of_all(space, measure)))
    assert np.mean(parts) > 0.99  # random search reaches 0.904
    assert max(parts) <= 1 + 1e-12


def test_one_search_serves_several_budgets() -> None:
    space = space_of(24, 5)
    budgets = (0.3, 0.5, 0.6, 0.7, 0.8)
    gains: dict[float, list[float]] = {budget: [] for budget in budgets}
    for seed in range(5):
        measure = additive(space, seed)
        both = [
            climb(space, measure, 100, seed=seed, algorithm=a) for a in ("hill_climb", "random")
        ]
        for budget in budgets:
            fits = [[t for t in trials if t.values["params"] <= budget] for trials in both]
            climbed, drawn = (min(t.values["loss"] for t in trials) for trials in fits)
            gains[budget].append(drawn - climbed)
    means = {budget: np.mean(found) for budget, found in gains.items()}
    assert min(means.values()) > 0.03, means


@pytest.mark.parametrize("second", ["absent", "constant"])
def test_one_value_is_climbed_to_its_optimum(second: str) -> None:
    space = space_of(6, 4)  # 4,096 configurations
    target = space.decode([3, 1, 0, 2, 1, 3])

    @cache
    def measure(config: SubnetConfig) -> dict[str, float]:
        loss = float((distance(space, config, target) ** 2).sum())
        return {"loss": loss} | ({"params": 1.0} if second == "constant" else {})

    for seed in range(5):
        trials = climb(space, measure, 150, seed=seed)
        assert min(trial.values["loss"] for trial in trials) == 0


def test_proposals_are_neighbours_of_the_front_or_lie_between_two_of_it() -> None:
    space = space_of(20, 5)
    measure = additive(space, 0)
    trials = climb(space, measure, 80)
    steps, mixed = [], 0
    for trial in trials[3:]:
        front = non_dominated(trials[: trial.number])
        codes = [space.encode(parent.config) for parent in front]
        own = np.array(space.encode(trial.config))
        changes = [own - np.array(code) for code in codes]
        near = [c for c in changes if np.abs(c).max() == 1 and np.count_nonzero(c) <= 10]
        steps += sorted(near, key=np.count_nonzero)[:1]
        if not near:
            pairs = itertools.combinations(np.array(codes), 2)
            assert any(((own == one) | (own == other)).all() for one, other in pairs)
            mixed += 1
    assert mixed > 10
    assert sum(np.count_nonzero(step) == 1 for step in steps) > 10
    assert sum(step.max() == 1 for step in steps) > 10  # smaller ones
    assert sum(step.min() == -1 for step in steps) > 10  # larger ones


def test_trials_above_the_line_between_two_others_are_not_climbed_from() -> None:
    points = {0: (0.0, 1.0), 1: (0.5, 0.6), 2: (0.3, 0.5), 3: (0.61, 0.4), 4: (1.0, 0.0)}
    trials = [
        Trial(i, SubnetConfig({"d": i}), {"loss": loss, "params": params})
        for i, (loss, params) in points.items()
    ]
    # 1 is dominated; 3 lies above the line from 2 to 4, which passes through (0.44, 0.4).
    assert [trial.number for trial in non_dominated(trials)] == [0, 2, 3, 4]
    assert [trial.number for trial in _convex_part(non_dominated(trials))] == [0, 2, 4]


@pytest.mark.parametrize("seed", range(4))
def test_the_convex_part_is_what_weighted_sums_find(seed: int) -> None:
    points = np.random.default_rng(seed).random((60, 2))
    trials = [
        Trial(i, SubnetConfig({"d": i}), dict(zip(("loss", "params"), map(float, p), strict=True)))
        for i, p in enumerate(points)
    ]
    found = {trial.number for trial in _convex_part(non_dominated(trials))}
    weights = np.linspace(1e-6, 1 - 1e-6, 20_001)
    sums = weights[:, None] * points[:, 0] + (1 - weights[:, None]) * points[:, 1]
    assert found == set(sums.argmin(axis=1).tolist())


def test_three_values_are_climbed_as_well() -> None:
    space = space_of(10)
    measure = additive(space, 0)

    def three(config: SubnetConfig) -> dict[str, float]:
        return measure(config) | {"memory": float(config["d0"])}

    trials = climb(space, three, 60)
    assert len({trial.config for trial in trials}) == 60
    assert len(non_dominated(trials)) > 10


def test_when_all_neighbours_are_tried_two_steps_are_made_and_then_any() -> None:
    space = space_of(2, 9)
    centre = space.decode([4, 4])
    named = [space.heuristic(), space.largest(), space.smallest()]
    assert named[0] == centre
    # The centre is best in the only value, so that it stays the front.
    at_once = [centre, *named[1:], *space.neighbours(centre)]

    def measure(config: SubnetConfig) -> dict[str, float]:
        return {"loss": float(distance(space, config, centre).sum())}

    history = [Trial(i, config, measure(config)) for i, config in enumerate(at_once)]
    trials = climb(space, measure, space.size, history=history)
    steps = [int(trial.values["loss"]) for trial in trials[len(history) :]]
    assert steps[:8] == [2] * 8
    assert sorted(steps[8:]) != steps[8:]  # drawn from what is left, not by distance
    assert len({trial.config for trial in trials}) == space.size


@pytest.mark.parametrize(("n_dims", "n_choices"), [(1, 1), (1, 4), (3, 3), (2, 10)])
def test_a_small_space_is_tried_whole_without_repeats(n_dims: int, n_choices: int) -> None:
    space = space_of(n_dims, n_choices)
    trials = climb(space, lambda c: {"loss": -float(sum(c.values()))}, space.size)
    assert len({trial.config for trial in trials}) == space.size


def test_dims_of_one_choice_stay_as_they_are() -> None:
    space = space_of(4) + SearchSpace([ElasticDim("fixed", "ffn", (48,), ("m",))])

    def measure(config: SubnetConfig) -> dict[str, float]:
        return {"loss": -float(sum(config.values())), "params": float(sum(config.values()))}

    trials = climb(space, measure, 81)
    assert len({trial.config for trial in trials}) == 81


def test_the_proposal_depends_on_the_history_and_the_generator_alone() -> None:
    space = space_of(30)
    measure = additive(space, 1)
    whole = climb(space, measure, 50)
    for k in (0, 2, 3, 17, 49):
        assert climb(space, measure, 50, history=whole[:k]) == whole
    assert climb(space, measure, 50, seed=1)[3:] != whole[3:]


def test_failed_trials_are_neither_climbed_from_nor_tried_again() -> None:
    space = space_of(12)
    measure = additive(space, 0)

    def broken(config: SubnetConfig) -> dict[str, float]:
        found = measure(config)
        return found if found["params"] > 0.5 else found | {"loss": float("nan")}

    trials = climb(space, broken, 60)
    assert len({trial.config for trial in trials}) == 60
    assert sum(not trial.failed for trial in trials) > 30
    nothing = climb(space, lambda config: {"loss": float("inf"), "params": 1.0}, 20)
    assert len({trial.config for trial in nothing}) == 20
