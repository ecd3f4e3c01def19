"""The search by integer programmes: against trying everything, and in what order it asks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from elastune.allocate import additive_loss, allocate
from elastune.search import milp
from elastune.search.base import Known, Trial, first_untried, non_dominated
from elastune.space import ElasticDim, SearchSpace, SubnetConfig

VALUES = ("loss", "params")


def toy_space(n_blocks: int = 2) -> SearchSpace:
    dims = []
    for i in range(n_blocks):
        block = f"model.layers.{i}"
        dims.append(ElasticDim(f"layers.{i}.heads", "heads", (4, 2, 0), (f"{block}.attn.o",)))
        dims.append(ElasticDim(f"layers.{i}.ffn", "ffn", (60, 40, 10), (f"{block}.mlp.down",)))
        dims.append(ElasticDim(f"layers.{i}.block", "depth", (1, 0), (block,)))
    return SearchSpace(dims)


def params(config: SubnetConfig) -> float:
    """A block costs 7, 10 a head and 1 a channel; 100 are outside of blocks."""
    blocks = [i for i in range(len(config) // 3) if config[f"layers.{i}.block"]]
    return 100.0 + sum(
        7.0 + 10.0 * config[f"layers.{i}.heads"] + config[f"layers.{i}.ffn"] for i in blocks
    )


class Toy:
    """A space whose losses add up; some choices can be broken."""

    def __init__(self, seed: int, n_blocks: int = 2) -> None:
        self.space = toy_space(n_blocks)
        rng = np.random.default_rng(seed)
        self.losses = {
            dim.name: dict(
                zip(
                    dim.choices,
                    [0.0, *rng.exponential(1.0, len(dim.choices) - 1).cumsum().tolist()],
                    strict=True,
                )
            )
            for dim in self.space.dims
        }
        self.broken: tuple[str, int] | None = None

    def __call__(self, config: SubnetConfig) -> dict[str, float]:
        loss = 3.0 + additive_loss(self.space, self.losses, config)
        if self.broken is not None and config[self.broken[0]] == self.broken[1]:
            loss = math.nan
        return {"loss": loss, "params": params(config)}

    def costs(self, config: SubnetConfig) -> dict[str, float]:
        return {"params": params(config)}

    def every(self) -> list[SubnetConfig]:
        """All configurations but those that leave out all blocks."""
        grid = itertools.product(*(range(len(dim.choices)) for dim in self.space.dims))
        configs = [self.space.decode(code) for code in grid]
        n = len(self.space) // 3
        return [c for c in configs if any(c[f"layers.{i}.block"] for i in range(n))]

    def run(
        self, known: Known, n: int, *, seed: int = 0, history: Sequence[Trial] = ()
    ) -> list[Trial]:
        trials = list(history)
        while len(trials) < n:
            rng = np.random.default_rng((seed, len(trials)))
            config = milp.propose(self.space, trials, rng, known)
            assert config is not None
            assert config not in {trial.config for trial in trials}
            values = {name: self(config)[name] for name in known.values}
            trials.append(Trial(len(trials), config, values))
        return trials


def front_of(toy: Toy) -> set[tuple[float, float]]:
    """The true front by trying everything."""
    trials = [Trial(i, config, toy(config)) for i, config in enumerate(toy.every())]
    return {(t.values["loss"], t.values["params"]) for t in non_dominated(trials)}


@pytest.mark.parametrize("seed", range(3))
def test_answers_to_every_budget_of_the_front_are_the_front(seed: int) -> None:
    toy = Toy(seed)
    expected = front_of(toy)
    assert len(expected) > 5
    budgets = tuple(cost for _, cost in sorted(expected, key=lambda point: point[1]))
    known = Known(VALUES, toy.costs, toy.losses, budgets)
    trials = toy.run(known, 3 + len(budgets))
    # Where an answer was tried before, something else is: it may leave out all blocks.
    valid = [t for t in trials if t.values["params"] > 100]
    found = {(t.values["loss"], t.values["params"]) for t in non_dominated(valid)}
    assert {(round(a, 9), b) for a, b in found} == {(round(a, 9), b) for a, b in expected}


def test_single_choices_come_first_in_a_fixed_order_where_no_losses_are_known() -> None:
    toy = Toy(0)
    known = Known(VALUES, toy.costs)
    largest = toy.space.largest()
    singles = [
        SubnetConfig({**largest, dim.name: c}) for dim in toy.space.dims for c in dim.choices[1:]
    ]
    trials = toy.run(known, 3 + len(singles) + 6)
    assert [t.config for t in trials[:3]] == [
        toy.space.heuristic(),
        toy.space.largest(),
        toy.space.smallest(),
    ]
    assert [t.config for t in trials[3 : 3 + len(singles)]] == singles
    measured = milp.single_losses(toy.space, trials)
    assert measured is not None
    for name, of_dim in toy.losses.items():
        assert measured[name] == pytest.approx(of_dim)
    # From here on as if the losses had been known.
    given = Known(VALUES, toy.costs, toy.losses)
    again = toy.run(given, len(trials), history=trials[: 3 + len(singles)])
    assert [t.config for t in again] == [t.config for t in trials]


def test_a_choice_that_failed_alone_is_not_used_afterwards() -> None:
    toy = Toy(1, n_blocks=4)
    toy.losses["layers.0.ffn"][40] = -1.0  # it would be taken
    trials = toy.run(Known(VALUES, toy.costs), 30)
    assert any(t.config["layers.0.ffn"] == 40 for t in trials[23:])
    toy.broken = ("layers.0.ffn", 40)
    trials = toy.run(Known(VALUES, toy.costs), 30)
    singles = [t for t in trials if sum(t.config[n] != c for n, c in trials[1].config.items()) == 1]
    answers = [t for t in trials[3:] if t not in singles]
    assert len(answers) >= 6
    assert all(t.config["layers.0.ffn"] != 40 for t in answers)


def test_wanted_budgets_come_first_then_even_ones_then_the_widest_gap() -> None:
    toy = Toy(2, n_blocks=6)
    budgets = (330.0, 250.0)
    known = Known(VALUES, toy.costs, toy.losses, budgets)
    trials = toy.run(known, 30)
    wanted = [allocate(toy.space, toy.losses, params, budget) for budget in budgets]
    assert [t.config for t in trials[3:5]] == wanted
    dearest = params(toy.space.largest())
    smallest = params(toy.space.smallest())
    parts = (1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8)  # any first few are spread evenly
    answers = [
        allocate(toy.space, toy.losses, params, smallest + part * (dearest - smallest))
        for part in parts
    ]
    new = [config for config in dict.fromkeys(answers) if config not in wanted]
    assert len(new) >= milp.EVENLY - 2
    assert [t.config for t in trials[5 : 5 + len(new)]] == new
    # Where a wide gap is left nothing is to be found in it.
    costs = np.sort([t.values["params"] for t in trials])
    tried = {t.config for t in trials}
    for a, b in itertools.pairwise(costs):
        middle = a + 0.6 * (b - a)
        if b - a > 3 * (dearest - costs[0]) / len(trials):
            assert allocate(toy.space, toy.losses, params, middle) in tried


def test_every_answer_is_the_least_loss_within_its_own_cost() -> None:
    toy = Toy(3, n_blocks=3)
    trials = toy.run(Known(VALUES, toy.costs, toy.losses), 12)
    table = [(toy(config)["loss"], params(config)) for config in toy.every()]
    for trial in trials[3:]:
        best = min(loss for loss, cost in table if cost <= trial.values["params"])
        assert trial.values["loss"] == pytest.approx(best)


def test_costs_are_fitted_where_they_cannot_be_counted() -> None:
    toy = Toy(4, n_blocks=3)
    with_costs = toy.run(Known(VALUES, toy.costs), 30)
    without = toy.run(Known(VALUES), 30)
    true = [t.config for t in with_costs[18:]]
    # Answers to about the same budgets; what a cost is off by can change some.
    assert len({t.config for t in without[18:]} & set(true)) >= len(true) // 2


def test_with_one_value_the_least_loss_within_the_limit_is_asked_for() -> None:
    toy = Toy(5)
    limits = {"params": (0.0, 190.0)}
    known = Known(("loss",), toy.costs, toy.losses, limits=limits)
    answer = toy.run(known, 4)[3]
    best = min(toy(c)["loss"] for c in toy.every() if params(c) <= 190)
    assert params(answer.config) <= 190
    assert answer.values["loss"] == pytest.approx(best)
    unlimited = toy.run(Known(("loss",), losses=toy.losses), 6)
    assert unlimited[1].values["loss"] == min(t.values["loss"] for t in unlimited)


def test_budgets_above_a_limit_are_not_asked_for() -> None:
    toy = Toy(6, n_blocks=8)
    known = Known(VALUES, toy.costs, toy.losses, (650.0,), limits={"params": (0.0, 500.0)})
    trials = toy.run(known, 15)
    assert all(t.values["params"] <= 500 for t in trials[3:])
    assert trials[3].config == allocate(toy.space, toy.losses, params, 500)


@pytest.mark.parametrize("with_losses", [True, False])
def test_all_of_a_small_space_is_tried_once(with_losses: bool) -> None:
    toy = Toy(7, n_blocks=1)
    losses = toy.losses if with_losses else None
    trials = toy.run(Known(VALUES, toy.costs, losses), toy.space.size)
    assert len({t.config for t in trials}) == toy.space.size


def test_proposals_depend_on_what_is_given_alone() -> None:
    toy = Toy(8)
    trials = toy.run(Known(VALUES, toy.costs, toy.losses), 14)
    for n in (3, 9, 13):
        known = Known(VALUES, toy.costs, toy.losses)  # anew: nothing is remembered of the others
        rng = np.random.default_rng((0, n))
        assert milp.propose(toy.space, trials[:n], rng, known) == trials[n].config


def test_a_largest_that_failed_leaves_it_to_hill_climbing() -> None:
    toy = Toy(9)
    largest = toy.space.largest()
    trials = toy.run(Known(VALUES, toy.costs), 20)
    broken = [
        Trial(t.number, t.config, {"loss": math.nan, "params": 1.0}) if t.config == largest else t
        for t in trials
    ]
    assert first_untried(toy.space, {t.config for t in broken}) is None
    rng = np.random.default_rng(0)
    config = milp.propose(toy.space, broken, rng, Known(VALUES, toy.costs))
    assert config in toy.space
    assert config not in {t.config for t in broken}
