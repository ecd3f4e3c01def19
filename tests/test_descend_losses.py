"""Losses on the way down: each level holds what cuts cost at the answer to the last budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_estimate_losses import CAUSAL, elastic
from tiny_models import encoded

from elastune.allocate import Knapsack
from elastune.cost import CostModel
from elastune.descend_losses import Level, descend
from elastune.estimate_losses import estimate_choice_losses
from elastune.search import Known, auto, milp
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork


@pytest.fixture(scope="module")
def net() -> SuperNetwork:
    return elastic("llama")


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    return [CAUSAL.collate(encoded(9, 14, 6)), CAUSAL.collate(encoded(12))]


@pytest.fixture(scope="module")
def cost_of(net: SuperNetwork) -> Any:
    count = CostModel(net, 16)
    return lambda config: float(count(config).block_macs)


@pytest.fixture(scope="module")
def levels(net: SuperNetwork, batches: list[dict[str, Any]], cost_of: Any) -> list[Level]:
    return descend(net, batches, CAUSAL, cost_of, n_levels=4)


def test_the_first_level_is_that_of_the_largest(
    net: SuperNetwork, batches: list[dict[str, Any]], cost_of: Any, levels: list[Level]
) -> None:
    assert levels[0].cost == cost_of(net.space.largest())
    assert levels[0].losses == estimate_choice_losses(net, batches, CAUSAL)


def test_each_level_adds_what_is_lost_further_at_the_answer_to_its_budget(
    net: SuperNetwork, batches: list[dict[str, Any]], cost_of: Any, levels: list[Level]
) -> None:
    space, knapsack = net.space, Knapsack(net.space, cost_of)
    largest, smallest = cost_of(space.largest()), cost_of(space.smallest())
    budgets = [largest + part * (smallest - largest) for part in (0.2, 0.4, 0.6)]
    found = iter(levels)
    above = next(found)
    for budget in budgets:
        if budget >= above.cost:
            continue  # a block less was below this budget, too
        at = knapsack.allocate(above.losses, budget)
        level = next(found)
        assert level.cost == cost_of(at)
        further = estimate_choice_losses(net, batches, CAUSAL, at=at)
        for dim in space.dims:
            for choice in dim.choices:
                expected = above.losses[dim.name][choice]
                if dim.name in further and choice <= at[dim.name]:
                    from_there = further[dim.name][choice]
                    expected = above.losses[dim.name][at[dim.name]] + from_there
                assert level.losses[dim.name][choice] == pytest.approx(expected, abs=1e-12)
        above = level
    assert next(found, None) is None
    assert len(levels) > 2


def test_what_was_active_is_so_again(
    net: SuperNetwork, batches: list[dict[str, Any]], cost_of: Any
) -> None:
    smallest = net.space.smallest()
    told: list[tuple[int, int]] = []
    with net.active(smallest):
        descend(net, batches, CAUSAL, cost_of, n_levels=2, progress=lambda *done: told.append(done))
        assert net.config == smallest
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("algorithm", [auto.propose, milp.propose])
def test_budgets_are_solved_with_the_losses_of_their_level(
    net: SuperNetwork, cost_of: Any, levels: list[Level], algorithm: Any
) -> None:
    space = net.space
    known = Known(
        ("loss", "cost"),
        costs=lambda config: {"cost": cost_of(config)},
        losses=levels[0].losses,
        deeper=tuple(levels),
    )
    knapsack = Knapsack(space, cost_of)
    evenly = np.linspace(*milp.answers_of(space, [], known).range, milp.EVENLY + 2)[1:-1]
    evenly = evenly[1:]  # the first one is too small: some block must be there
    wanted = []
    for budget in map(float, evenly):
        above = [level for level in levels if level.cost >= budget]
        wanted.append(knapsack.allocate(above[-1].losses, budget))
    assert wanted != [knapsack.allocate(levels[0].losses, float(budget)) for budget in evenly]

    from elastune.search import search

    def objective(config: SubnetConfig) -> dict[str, float]:
        return {"loss": -float(sum(config.values())), "cost": cost_of(config)}

    name = algorithm.__module__.rpartition(".")[2]
    trials = 3 + len(dict.fromkeys(wanted))
    found = search(
        space, objective, values=known.values, algorithm=name, trials=trials, known=known
    )
    tried = {trial.config for trial in found.trials}
    assert set(wanted) <= tried


def test_without_levels_the_losses_are_those_of_the_largest() -> None:
    losses = {"a": {2: 0.0, 1: 0.5}}
    known = Known(("loss", "cost"), losses=losses)
    assert known.losses_for(1.0) is losses
    deeper = ((10.0, {"a": {2: 0.0, 1: 0.4}}), (5.0, {"a": {2: 0.0, 1: 0.9}}))
    known = Known(("loss", "cost"), losses=losses, deeper=deeper)
    assert known.losses_for(11.0) is losses
    assert known.losses_for(10.0) is deeper[0][1]
    assert known.losses_for(5.0) is deeper[1][1]
    assert known.losses_for(1.0) is deeper[1][1]
