"""Search spaces made by importance or by measured losses (EFTNAS, Munoz et al. 2024, section 3.2).

For each of a few budgets one sub-network is found; the space is the union of these. One generator
cuts all halves of all blocks at one threshold of unit scores, the other solves a knapsack over the
losses that single choices cost. docs/search-spaces.md tells how.

Shapes: `U` units of a half of a block.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal, get_args

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from elastune.allocate import CostOf, Losses, allocate
from elastune.block_costs import (
    BlockCosts,
    block_dims,
    counted_costs,
    measured_costs,
    table_costs,
)
from elastune.build_structure import structure_space
from elastune.errors import BadData, BadRecipe, InvalidSpace, nearest
from elastune.generated import Candidate, GeneratedSpace, generated, spaced_targets, within
from elastune.latency_table import LatencyTable
from elastune.models.blocks import Block, blocks
from elastune.reorder import halves_of, scored_half
from elastune.space import SearchSpace, SubnetConfig
from elastune.structure import full_size
from elastune.threshold import CutRules, ThresholdCuts

CostName = Literal["macs", "params", "latency"]
CostBy = CostName | LatencyTable | CostOf
"""MACs or parameters of the blocks, or latency of one forward pass of the whole model (measured, or
read off a table); or a function of a configuration with ``layers.<i>.heads``, ``layers.<i>.ffn``
and ``layers.<i>.block`` (1, or 0 where it is left out) of all blocks, at any sizes."""


def space_from_importance(
    model: PreTrainedModel,
    scores: Mapping[str, Tensor],
    *,
    cost: CostBy = "macs",
    low: float | None = None,
    high: float | None = None,
    points: int | Sequence[float] = 5,
    tolerance: float = 0.02,
    tokens: int = 128,
    round_to: int = 1,
    discard: float = 0.02,
    per_cost: bool = False,
    keep_head: bool = False,
) -> GeneratedSpace:
    """Make a search space of the sub-networks that one threshold for all scores leaves.

    For each target the threshold is found among the scores themselves, so that the cost is the
    nearest there is. Afterwards, in this order: `reorder_` the model by the same scores (or by the
    order that goes with them, `elastune.importance.ranking`), `drop_blocks_` the
    ``removed_blocks``, and make the super-network of ``space``.

    Deviations from the paper's code: no bounds on the scores are assumed, there are as many points
    as asked for, a target that cannot be met is an error, and blocks that no point keeps leave the
    model.

    Args:
        model: of a known architecture, plain; it ends as it was.
        scores: ``layers.<i>.heads`` and ``layers.<i>.ffn`` -> ``(U,)``, large = keep, such as of
            `structure_scores`. Halves without scores stay whole and are not elastic. Heads of
            families that cannot lose single ones (ALiBi) are kept by their sum, all or none.
        cost: see `CostBy`; a function must not grow as sizes fall.
        low: smallest target, a part of the full model's cost.
        high: largest target, likewise.
        points: how many targets, equally spaced, both ends included; or the targets themselves, in
            the place of ``low`` and ``high``.
        tolerance: how far, in parts of the full cost, a point may be from its target.
        tokens: length that MACs and a measured latency are for.
        round_to: widths are multiples of this, the nearest.
        discard: a half of a block that keeps less than this part of its units is absent; a block
            both of whose halves are is left out. Where a block cannot be, each half keeps one unit.
        per_cost: divide scores by the cost of their unit first: for scores that grow with the
            weights they are summed over, of which a head has many more than a channel.
        keep_head: no attention is absent in a block that stays.

    Raises:
        InvalidSpace: bounds or options that cannot be, or no threshold meets a target.
        BadData: scores that do not fit the model, are not finite, or are none.
        BadRecipe: unknown cost, or a latency table that does not fit.
        UnsupportedModel: unknown family.
    """
    started = time.perf_counter()
    targets = spaced_targets(low, high, points)
    _check_options(tolerance, tokens, round_to, discard)
    found = blocks(model)
    units = {name: _unit_scores(name, s, found) for name, s in scores.items()}
    units = {name: values for name, values in units.items() if len(values)}
    if not units:
        raise BadData("there are no scores", try_="structure_scores measures them")
    costs = _costs(model, cost, tokens)
    if per_cost:
        saved = _unit_savings(units, costs, found)
        units = {name: values / saved[name] for name, values in units.items()}
    cuts = ThresholdCuts(found, units, CutRules(round_to, discard, keep_head))
    curve = _Curve(cuts, costs)
    candidates = [curve.candidate(target, tolerance) for target in targets]
    sizes = dict(cuts.config(0))
    made_from = {
        "generator": "importance",
        "cost": curve.unit,
        "full_cost": curve.full,
        "low": min(targets),
        "high": max(targets),
        "tolerance": tolerance,
        "tokens": tokens,
        "round_to": round_to,
        "discard": discard,
        "per_cost": per_cost,
        "keep_head": keep_head,
        "full_sizes": sizes,
        "seconds": round(time.perf_counter() - started, 3),
    }
    dims = block_dims(model, lambda block, part: (full_size(block, part),), depth=True)
    return generated(dims, candidates, made_from, sizes)


def candidate_space(model: PreTrainedModel, steps: int = 8, *, round_to: int = 64) -> SearchSpace:
    """Return evenly spaced sizes of every half of every block, 0 among them; no depth.

    What `single_choice_losses` are measured in, for `space_from_losses`.

    Args:
        model: of a known architecture; not changed.
        steps: sizes beside 0, fewer where a half has fewer units.
        round_to: widths are multiples of this.

    Raises:
        InvalidSpace: fewer than one step.
        UnsupportedModel: unknown family.
    """
    if steps < 1:
        raise InvalidSpace(f"there must be at least one step, got {steps}")
    parts = [step / steps for step in range(steps + 1)]
    found = blocks(model)
    heads = {f"layers.{b.index}.heads": [0, 1.0] if b.fixed_heads else parts for b in found}
    return structure_space(model, heads=heads, ffn=parts, round_to=round_to)


def space_from_losses(
    space: SearchSpace,
    losses: Losses,
    costs: CostOf,
    *,
    low: float | None = None,
    high: float | None = None,
    points: int | Sequence[float] = 5,
    tolerance: float = 0.02,
    unit: str = "own",
) -> GeneratedSpace:
    """Make a search space of the sub-networks whose single-choice losses add up to least.

    Every point costs at most its target. A block of which nothing is kept stays as an empty block,
    with its norms, unless the space has a dim of depth for it.

    Args:
        space: that the losses were measured in, such as `candidate_space`.
        losses: as `single_choice_losses` returns.
        costs: configuration of ``space`` -> cost. Targets are parts of the largest one's.
        low: see `space_from_importance`, as ``high`` and ``points``.
        tolerance: how far below its target a point may be, in parts of the largest cost.
        unit: what the cost is called.

    Raises:
        InvalidSpace: bounds that cannot be, or a target that no sub-network meets.
        BadData: losses that do not fit the space.
    """
    started = time.perf_counter()
    targets = spaced_targets(low, high, points)
    full = float(costs(space.largest()))
    candidates = []
    for target in targets:
        try:
            floor = (target - tolerance) * full
            config = allocate(space, losses, costs, target * full, at_least=floor)
        except InvalidSpace as error:
            raise InvalidSpace(
                f"target {target:.4g} of the largest cost: {error.message}", try_=error.try_
            ) from None
        reached = float(costs(config)) / full
        if not within(target, reached, tolerance):
            raise InvalidSpace(
                f"the best sub-network for {target:.4g} of the largest cost has {reached:.4g}, "
                f"which is more than {tolerance} below",
                try_="a larger tolerance, or candidates with more sizes",
            )
        candidates.append(Candidate(target, reached, config))
    made_from = {
        "generator": "losses",
        "cost": unit,
        "full_cost": full,
        "low": min(targets),
        "high": max(targets),
        "tolerance": tolerance,
        "full_sizes": dict(space.largest()),
        "seconds": round(time.perf_counter() - started, 3),
    }
    # Only depth: whether the largest candidate is the full size is not known here.
    omitted = {dim.name: 1 for dim in space.dims if dim.kind == "depth"}
    return generated(space.dims, candidates, made_from, omitted)


def _check_options(tolerance: float, tokens: int, round_to: int, discard: float) -> None:
    if not 0 <= tolerance < 1:
        raise InvalidSpace(f"tolerance is a part of the full cost, 0 to 1, got {tolerance}")
    if not 0 <= discard < 1:
        raise InvalidSpace(f"discard is a part of the units, 0 to 1, got {discard}")
    for name, value in (("tokens", tokens), ("round_to", round_to)):
        if value < 1:
            raise InvalidSpace(f"{name} must be at least 1, got {value}")


def _unit_scores(name: str, score: Tensor, found: Sequence[Block]) -> np.ndarray:
    """Return the checked scores of what is cut alone, float64; none where a half is absent."""
    block, part = scored_half(name, score, halves_of(found))
    n = block.n_units(part)
    values: np.ndarray = score.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise BadData(
            f"{name}: {bad} of {n} scores are not a finite number",
            try_="more calibration batches, or a smaller learning rate where scores are learnt",
        )
    is_whole = part == "heads" and block.fixed_heads is not None
    return values.sum(keepdims=True) if is_whole and n else values


def _costs(model: PreTrainedModel, cost: CostBy, tokens: int) -> BlockCosts | CostOf:
    """Return costs that add up, or the caller's own function."""
    if isinstance(cost, LatencyTable):
        return table_costs(model, cost)
    if not isinstance(cost, str):
        return cost
    if cost not in get_args(CostName):
        known = ", ".join(get_args(CostName))
        raise BadRecipe(
            f"unknown cost {cost!r}{nearest(cost, get_args(CostName))}; known are {known}"
        )
    return (
        measured_costs(model, tokens) if cost == "latency" else counted_costs(model, cost, tokens)
    )


def _unit_savings(
    units: Mapping[str, np.ndarray], costs: BlockCosts | CostOf, found: Sequence[Block]
) -> dict[str, float]:
    """Return what one unit of each half costs, the mean over the half."""
    saved = {}
    if isinstance(costs, BlockCosts):
        for name, values in units.items():
            saved[name] = float(costs.saved(name, np.array(0))) / len(values)
    else:
        full = ThresholdCuts(found, units, CutRules()).config(0)
        for name, values in units.items():
            less = costs(SubnetConfig({**full, name: 0}))
            saved[name] = float(costs(full) - less) / len(values)
    useless = [name for name, value in saved.items() if value <= 0]
    if useless:
        raise InvalidSpace(
            f"leaving out {useless[0]} saves nothing of this cost, so that no score can be divided "
            "by it",
            try_="per_cost=False, or another cost",
        )
    return saved


class _Curve:
    """The cost of every step of the threshold, in parts of the full model's.

    Costs that add up are known at once for all steps; a caller's own function is asked where a
    bisection leads.
    """

    def __init__(self, cuts: ThresholdCuts, costs: BlockCosts | CostOf) -> None:
        self._cuts = cuts
        if isinstance(costs, BlockCosts):
            self.unit, self.full = costs.unit, costs.full
            self._all: np.ndarray | None = cuts.costs(costs)
        else:
            self.unit, self.full = "own", float(costs(cuts.config(0)))
            self._all = None
        if not self.full > 0:
            raise InvalidSpace(f"the full model's cost must be above 0, got {self.full}")
        self._own = cache(lambda step: float(costs(cuts.config(step))) / self.full)  # type: ignore[operator]

    def at(self, step: int) -> float:
        """Return the cost of a step."""
        return float(self._own(step) if self._all is None else self._all[step])

    def candidate(self, target: float, tolerance: float) -> Candidate:
        """Return the sub-network whose cost is nearest to a target.

        Raises:
            InvalidSpace: it is further away than the tolerance.
        """
        around = self._around(target)
        best = min(around, key=lambda step: abs(self.at(step) - target))
        if within(target, self.at(best), tolerance):
            threshold = self._cuts.threshold(best)
            return Candidate(target, self.at(best), self._cuts.config(best), threshold)
        last = len(self._cuts.thresholds) - 1
        tied = max(self._cuts.n_tied(step) for step in around)
        equal = f"; {tied} units there have the same score" if tied > 1 else ""
        costs = sorted(self.at(step) for step in around)
        raise InvalidSpace(
            f"no threshold gives {target:.4g} of the full {self.unit} within {tolerance}: nearest "
            f"are {' and '.join(f'{cost:.4g}' for cost in costs)}, from {self.at(last):.4g} to 1 "
            f"is possible{equal}",
            try_="a larger tolerance or another target, a smaller round_to, scores with fewer ties",
        )

    def _around(self, target: float) -> list[int]:
        """Return the steps of the costs next to a target, above and below."""
        if self._all is not None:
            above = np.where(self._all >= target, self._all, np.inf)
            below = np.where(self._all <= target, self._all, -np.inf)
            found = [int(above.argmin()), int(below.argmax())]
            return sorted(
                {
                    step
                    for step, c in zip(found, (above, below), strict=True)
                    if np.isfinite(c[step])
                }
            )
        low, high = 0, len(self._cuts.thresholds) - 1  # costs fall as steps go up
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.at(middle) <= target else (middle + 1, high)
        return sorted({max(low - 1, 0), low})
