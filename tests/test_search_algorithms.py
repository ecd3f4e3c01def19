"""The algorithms: against pymoo's at equal evaluations, and what all of them promise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.rnsga2 import RNSGA2
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling
from pymoo.optimize import minimize

from elastune.errors import BadRecipe
from elastune.search import exhaustive, heuristic, nsga2, random_search, rnsga2, tpe
from elastune.search.base import Known, Propose, Trial, non_dominated
from elastune.search.front import hypervolume, pareto_ranks
from elastune.search.history import History
from elastune.space import ElasticDim, SearchSpace

Values = Callable[[np.ndarray], np.ndarray]
"""(points, dims) indices -> (points, 2) values."""

EVOLUTIONARY = {"nsga2": nsga2.propose, "rnsga2": rnsga2.propose}
SAMPLING: Mapping[str, Propose] = EVOLUTIONARY | {"tpe": tpe.propose}
ALL = SAMPLING | {"exhaustive": exhaustive.propose}
KNOWN = Known(("loss", "params"))
#: The worst corner of the hypervolume for each problem.
CORNERS = {
    "zdt1": (1.1, 5.0),
    "zdt2": (1.1, 5.0),
    "zdt3": (1.1, 6.0),
    "dtlz2": (3.0, 3.0),
    "additive": (1.05, 1.05),
}


def space_of(n_dims: int, n_choices: int = 3) -> SearchSpace:
    choices = tuple(range(8 * n_choices, 0, -8))
    return SearchSpace([ElasticDim(f"d{i}", "rank", choices, (f"m{i}",)) for i in range(n_dims)])


def problem(name: str, n: int, k: int, seed: int) -> Values:
    """Return an integer version of a test problem whose optimum is not at any named place."""
    if name == "additive":
        return additive(n, k, seed)
    rng = np.random.default_rng((7, seed))
    target, order = rng.integers(0, k, n), rng.permutation(n)
    # A third of the dims says where on the front a point is, the others how far from it.
    place, away = order[: n // 3], order[n // 3 :]
    weights = rng.uniform(0.5, 1.5, len(place))
    weights /= weights.sum()
    farthest = np.maximum(target, k - 1 - target)

    def values(codes: np.ndarray) -> np.ndarray:
        x = codes[:, place] / (k - 1) @ weights
        distance = (np.abs(codes - target) / farthest)[:, away]
        if name == "dtlz2":
            radius = 1 + (distance**2).sum(axis=1)
            angle = x * math.pi / 2
            return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        g = 1 + 9 * distance.mean(axis=1)
        second = {
            "zdt1": g - np.sqrt(g * x),
            "zdt2": g - x**2 / g,
            "zdt3": g - np.sqrt(g * x) - x * np.sin(10 * math.pi * x) + 1,
        }
        return np.stack([x, second[name]], axis=1)

    return values


def additive(n: int, k: int, seed: int) -> Values:
    """Return losses and costs that about add up over dims, as those of sub-networks do."""
    rng = np.random.default_rng((7, seed))
    steps = rng.exponential(1, (n, k - 1)) * np.exp(rng.normal(0, 1, (n, 1))) * np.arange(1, k)
    losses = np.concatenate([np.zeros((n, 1)), np.cumsum(steps, axis=1)], axis=1)
    costs = np.arange(k - 1, -1, -1) * rng.uniform(0.5, 1.5, (n, 1))
    waves = rng.normal(0, 1, (n, k))
    losses, costs = losses / losses[:, -1].sum(), costs / costs[:, 0].sum()

    def values(codes: np.ndarray) -> np.ndarray:
        dims = np.arange(n)
        bend = 1 + 0.05 * np.sin(waves[dims, codes].sum(axis=1))
        sums = losses[dims, codes].sum(axis=1) * bend
        return np.stack([sums, costs[dims, codes].sum(axis=1)], axis=1)

    return values


def searched(
    propose: Propose,
    space: SearchSpace,
    values: Values,
    n: int,
    *,
    seed: int = 0,
    known: Known = KNOWN,
    history: list[Trial] | None = None,
) -> list[Trial]:
    trials = list(history or [])
    while len(trials) < n:
        config = propose(space, trials, np.random.default_rng((seed, len(trials))), known)
        assert config is not None
        found = values(np.array([space.encode(config)]))[0]
        measured = dict(zip(known.values, map(float, found), strict=False))
        trials.append(Trial(len(trials), config, measured))
    return trials


def array_of(trials: list[Trial]) -> np.ndarray:
    return np.array([list(trial.values.values()) for trial in trials])


class _Sampling(IntegerRandomSampling):
    """Random, but for the three configurations that ours begins with, too."""

    def _do(self, problem: Problem, n_samples: int, **kwargs: object) -> np.ndarray:
        codes = super()._do(problem, n_samples, **kwargs)
        last = int(problem.xu[0])
        codes[:3] = np.array([(last + 1) // 2, 0, last])[:, None]
        return codes


def by_pymoo(
    values: Values,
    n_dims: int,
    k: int,
    n: int,
    seed: int,
    *,
    eta: float = 3.0,
    aspired: tuple[tuple[float, ...], ...] = (),
) -> np.ndarray:
    """Return the values of all that pymoo's algorithm evaluates: ``(n, 2)``."""
    seen: list[np.ndarray] = []

    class Wrapped(Problem):
        def __init__(self) -> None:
            super().__init__(n_var=n_dims, n_obj=2, xl=0, xu=k - 1, vtype=int)

        def _evaluate(self, x: np.ndarray, out: dict, *args: object, **kwargs: object) -> None:
            out["F"] = values(x.astype(int))
            seen.append(out["F"])

    rounding = RoundingRepair()
    options = {
        "pop_size": KNOWN.population,
        "sampling": _Sampling(),
        "crossover": SBX(prob=1.0, eta=eta, vtype=float, repair=rounding),
        "mutation": PM(prob=1.0, eta=eta, vtype=float, repair=rounding),
        "eliminate_duplicates": True,
    }
    algorithm = NSGA2(**options)
    if aspired:
        algorithm = RNSGA2(ref_points=np.array(aspired), epsilon=0.001, **options)
    minimize(Wrapped(), algorithm, ("n_eval", n), seed=seed, verbose=False)
    return np.concatenate(seen)[:n]


@pytest.mark.parametrize(
    ("name", "n_dims", "k", "n"),
    [
        *((name, 12, 5, 240) for name in CORNERS),
        ("zdt1", 30, 3, 320),
        ("additive", 30, 3, 320),
        ("additive", 60, 2, 320),
    ],
)
def test_nsga2_dominates_at_least_99_percent_of_what_pymoos_does(
    name: str, n_dims: int, k: int, n: int
) -> None:
    space, corner = space_of(n_dims, k), np.array(CORNERS[name])
    ours, theirs = [], {3.0: [], 15.0: []}
    for seed in range(6):
        values = problem(name, n_dims, k, seed)
        ours.append(hypervolume(array_of(searched(nsga2.propose, space, values, n)), corner))
        for eta, found in theirs.items():
            found.append(hypervolume(by_pymoo(values, n_dims, k, n, seed, eta=eta), corner))
    best = max(np.mean(found) for found in theirs.values())
    assert best > 0.2
    assert np.mean(ours) >= 0.99 * best


def mean_distance(values: np.ndarray, aspired: tuple[tuple[float, ...], ...]) -> float:
    """Return the distance of the five nearest of the front, over reference points."""
    front = np.unique(values[pareto_ranks(values) == 0], axis=0)
    to_each = np.linalg.norm(front[:, None] - np.array(aspired), axis=2)
    return float(np.sort(to_each, axis=0)[:5].mean())


@pytest.mark.parametrize(
    "aspired", [((0.0, 0.0),), ((0.3, 0.2),), ((0.1, 0.5), (0.5, 0.1))], ids=str
)
def test_rnsga2_comes_as_near_to_the_aspired_values_as_pymoos(
    aspired: tuple[tuple[float, ...], ...],
) -> None:
    # The largest and the smallest are the ends of the front: it reaches from 0 to 1 in both values.
    space, known = space_of(12, 5), replace(KNOWN, reference_points=aspired)
    ours, theirs = [], []
    for seed in range(4):
        values = additive(12, 5, seed)
        trials = searched(rnsga2.propose, space, values, 240, known=known)
        ours.append(mean_distance(array_of(trials), aspired))
        theirs.append(mean_distance(by_pymoo(values, 12, 5, 240, seed, aspired=aspired), aspired))
    assert np.mean(ours) <= np.mean(theirs)


def test_rnsga2_finds_more_near_the_aspired_values_than_nsga2_does() -> None:
    space, aspired = space_of(12, 5), ((0.6, 0.1),)
    known = replace(KNOWN, reference_points=aspired)
    near = dict.fromkeys(EVOLUTIONARY, 0.0)
    for seed, (name, propose) in itertools.product(range(4), EVOLUTIONARY.items()):
        trials = searched(propose, space, additive(12, 5, seed), 160, known=known)
        near[name] += mean_distance(array_of(trials), aspired)
    assert near["rnsga2"] < near["nsga2"]


def test_the_origin_is_aspired_to_unless_told_otherwise() -> None:
    space, values = space_of(8), additive(8, 3, 0)
    told = replace(KNOWN, reference_points=((0.0, 0.0),))
    plain = searched(rnsga2.propose, space, values, 70)
    assert plain == searched(rnsga2.propose, space, values, 70, known=told)


@pytest.mark.parametrize("point", [(0.5,), (0.1, 0.2, 0.3), (0.1, math.nan)])
def test_a_reference_point_of_other_values_is_refused(point: tuple[float, ...]) -> None:
    known = replace(KNOWN, reference_points=((0.0, 0.0), point))
    with pytest.raises(BadRecipe, match="one number for each of loss, params"):
        rnsga2.propose(space_of(3), [], np.random.default_rng(0), known)


@pytest.mark.parametrize("name", ["zdt1", "additive"])
def test_tpe_dominates_more_than_random_search_does(name: str) -> None:
    space, corner = space_of(12, 5), np.array(CORNERS[name])
    for seed in range(2):
        values = problem(name, 12, 5, seed)
        modelled = hypervolume(array_of(searched(tpe.propose, space, values, 100)), corner)
        drawn = hypervolume(array_of(searched(random_search.propose, space, values, 100)), corner)
        assert modelled > 1.05 * drawn


@pytest.mark.parametrize("propose", SAMPLING.values(), ids=SAMPLING)
def test_one_value_is_enough(propose: Propose) -> None:
    space, known = space_of(8), Known(("loss",))
    target = np.array([0, 2, 1, 1, 0, 2, 2, 1])

    def distance(codes: np.ndarray) -> np.ndarray:
        return np.abs(codes - target).sum(axis=1, keepdims=True)

    trials = searched(propose, space, distance, 100, known=known)
    drawn = searched(random_search.propose, space, distance, 100, known=known)
    assert array_of(trials).min() < array_of(drawn).min()


@pytest.mark.parametrize("propose", EVOLUTIONARY.values(), ids=EVOLUTIONARY)
def test_three_values_are_searched_as_well(propose: Propose) -> None:
    space, pair = space_of(10), additive(10, 3, 0)
    known = Known(("loss", "params", "memory"))

    def three(codes: np.ndarray) -> np.ndarray:
        return np.concatenate([pair(codes), codes[:, :1]], axis=1)

    trials = searched(propose, space, three, 80, known=known)
    assert len({trial.config for trial in trials}) == 80
    assert len(non_dominated(trials)) > 10


@pytest.mark.parametrize("propose", SAMPLING.values(), ids=SAMPLING)
def test_limits_that_random_ones_hardly_ever_keep_are_kept_after_a_while(propose: Propose) -> None:
    space, pair, limit = space_of(16), additive(16, 3, 0), 0.3

    def within(propose: Propose) -> int:
        trials: list[Trial] = []
        for number in range(120):
            config = propose(space, trials, np.random.default_rng((0, number)), KNOWN)
            assert config is not None
            loss, params = map(float, pair(np.array([space.encode(config)]))[0])
            values = {"loss": loss, "params": params}
            over = max(0.0, params / limit - 1)
            trials.append(Trial(number, config, values, violation=over))
        return sum(trial.violation == 0 for trial in trials[70:])

    assert within(random_search.propose) <= 2
    assert within(propose) >= 10


@pytest.mark.parametrize("propose", EVOLUTIONARY.values(), ids=EVOLUTIONARY)
def test_children_take_their_choices_from_trials_within_limits(propose: Propose) -> None:
    space = space_of(40)
    rng = np.random.default_rng(0)
    # Those within limits use the first two choices, those beyond use the last one and are better.
    trials = [
        Trial(
            number,
            space.decode((rng.integers(0, 2, 40) if number < 30 else np.full(40, 2)).tolist()),
            {"loss": float(rng.random() - (number >= 30)), "params": float(rng.random())},
            violation=0.0 if number < 30 else 0.1,
        )
        for number in range(31)
    ]
    named = [space.heuristic(), space.largest(), space.smallest()]
    trials += [
        Trial(31 + i, config, {"loss": math.nan, "params": math.nan})
        for i, config in enumerate(named)
    ]
    known = replace(KNOWN, population=10)
    for seed in range(20):
        child = propose(space, trials, np.random.default_rng(seed), known)
        assert child is not None
        assert sum(index == 2 for index in space.encode(child)) <= 5


@pytest.mark.parametrize("propose", SAMPLING.values(), ids=SAMPLING)
def test_the_first_three_are_heuristic_largest_and_smallest(propose: Propose) -> None:
    space = space_of(5)
    trials = searched(propose, space, additive(5, 3, 0), 4)
    named = [space.heuristic(), space.largest(), space.smallest()]
    assert [trial.config for trial in trials[:3]] == named


@pytest.mark.parametrize("propose", EVOLUTIONARY.values(), ids=EVOLUTIONARY)
def test_the_first_generation_is_drawn_at_random(propose: Propose) -> None:
    space, values = space_of(9), additive(9, 3, 0)
    known = replace(KNOWN, population=12)
    trials = searched(propose, space, values, 14, known=known)
    drawn = searched(random_search.propose, space, values, 14, known=known)
    assert trials[:12] == drawn[:12]
    assert trials[12:] != drawn[12:]


@pytest.mark.parametrize("propose", ALL.values(), ids=ALL)
def test_the_proposal_depends_on_the_history_and_the_generator_alone(propose: Propose) -> None:
    space, values = space_of(9), additive(9, 3, 1)
    known = replace(KNOWN, population=8)
    whole = searched(propose, space, values, 40, known=known)
    for k in (0, 2, 9, 25, 39):
        assert searched(propose, space, values, 40, known=known, history=whole[:k]) == whole
    other = searched(propose, space, values, 40, known=known, seed=1)
    assert (other[3:] != whole[3:]) == (propose is not exhaustive.propose)


@pytest.mark.parametrize("propose", ALL.values(), ids=ALL)
@pytest.mark.parametrize("unfinished", [5, 30])
def test_what_others_measure_now_is_not_proposed_again(propose: Propose, unfinished: int) -> None:
    space, values = space_of(4), additive(4, 3, 0)
    known = replace(KNOWN, population=6)
    trials = searched(propose, space, values, 40, known=known)
    nothing = {"loss": math.nan, "params": math.nan}
    trials[-unfinished:] = [replace(trial, values=nothing) for trial in trials[-unfinished:]]
    tried = {trial.config for trial in trials}
    for seed in range(10):
        assert propose(space, trials, np.random.default_rng(seed), known) not in tried


@pytest.mark.parametrize("propose", SAMPLING.values(), ids=SAMPLING)
def test_a_search_in_which_all_fail_goes_on(propose: Propose) -> None:
    space, known = space_of(4), replace(KNOWN, population=5)

    def broken(codes: np.ndarray) -> np.ndarray:
        return np.full((len(codes), 2), np.inf)

    trials = searched(propose, space, broken, 30, known=known)
    assert len({trial.config for trial in trials}) == 30


@pytest.mark.parametrize("propose", ALL.values(), ids=ALL)
@pytest.mark.parametrize(("n_dims", "k"), [(1, 1), (1, 4), (3, 3), (2, 8)])
def test_a_small_space_is_tried_whole_and_then_nothing_is_left(
    propose: Propose, n_dims: int, k: int
) -> None:
    space, known = space_of(n_dims, k), replace(KNOWN, population=4)
    trials = searched(propose, space, lambda codes: codes[:, [0, -1]] * [1, -1], space.size)
    assert len({trial.config for trial in trials}) == space.size
    assert propose(space, trials, np.random.default_rng(0), known) is None


@pytest.mark.parametrize("propose", SAMPLING.values(), ids=SAMPLING)
def test_dims_of_one_choice_and_of_two_are_searched_with_others(propose: Propose) -> None:
    mixed = SearchSpace(
        [
            *space_of(4, 5).dims,
            ElasticDim("fixed", "ffn", (48,), ("m",)),
            *(ElasticDim(f"kept.{i}", "depth", (1, 0), ("m",)) for i in range(4)),
        ]
    )
    known = replace(KNOWN, population=10)

    def values(codes: np.ndarray) -> np.ndarray:
        return np.stack([codes.sum(axis=1), -(codes**2).sum(axis=1)], axis=1)

    trials = searched(propose, mixed, values, 60, known=known)
    assert all(trial.config in mixed for trial in trials)
    later = trials[20:]
    assert {trial.config["fixed"] for trial in later} == {48}
    assert all({trial.config[f"kept.{i}"] for trial in later} == {0, 1} for i in range(4))


def test_exhaustive_finds_the_front_of_all_in_counting_order() -> None:
    space, values = space_of(4), additive(4, 3, 0)
    trials = searched(exhaustive.propose, space, values, space.size)
    codes = list(itertools.product(range(3), repeat=4))
    assert [space.encode(trial.config) for trial in trials] == codes
    everything = values(np.array(codes))
    best = np.flatnonzero(pareto_ranks(everything) == 0)
    assert [trial.number for trial in non_dominated(trials)] == best.tolist()


def test_exhaustive_passes_over_what_was_tried_in_another_order() -> None:
    space, values = space_of(2), additive(2, 3, 0)
    drawn = searched(random_search.propose, space, values, 5)
    whole = searched(exhaustive.propose, space, values, 9, history=drawn)
    left = list(itertools.product(range(3), repeat=2))
    left = [c for c in left if space.decode(c) not in {trial.config for trial in drawn}]
    assert [space.encode(trial.config) for trial in whole[5:]] == left


def test_heuristic_tries_the_named_ones_and_then_nothing() -> None:
    space = space_of(3)
    trials = searched(heuristic.propose, space, additive(3, 3, 0), 3)
    named = [space.heuristic(), space.largest(), space.smallest()]
    assert [trial.config for trial in trials] == named
    assert heuristic.propose(space, trials, np.random.default_rng(0), KNOWN) is None
    # Of two choices the heuristic is the smallest: there are but two to try.
    both = searched(heuristic.propose, space_of(3, 2), additive(3, 2, 0), 2)
    assert heuristic.propose(space_of(3, 2), both, np.random.default_rng(0), KNOWN) is None


def test_tpe_sees_the_best_trials_of_a_long_history_only() -> None:
    space, values = space_of(210), additive(210, 3, 0)
    drawn = searched(random_search.propose, space, values, 300)
    shown = tpe._shown(space, History(drawn))
    assert len(shown) == 95
    ranks = pareto_ranks(array_of(drawn))
    numbers = [trial.number for trial in shown]
    assert numbers == sorted(numbers)
    assert ranks[numbers].max() <= np.delete(ranks, numbers).min()
