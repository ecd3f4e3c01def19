"""Single-choice losses for small budgets: estimated at sub-networks on the way down.

A loss that is estimated at the largest sub-network says what a cut costs while all the rest is
there. Here the knapsack's answer to a budget is activated, and what further cuts cost is estimated
there, for the next smaller budget; and so on, as sequential linear programming goes on from each
solution. A level costs a forward and a backward pass of its sub-network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from elastune.allocate import CostOf, Knapsack, Losses
from elastune.errors import InvalidSpace
from elastune.estimate_losses import estimate_choice_losses
from elastune.heads import Head
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork


class Level(NamedTuple):
    """Losses for budgets below that of the sub-network at which they were estimated."""

    cost: float
    """Of that sub-network, in the unit of the budgets."""
    losses: dict[str, dict[int, float]]
    """Dim -> choice -> loss; of choices above that sub-network's as on the level before."""


def descend(
    net: SuperNetwork,
    batches: Sequence[Mapping[str, Any]],
    head: Head,
    cost_of: CostOf,
    *,
    n_levels: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Level]:
    """Estimate single-choice losses at the largest sub-network, and at the answers to budgets.

    Args:
        net: not changed.
        batches: as for `elastune.estimate_losses.estimate_choice_losses`.
        head: makes their loss.
        cost_of: of a configuration.
        n_levels: at most so many; budgets are spaced evenly between the largest sub-network's cost
            and the smallest's.
        progress: called with (levels done, levels in all).

    Returns:
        A level for the largest sub-network, then one for each budget whose answer is cheaper than
        that of the level before.
    """
    knapsack = Knapsack(net.space, cost_of)
    dearest, cheapest = knapsack.base_cost, float(cost_of(net.space.smallest()))
    levels = [Level(dearest, estimate_choice_losses(net, batches, head))]
    tell = progress or (lambda done, total: None)
    for done, budget in enumerate(np.linspace(dearest, cheapest, n_levels + 2)[1:-2], start=1):
        tell(done, n_levels)
        if budget >= levels[-1].cost:  # what left out a block went further than it was asked to
            continue
        try:
            at = knapsack.allocate(levels[-1].losses, float(budget))
        except InvalidSpace:
            break
        cost = float(cost_of(at))
        if cost < levels[-1].cost:
            further = estimate_choice_losses(net, batches, head, at=at)
            levels.append(Level(cost, _joined(levels[-1].losses, further, at)))
    tell(n_levels, n_levels)
    return levels


def _joined(
    losses: Mapping[str, Mapping[int, float]], further: Losses, at: SubnetConfig
) -> dict[str, dict[int, float]]:
    """Return the losses down to ``at``, and from there on its own with what it further loses."""
    found = {}
    for name, of_dim in losses.items():
        from_here = further.get(name, {})
        found[name] = {
            choice: of_dim[at[name]] + from_here[choice] if choice in from_here else loss
            for choice, loss in of_dim.items()
        }
    return found
