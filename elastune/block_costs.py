"""What each size of each half of a block saves, for costs that add up over halves and blocks.

MACs and parameters are counted at one unit and at the full size; in between they grow evenly. A
latency is read off a table of a few sizes, with straight lines between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from elastune.cost import CostModel
from elastune.errors import BadRecipe
from elastune.latency import Conditions
from elastune.latency_table import LatencyTable
from elastune.models.blocks import PARTS, Block, Part, blocks
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.structure import full_size
from elastune.supernet import SuperNetwork

GRID = 8
"""Sizes of a half, beside 0, at which latency is measured."""


@dataclass(frozen=True)
class BlockCosts:
    """Costs of any sub-network, as what it saves of the full model's cost.

    Attributes:
        unit: of the costs.
        full: cost of the full model.
        halves: dim name -> sizes ascending from 0, and what each saves; straight lines between.
        whole: number of a block -> what leaving it out saves.
    """

    unit: str
    full: float
    halves: Mapping[str, tuple[np.ndarray, np.ndarray]]
    whole: Mapping[int, float]

    def saved(self, dim: str, sizes: np.ndarray) -> np.ndarray:
        """Return what sizes of a half save, float64, shaped like ``sizes``."""
        return np.interp(sizes, *self.halves[dim])


def unit_size(block: Block, part: Part) -> int:
    """Return how many heads or channels can only be cut together."""
    if part == "ffn":
        return 1
    return block.shape.heads if block.fixed_heads else block.heads_per_unit


def block_dims(
    model: PreTrainedModel, sizes: Callable[[Block, Part], Sequence[int]], *, depth: bool
) -> list[ElasticDim]:
    """Return the dims of every half and block, named as `structure_space` names them.

    Args:
        model: of a known architecture.
        sizes: choices of a half, any order.
        depth: whether there are dims for the blocks that may be left out.
    """
    dims = []
    for block in blocks(model):
        for part in PARTS:
            if full_size(block, part):
                choices = tuple(sorted(set(sizes(block, part)), reverse=True))
                name = f"layers.{block.index}.{part}"
                roles = [block.record.roles[role] for role in block.roles_of(part)]
                modules = tuple(f"{block.name}.{path}" for path in roles)
                dims.append(ElasticDim(name, part, choices, modules))
        if depth and not block.fixed_depth:
            dims.append(ElasticDim(f"layers.{block.index}.block", "depth", (1, 0), (block.name,)))
    return dims


def counted_costs(model: PreTrainedModel, unit: str, tokens: int) -> BlockCosts:
    """Count the MACs (of ``tokens`` tokens) or parameters of every half, of blocks alone."""
    dims = block_dims(model, lambda b, p: (full_size(b, p), unit_size(b, p), 0), depth=True)
    with _elastic(model, dims) as net:
        count = CostModel(net, tokens)
        full = net.space.largest()

        def cost(config: SubnetConfig) -> int:
            found = count(config)
            return found.block_macs if unit == "macs" else found.params

        def saved(name: str, choice: int) -> float:
            return float(cost(full) - cost(SubnetConfig({**full, name: choice})))

        halves, whole = {}, {}
        for dim in dims:
            if dim.kind == "depth":
                whole[int(dim.name.split(".")[1])] = saved(dim.name, 0)
            else:
                sizes = dim.choices[::-1]
                halves[dim.name] = (np.array(sizes), np.array([saved(dim.name, s) for s in sizes]))
        total = cost(full)
        if unit == "params":
            total = sum(p.numel() for b in net.blocks for p in b.module.parameters())
    return BlockCosts(unit, float(total), halves, whole)


def measured_costs(model: PreTrainedModel, tokens: int) -> BlockCosts:
    """Measure the latency of one forward pass, batch 1, at a few sizes of every half."""
    dims = block_dims(model, _grid, depth=True)
    with _elastic(model, dims) as net:
        table = LatencyTable.measure(net, Conditions(prompt_tokens=tokens, new_tokens=0))
    return table_costs(model, table)


def table_costs(model: PreTrainedModel, table: LatencyTable) -> BlockCosts:
    """Read costs off a latency table: milliseconds of prefill of the whole model.

    Raises:
        BadRecipe: the table lacks a half or one of its ends.
    """
    halves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    whole = {}
    for block in blocks(model):
        for part in PARTS:
            name, full = f"layers.{block.index}.{part}", full_size(block, part)
            sizes = sorted(table.dims.get(name, {}))
            if full and (not sizes or sizes[0] != 0 or sizes[-1] != full):
                raise BadRecipe(
                    f"the latency table has sizes {sizes} of {name}, not from 0 to {full}",
                    try_="a table of candidate_space(model), or cost='latency'",
                )
            if full:
                # Noise must not make a smaller size look slower than a larger one.
                savings = [-table.dims[name][size][0] for size in sizes]
                halves[name] = (np.array(sizes), np.maximum.accumulate(savings[::-1])[::-1])
        left_out = table.dims.get(f"layers.{block.index}.block", {}).get(0)
        mine = [f"layers.{block.index}.{part}" for part in PARTS]
        both = sum(float(halves[name][1][0]) for name in mine if name in halves)
        whole[block.index] = both if left_out is None else -left_out[0]
    return BlockCosts("latency", table.largest[0], halves, whole)


def _grid(block: Block, part: Part) -> list[int]:
    """Return at most `GRID` evenly spaced sizes of a half, and 0."""
    full, unit = full_size(block, part), unit_size(block, part)
    parts = min(GRID, full // unit)
    return [round(full * k / parts / unit) * unit for k in range(parts + 1)]


@contextmanager
def _elastic(model: PreTrainedModel, dims: Sequence[ElasticDim]) -> Iterator[SuperNetwork]:
    """Make a model elastic for a while; it ends as it was."""
    trained = [parameter.requires_grad for parameter in model.parameters()]
    net = SuperNetwork(model, SearchSpace(dims))
    try:
        yield net
    finally:
        net.unwrap()
        for parameter, flag in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(flag)
