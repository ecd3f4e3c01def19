"""Estimated losses of single choices, on the average over sub-networks of all sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_choice_slopes import CAUSAL, changes_of, elastic
from tiny_models import encoded

from elastune import choice_slopes, estimate_losses
from elastune.allocate import Knapsack
from elastune.cost import CostModel
from elastune.errors import BadData
from elastune.estimate_losses import estimate_choice_losses
from elastune.heads import SequenceClassification
from elastune.heads.sequence_classification import EncodedText
from elastune.supernet import SuperNetwork


def cost_of(net: SuperNetwork) -> Any:
    count = CostModel(net, 16)
    return lambda config: float(count(config).block_macs)


def test_without_costs_they_are_of_the_largest_sub_network() -> None:
    net = elastic("llama")
    items = encoded(9, 14, 6, n_prompt=2)
    found = estimate_choice_losses(net, [CAUSAL.collate(items)], CAUSAL)
    expected = changes_of(net, net.space.largest(), items)
    assert set(found) == {dim.name for dim in net.space.dims}
    for dim in net.space.dims:
        assert list(found[dim.name]) == list(dim.choices)
        assert [*found[dim.name].values()] == pytest.approx(expected[dim.name], rel=1e-6)


def test_each_batch_goes_through_the_answer_so_far_to_another_budget() -> None:
    net = elastic("llama")
    knapsack = Knapsack(net.space, cost_of(net))
    rows = [encoded(9, 14), encoded(12), encoded(5, 6, 7), encoded(20), encoded(11)]
    batches = [CAUSAL.collate(items) for items in rows]
    found = estimate_choice_losses(net, batches, CAUSAL, cost_of=cost_of(net))

    largest, smallest = net.space.largest(), net.space.smallest()
    dearest, least = knapsack.base_cost, knapsack.cost_of(smallest)
    seen: dict[str, list[tuple[int, np.ndarray]]] = {dim.name: [] for dim in net.space.dims}
    visited = []
    for part, items in zip((0, 1 / 2, 1 / 4, 3 / 4, 1 / 8), rows, strict=True):
        at = largest
        if part:
            mean = {dim.name: mean_of(seen[dim.name], dim.choices) for dim in net.space.dims}
            at = knapsack.allocate(mean, dearest + part * (least - dearest))
        visited.append(at)
        targets = sum(len(item.input_ids) - item.n_prompt for item in items)
        for name, changes in changes_of(net, at, items).items():
            seen[name].append((targets, np.array(changes) - changes[0]))
    assert len(set(visited)) >= 3
    assert any(len(of_dim) < len(rows) for of_dim in seen.values())  # some block was left out
    for dim in net.space.dims:
        assert found[dim.name] == pytest.approx(mean_of(seen[dim.name], dim.choices), abs=1e-7)
        assert found[dim.name][dim.choices[0]] == 0


def mean_of(seen: list[tuple[int, np.ndarray]], choices: tuple[int, ...]) -> dict[int, float]:
    """Return the mean over targets."""
    targets = sum(n for n, _ in seen)
    sums = sum(n * losses for n, losses in seen)
    return dict(zip(choices, (sums / targets).tolist(), strict=True))


def test_sub_networks_whose_loss_is_not_finite_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = elastic("llama")
    batches = [CAUSAL.collate(encoded(9)), CAUSAL.collate(encoded(14))]
    expected = estimate_choice_losses(net, batches[:1], CAUSAL)
    whole = estimate_losses.choice_changes

    def broken(*args: Any) -> Any:
        changes, n_targets = whole(*args)
        if args[-1] != net.space.largest():
            changes = {name: change * float("nan") for name, change in changes.items()}
        return changes, n_targets

    monkeypatch.setattr(estimate_losses, "choice_changes", broken)
    assert estimate_choice_losses(net, batches, CAUSAL, cost_of=cost_of(net)) == expected


def test_budgets_are_parts_of_what_dims_with_losses_can_save(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = elastic("llama")
    monkeypatch.setattr(choice_slopes, "ESTIMATED_KINDS", ("rank",))  # a small part of the cost
    visited = []
    whole = estimate_losses.choice_changes

    def seen(*args: Any) -> Any:
        visited.append(args[-1])
        return whole(*args)

    monkeypatch.setattr(estimate_losses, "choice_changes", seen)
    batches = [CAUSAL.collate(encoded(n)) for n in (9, 14, 11, 7)]
    found = estimate_choice_losses(net, batches, CAUSAL, cost_of=cost_of(net))
    assert set(found) == {dim.name for dim in net.space.dims if dim.kind == "rank"}
    assert len(set(visited)) >= 3


def test_a_budget_below_what_any_sub_network_costs_is_passed_over() -> None:
    net = elastic("llama")
    count = cost_of(net)
    smallest = net.space.smallest()
    costs = lambda config: count(config) if config != smallest else -1e12  # noqa: E731
    batches = [CAUSAL.collate(encoded(9)), CAUSAL.collate(encoded(14))]
    found = estimate_choice_losses(net, batches, CAUSAL, cost_of=costs)
    at_largest = estimate_choice_losses(net, batches, CAUSAL)
    for name, losses in found.items():
        assert losses == pytest.approx(at_largest[name])


def test_padded_rows_give_what_single_rows_give() -> None:
    net = elastic("bert", "classifier")
    head = SequenceClassification()
    rows = [item.input_ids for item in encoded(5, 9, 12)]
    items = [EncodedText({"input_ids": row}, k % 2, 0) for k, row in enumerate(rows)]
    together = estimate_choice_losses(net, [head.collate(items)], head)
    apart = estimate_choice_losses(net, [head.collate([item]) for item in items], head)
    for name, losses in together.items():
        assert losses == pytest.approx(apart[name], rel=1e-3, abs=1e-6)
        assert losses[max(losses)] == 0
        assert len(set(losses.values())) == len(losses)


def test_nothing_of_the_super_network_changes_and_no_batches_are_an_error() -> None:
    net = elastic("llama")
    before = {name: p.clone() for name, p in net.named_parameters()}
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    smallest = net.space.smallest()
    net.activate(smallest)
    batches = [CAUSAL.collate(encoded(9, 5)), CAUSAL.collate(encoded(7))]
    estimate_choice_losses(net, batches, CAUSAL, cost_of=cost_of(net))
    assert net.config == smallest
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    for name, parameter in net.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    with pytest.raises(BadData, match="no calibration batches"):
        estimate_choice_losses(net, [], CAUSAL)
