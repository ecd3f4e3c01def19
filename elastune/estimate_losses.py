"""What each choice of each dim loses by itself, estimated from slopes of the loss.

A loss at the largest sub-network says what a cut costs while all the rest is there, which is little
of what it costs in small ones. So each batch goes through another sub-network: the knapsack's
answer, by the losses so far, to another budget. Slopes on the way from one sub-network to another
add up to what is lost on it (Aumann and Shapley, 1974; Erion et al., 2021, expected gradients, draw
an example and a place on the way at a time, as here), and the way here is the one along which the
answers to ever smaller budgets lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from elastune.allocate import CostOf, Knapsack, spread_parts
from elastune.choice_slopes import choice_changes
from elastune.errors import InvalidSpace
from elastune.heads import Head
from elastune.importance.passes import Passes, gradients_of
from elastune.space import SearchSpace, SubnetConfig
from elastune.supernet import SuperNetwork


def estimate_choice_losses(
    net: SuperNetwork,
    batches: Iterable[Mapping[str, Any]],
    head: Head,
    *,
    cost_of: CostOf | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[int, float]]:
    """Estimate the loss of every choice, on the average over sub-networks of all costs.

    The super-network is not changed. Activations of a training step are alive, batch by batch; a
    batch costs a forward and a backward pass of the largest sub-network, about three evaluations.

    Args:
        net: with trained or untrained weights.
        batches: as ``head.collate`` makes them of items of validation examples. Small ones tell
            more: each is looked at in one sub-network.
        head: makes their loss.
        cost_of: a configuration's cost, of which budgets are parts; the first batch goes through
            the largest sub-network. Without it all batches do.
        progress: called with the number of batches done.

    Returns:
        Dim -> choice -> estimated increase of the mean loss per target over the largest choice.
        Dims of kinds that are not in `elastune.choice_slopes.ESTIMATED_KINDS` are left out.

    Raises:
        BadData: there are no batches, or the loss does not depend on a dim's modules.
    """
    mean = _Mean(net.space)
    answers = _Answers(net.space, cost_of)
    passes = Passes(net.model, batches, head, 0, progress)
    largest = net.space.largest()
    with net.active(largest), gradients_of(net.model, ()), torch.enable_grad():
        for batch in passes:
            at = answers.next(mean.losses())
            mean.add(*choice_changes(net, passes, batch, at))
    return mean.losses()


class _Mean:
    """The mean change per target, of each dim over the batches in whose sub-network it was."""

    def __init__(self, space: SearchSpace) -> None:
        self._dims = {dim.name: dim for dim in space.dims}
        self._sums: dict[str, Tensor] = {}
        self._targets: dict[str, int] = {}

    def add(self, changes: Mapping[str, Tensor], n_targets: int) -> None:
        for name, change in changes.items():
            if name in self._sums and not change.isfinite().all():
                continue  # a small sub-network that is broken says nothing of the others
            self._sums[name] = self._sums.get(name, 0.0) + change - change[0]
            self._targets[name] = self._targets.get(name, 0) + n_targets

    def losses(self) -> dict[str, dict[int, float]]:
        return {
            name: {
                choice: float(total) / max(self._targets[name], 1)
                for choice, total in zip(self._dims[name].choices, sums, strict=True)
            }
            for name, sums in self._sums.items()
        }


class _Answers:
    """Sub-networks: the largest, then answers to budgets between its cost and the least."""

    def __init__(self, space: SearchSpace, cost_of: CostOf | None) -> None:
        self._space = space
        self._knapsack = None if cost_of is None else Knapsack(space, cost_of)
        self._parts = spread_parts()
        self._at = space.largest()

    def next(self, losses: Mapping[str, Mapping[int, float]]) -> SubnetConfig:
        """Return the answer, by some losses, to the next budget."""
        part = next(self._parts)
        if self._knapsack is None or not losses:
            return self._at
        dearest = self._knapsack.base_cost
        least = self._knapsack.cost_of(self._smallest(losses))
        with suppress(InvalidSpace):  # some block must stay, so that nothing is as cheap
            self._at = self._knapsack.allocate(losses, dearest + part * (least - dearest))
        return self._at

    def _smallest(self, losses: Mapping[str, Mapping[int, float]]) -> SubnetConfig:
        """Return the smallest sub-network in reach: dims without losses stay at their largest."""
        cut = {dim.name: dim.choices[-1] for dim in self._space.dims if dim.name in losses}
        return SubnetConfig({**self._space.largest(), **cut})
