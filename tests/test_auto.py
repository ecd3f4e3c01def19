"""The default search: what it reaches with a tenth of the trials, and what it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from pymoo.indicators.hv import HV

from elastune.allocate import Knapsack, allocate
from elastune.search import auto, hill_climb, milp, nsga2
from elastune.search.base import Known, Propose, Trial, non_dominated
from elastune.search.codes import codes_of
from elastune.space import ElasticDim, SearchSpace, SubnetConfig

VALUES = ("loss", "params")


class Interacting:
    """Losses that add up over dims but for a tenth of their spread, which is between pairs of dims.

    Costs add up. ``shape`` bends the loss: it compounds ("exp") or levels off ("sat").
    """

    def __init__(self, n: int, k: int, seed: int, shape: str = "add") -> None:
        choices = tuple(range(8 * k, 0, -8))
        self.space = SearchSpace(
            [ElasticDim(f"d{i}", "rank", choices, (f"m{i}",)) for i in range(n)]
        )
        rng = np.random.default_rng(seed)
        steps = rng.exponential(1, (n, k - 1)) * np.exp(rng.normal(0, 1, (n, 1))) * np.arange(1, k)
        table = np.concatenate([np.zeros((n, 1)), np.cumsum(steps, axis=1)], axis=1)
        self.table = table / table[:, -1].sum()
        saved = np.arange(k - 1, -1, -1) * rng.uniform(0.5, 1.5, (n, 1))
        self.saved = saved / saved[:, 0].sum()
        self.pairs = np.triu(rng.normal(0, 1, (n, n)), 1)
        alone = self.table[np.arange(n), rng.integers(0, k, (500, n))]
        between = np.einsum("ij,jk,ik->i", np.sqrt(alone), self.pairs, np.sqrt(alone))
        self.pairs *= 0.1 * alone.sum(axis=1).std() / between.std()
        self.shape = shape

    def at(self, config: SubnetConfig) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(len(self.space)), np.array(self.space.encode(config))

    def costs(self, config: SubnetConfig) -> dict[str, float]:
        return {"params": float(self.saved[self.at(config)].sum())}

    def __call__(self, config: SubnetConfig) -> dict[str, float]:
        alone = self.table[self.at(config)]
        root = np.sqrt(alone)
        loss = float(alone.sum() + root @ self.pairs @ root)
        if self.shape == "exp":
            loss = math.expm1(5 * loss) / 5
        if self.shape == "sat":
            loss = 0.5 * -math.expm1(-5 * loss)
        return {"loss": 2 + loss, **self.costs(config)}

    def losses(self) -> dict[str, dict[int, float]]:
        largest = self.space.largest()
        return {
            dim.name: {
                c: self(SubnetConfig({**largest, dim.name: c}))["loss"] - self(largest)["loss"]
                for c in dim.choices
            }
            for dim in self.space.dims
        }

    def volume(self, trials: Sequence[Trial]) -> float:
        """Hypervolume below the smallest's loss and the largest's cost."""
        corner = self(self.space.smallest())["loss"], self.costs(self.space.largest())["params"]
        points = [list(t.values.values()) for t in non_dominated(trials)]
        return float(HV(ref_point=np.array(corner))(np.array(points)))


def run(
    propose: Propose,
    problem: Interacting,
    known: Known,
    n: int,
    *,
    seed: int = 0,
    limits: Mapping[str, float] | None = None,
) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < n:
        rng = np.random.default_rng((seed, len(trials)))
        config = propose(problem.space, trials, rng, known)
        assert config is not None
        assert config not in {trial.config for trial in trials}
        measured = problem(config)
        missed = sum(max(0.0, measured[name] - most) for name, most in (limits or {}).items())
        values = {name: measured[name] for name in known.values}
        trials.append(Trial(len(trials), config, values, violation=missed))
    return trials


@pytest.mark.parametrize(
    ("n", "k", "shape"), [(36, 4, "add"), (60, 3, "exp"), (30, 5, "sat"), (48, 3, "add")]
)
def test_a_tenth_of_the_trials_of_nsga2_reach_its_hypervolume(n: int, k: int, shape: str) -> None:
    """Single-choice losses known; for each of three seeds, and with a margin on average."""
    ratios = []
    for seed in range(3):
        problem = Interacting(n, k, seed, shape)
        plain = run(nsga2.propose, problem, Known(VALUES, problem.costs), 300, seed=seed)
        known = Known(VALUES, problem.costs, problem.losses())
        found = run(auto.propose, problem, known, 30, seed=seed)
        ratios.append(problem.volume(found) / problem.volume(plain))
    assert min(ratios) > 1.0
    assert np.mean(ratios) > 1.03


def test_without_losses_a_third_of_the_trials_of_nsga2_reach_its_hypervolume() -> None:
    ratios = []
    for seed in range(3):
        problem = Interacting(36, 3, seed)
        known = Known(VALUES, problem.costs)
        plain = run(nsga2.propose, problem, known, 300, seed=seed)
        found = run(auto.propose, problem, Known(VALUES, problem.costs), 100, seed=seed)
        ratios.append(problem.volume(found) / problem.volume(plain))
    assert np.mean(ratios) > 1.0


def test_refitting_finds_more_than_the_losses_alone() -> None:
    ratios = []
    for seed in range(3):
        problem = Interacting(24, 3, seed, "exp")
        known = Known(VALUES, problem.costs, problem.losses())
        found, alone = (run(p, problem, known, 40, seed=seed) for p in (auto.propose, milp.propose))
        ratios.append(problem.volume(found) / problem.volume(alone))
    assert np.mean(ratios) > 1.0


def test_it_begins_with_the_named_ones_and_the_answers_to_budgets() -> None:
    problem = Interacting(20, 3, 0)
    losses = problem.losses()
    known = Known(VALUES, problem.costs, losses, budgets=(0.7, 0.31))
    trials = run(auto.propose, problem, known, 7)
    space = problem.space
    assert [t.config for t in trials[:3]] == [space.heuristic(), space.largest(), space.smallest()]
    for trial, budget in zip(trials[3:5], known.budgets, strict=True):
        assert trial.config == allocate(space, losses, lambda c: problem.costs(c)["params"], budget)


def test_proposals_depend_on_what_is_given_alone() -> None:
    problem = Interacting(12, 3, 1)
    for losses in (None, problem.losses()):
        trials = run(auto.propose, problem, Known(VALUES, problem.costs, losses), 24)
        for n in (2, 5, 12, 22, 23):
            known = Known(VALUES, problem.costs, losses)
            rng = np.random.default_rng((0, n))
            assert auto.propose(problem.space, trials[:n], rng, known) == trials[n].config


def test_candidates_within_the_limits_come_first() -> None:
    problem = Interacting(24, 3, 2)
    limits = {"params": (-math.inf, 0.3), "loss": (-math.inf, 2.25)}
    most = {name: high for name, (_, high) in limits.items()}
    for losses in (None, problem.losses()):
        known = Known(VALUES, problem.costs, losses, limits=limits)
        trials = run(auto.propose, problem, known, 60, limits=most)
        inside = sum(t.violation == 0 for t in trials[20:])
        assert inside > 24
        free = run(auto.propose, problem, Known(VALUES, problem.costs, losses), 60, limits=most)
        assert inside > sum(t.violation == 0 for t in free[20:])
        best = min(t.values["loss"] for t in trials if t.violation == 0)
        assert best <= min(t.values["loss"] for t in free if t.violation == 0)


def test_one_value_is_minimised_within_a_limit_on_the_cost() -> None:
    problem = Interacting(20, 3, 3)
    known = Known(("loss",), problem.costs, problem.losses(), limits={"params": (-math.inf, 0.5)})

    def over(trial: Trial) -> bool:
        return problem.costs(trial.config)["params"] > 0.5

    trials: list[Trial] = []
    while len(trials) < 25:
        rng = np.random.default_rng((0, len(trials)))
        config = auto.propose(problem.space, trials, rng, known)
        missed = max(0.0, problem.costs(config)["params"] / 0.5 - 1)
        values = {"loss": problem(config)["loss"]}
        trials.append(Trial(len(trials), config, values, violation=missed))
    assert not any(map(over, trials[3:]))
    best = min(t.values["loss"] for t in trials if not over(t))
    assert best <= trials[3].values["loss"]
    climbed = run(hill_climb.propose, problem, Known(VALUES, problem.costs), 100)
    assert best < min(t.values["loss"] for t in climbed if t.values["params"] <= 0.5)


@pytest.mark.parametrize("values", [("loss",), ("loss", "params", "macs")])
def test_one_value_and_three_values_are_searched(values: tuple[str, ...]) -> None:
    problem = Interacting(8, 3, 4)
    trials: list[Trial] = []
    while len(trials) < 40:
        rng = np.random.default_rng((0, len(trials)))
        config = auto.propose(problem.space, trials, rng, Known(values))
        assert config not in {trial.config for trial in trials}
        measured = problem(config)
        measured["macs"] = sum(config.values()) ** 1.5
        trials.append(Trial(len(trials), config, {name: measured[name] for name in values}))
    if values == ("loss",):
        assert min(t.values["loss"] for t in trials) == trials[1].values["loss"]
    else:
        assert len(non_dominated(trials)) > 12


def test_costs_that_cannot_be_counted_are_fitted() -> None:
    problem = Interacting(24, 3, 5)
    losses = problem.losses()
    counted = run(auto.propose, problem, Known(VALUES, problem.costs, losses), 40)
    fitted = run(auto.propose, problem, Known(VALUES, None, losses), 40)
    assert problem.volume(fitted) > 0.97 * problem.volume(counted)


@pytest.mark.parametrize("failing", ["all", "largest", "some"])
def test_failed_and_pending_trials_are_passed_over(failing: str) -> None:
    problem = Interacting(10, 3, 6)
    trials: list[Trial] = []
    for number in range(30):
        known = Known(VALUES, problem.costs, problem.losses() if number % 2 else None)
        rng = np.random.default_rng((0, number))
        config = auto.propose(problem.space, trials, rng, known)
        assert config in problem.space
        assert config not in {trial.config for trial in trials}
        is_largest = config == problem.space.largest()
        broken = {"all": True, "largest": is_largest, "some": number % 3 == 0}[failing]
        values = dict.fromkeys(VALUES, math.nan) if broken else problem(config)
        trials.append(Trial(number, config, values))


def test_a_far_off_quality_does_not_blind_the_model() -> None:
    problem = Interacting(16, 3, 7)
    known = Known(VALUES, problem.costs, problem.losses())
    trials = run(auto.propose, problem, known, 12)
    broken = [
        Trial(t.number, t.config, {**t.values, "loss": 1e30})
        if t.config == problem.space.smallest()
        else t
        for t in trials
    ]
    config = auto.propose(problem.space, broken, np.random.default_rng(0), known)
    assert config not in {trial.config for trial in trials}


def test_all_of_a_small_space_is_tried_once() -> None:
    problem = Interacting(3, 3, 8)
    assert len(run(auto.propose, problem, Known(VALUES, problem.costs), 27)) == 27


def test_the_expected_gain_is_that_of_simulated_measurements() -> None:
    rng = np.random.default_rng(0)
    front = np.array([[1.0, 5.0], [2.0, 3.0], [4.0, 1.0]])
    corner = (5.0, 6.0)
    means, spread = np.array([1.5, 3.0, 0.5, 4.9, 2.0]), np.array([0.5, 1.0, 0.2, 0.7, 1e-9])
    costs = np.array([2.0, 0.5, 5.5, 4.0, 2.5])
    found = auto.expected_gain(means, spread, costs, front, corner)
    volume = HV(ref_point=np.array(corner))
    before = volume(front)
    for i in range(len(means)):
        drawn = rng.normal(means[i], spread[i], 4000)
        gains = [volume(np.vstack([front, [quality, costs[i]]])) - before for quality in drawn]
        assert found[i] == pytest.approx(np.mean(gains), rel=0.05, abs=0.01)


def block_space(n_blocks: int) -> SearchSpace:
    dims = []
    for i in range(n_blocks):
        block = f"model.layers.{i}"
        dims.append(ElasticDim(f"layers.{i}.heads", "heads", (4, 2, 0), (f"{block}.attn.o",)))
        dims.append(ElasticDim(f"layers.{i}.ffn", "ffn", (60, 40, 10), (f"{block}.mlp.down",)))
        dims.append(ElasticDim(f"layers.{i}.block", "depth", (1, 0), (block,)))
    return SearchSpace(dims)


def test_solutions_of_the_relaxation_are_answers_to_their_own_budgets() -> None:
    space = block_space(4)
    codes = codes_of(space)

    def cost(config: SubnetConfig) -> float:
        kept = [i for i in range(4) if config[f"layers.{i}.block"]]
        return 10 + sum(
            7.0 + 10 * config[f"layers.{i}.heads"] + config[f"layers.{i}.ffn"] for i in kept
        )

    rng = np.random.default_rng(0)
    steps = rng.exponential(1.0, len(codes.dim_of))
    knapsack = Knapsack(space, cost)
    rows = codes.canonical(auto.relaxed(codes, knapsack, steps, 40, rng))
    found = {codes.config(row) for row in rows}
    assert len(found) > 5
    for row in rows:
        config = codes.config(row)
        answer = knapsack.allocate(codes.losses(steps), cost(config))
        sums = codes.features(codes.of([config, answer])) @ steps
        assert sums[0] == pytest.approx(sums[1], abs=1e-6)
        assert any(config[f"layers.{i}.block"] for i in range(4))
