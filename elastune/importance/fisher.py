"""Fisher: the second-order change of the loss when a head or a channel is removed, in rounds.

A gate g = 1 stands on each unit. The loss with g = 0 differs by about half the sum over examples of
(dL/dg)^2, the diagonal of the empirical Fisher information: at a trained model the first-order term
is gone, and squares do not cancel between examples (LeCun et al. 1990, optimal brain damage; Kwon
et al. 2022, for the gates of transformers).

Scores hold for a model from which little is missing. In rounds the least of them go, and what is
left is scored anew without them (Molchanov et al. 2019, section 3.3).

Shapes: `B` rows of a batch, `U` units of a half, `I` in features of the projection that ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.errors import BadData, BadRecipe
from elastune.heads import Head
from elastune.importance.passes import Batches, Passes, gradients_of
from elastune.importance.structure import UnitScores, unit_ends
from elastune.linears import weight_of


def fisher_scores(
    model: PreTrainedModel,
    inputs: Batches,
    *,
    head: Head | None = None,
    kept: Mapping[str, Tensor] | None = None,
    tokens_per_batch: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> UnitScores:
    """Score every head unit and every feed-forward channel by its Fisher information.

    The model is not changed. Activations of a training step with frozen weights are alive. A row of
    a batch counts as one example: of token ids a row, of packed language batches the whole batch.

    Args:
        model: of a known architecture, not yet elastic.
        inputs: as `elastune.importance.structure_scores` takes them, with a loss to follow.
        head: makes the loss of the batches.
        kept: name of a half -> bool ``(U,)``; the others count as removed, and score 0. All are
            kept by default.
        tokens_per_batch: of token ids, in one forward pass.
        progress: called with the number of batches done.

    Returns:
        ``layers.<block>.heads|ffn`` -> float32 ``(U,)`` on the CPU: the mean over targets of the
        squared slopes, in squared nats where the targets can be counted.

    Raises:
        BadData: inputs are missing, empty, or have no loss.
        UnsupportedModel: unknown family.
    """
    found: UnitScores = {}
    n_targets = 0
    gates: dict[str, Tensor] = {}
    passes = Passes(model, inputs, head, tokens_per_batch, progress)
    with gradients_of(model, ()), torch.enable_grad(), ExitStack() as stack:
        for name, module, table in unit_ends(model):
            mask = torch.ones(len(table)) if kept is None else kept[name].float()
            hook = row_gated(name, table, mask.to(weight_of(module).device), gates)
            stack.callback(module.register_forward_pre_hook(hook).remove)
            found[name] = torch.zeros(len(table))
        for batch in passes:
            gates.clear()
            loss, targets = passes.loss(batch)
            loss.backward()
            n_targets += targets
            for name, gate in gates.items():
                if gate.grad is None:
                    raise BadData(
                        f"the loss does not depend on {name}",
                        try_="a head whose loss uses it, or leave it out of the space",
                    )
                found[name] += gate.grad.square().sum(dim=0).cpu()
    return {name: score / max(n_targets, 1) for name, score in found.items()}


def row_gated(
    name: str, table: Tensor, mask: Tensor, gates: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    """Return a hook that puts a gate of each row on each unit of an input ``(B, ..., I)``.

    At each call it notes the new gate under its name in ``gates``.
    """
    unit_of = torch.empty(table.numel(), dtype=torch.long)
    unit_of[table.flatten()] = torch.arange(len(table)).repeat_interleave(table.shape[1])
    unit_of = unit_of.to(mask.device)

    def multiply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        gate = torch.ones(len(x), len(mask), device=x.device, requires_grad=True)
        gates[name] = gate
        wide = (gate * mask)[:, unit_of].to(x.dtype)
        return (x * wide.view(len(x), *[1] * (x.dim() - 2), -1), *args[1:])

    return multiply


def scores_in_rounds(
    score: Callable[[Mapping[str, Tensor]], UnitScores],
    unit_costs: Mapping[str, float],
    n_units: Mapping[str, int],
    *,
    low: float,
    rounds: int,
    progress: Callable[[int, int], None] | None = None,
) -> UnitScores:
    """Remove units in rounds, those of least score per cost first, and rank them by when they go.

    A threshold on the result gives nested sub-networks: those of the rounds, and between them.

    Args:
        score: units that are kept, name of a half -> bool ``(U,)`` -> scores of all units.
        unit_costs: name of a half -> cost of one of its units, in any unit.
        n_units: name of a half -> `U`.
        low: what remains after the last round, as a part of the cost of all units.
        rounds: how many times units are scored; the remaining cost falls by equal factors.
        progress: called with (rounds done, rounds).

    Returns:
        Name of a half -> float32 ``(U,)``: the rank of each unit from 0 to 1 by cost; units of
        equal rank do not exist.

    Raises:
        BadRecipe: fewer than one round, or ``low`` not between 0 and 1.
    """
    if rounds < 1 or not 0 < low < 1:
        raise BadRecipe(f"rounds must be at least 1 and 0 < low < 1, got {rounds} and {low}")
    kept = {name: torch.ones(n, dtype=torch.bool) for name, n in n_units.items()}
    costs = torch.cat([torch.full((n,), unit_costs[name]) for name, n in n_units.items()]).double()
    total = float(costs.sum())
    gone: list[Tensor] = []
    for number in range(1, rounds + 1):
        found = score(kept)
        values = torch.cat([found[name].double() for name in n_units]) / costs
        alive = torch.cat(list(kept.values()))
        order = values.masked_fill(~alive, torch.inf).argsort(stable=True)[: int(alive.sum())]
        if number == rounds:  # those that remain are ranked, too
            gone.append(order)
            break
        excess = float(costs[alive].sum()) - total * low ** (number / rounds)
        leaving = order[costs[order].cumsum(0) <= excess]
        gone.append(leaving)
        alive[leaving] = False
        kept = dict(zip(n_units, alive.split(list(n_units.values())), strict=True))
        if progress is not None:
            progress(number, rounds)
    if progress is not None:
        progress(rounds, rounds)
    ranks = torch.empty(len(costs))
    leaving_order = torch.cat(gone)
    ranks[leaving_order] = (costs[leaving_order].cumsum(0) / total).float()
    return dict(zip(n_units, ranks.split(list(n_units.values())), strict=True))
