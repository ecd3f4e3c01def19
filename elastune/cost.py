"""What a sub-network costs by counting: parameters, non-zeros and MACs, from its sizes alone.

What counts as a MAC is in `elastune.macs`. What is measured is in `elastune.latency` and
`elastune.memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from elastune.linears import in_features
from elastune.macs import Row, Work, counted, total
from elastune.models.architecture import Architecture
from elastune.models.blocks import PARTS, Block, Part, Weights
from elastune.slice_counts import Cut, Slice
from elastune.space import DimKind, ElasticDim, SearchSpace, SubnetConfig
from elastune.structure import STRUCTURE_KINDS, full_size
from elastune.supernet import SuperNetwork


@dataclass(frozen=True)
class Cost:
    """What a network of one size costs.

    Attributes:
        params: parameters, tied ones once.
        nonzero: parameters that are not zero.
        macs: MACs of one forward pass over ``T`` tokens, batch 1, logits of all of them included.
        decode_macs: MACs of one more token with ``T`` tokens in the cache; 0 for encoders.
        block_macs: the part of ``macs`` that is spent inside the blocks: no head, no embedding, so
            that an elastic embedding does not change it.
    """

    params: int
    nonzero: int
    macs: int
    decode_macs: int = 0
    block_macs: int = 0


def model_cost(model: PreTrainedModel, tokens: int) -> Cost:
    """Count a plain model, one extracted from a super-network too.

    Args:
        model: without adapters.
        tokens: length ``T`` of the forward pass that MACs are for.

    Raises:
        UnsupportedModel: unknown family.
    """
    whole = counted(model.parameters())
    work = Work(model, tokens)
    outside = total([work.linear(name, m) for name, m in work.linears() if not work.in_block(name)])
    inside = [work.linear(name, m) for name, m in work.linears() if work.in_block(name)]
    inside += [work.attention(i, _attention_width(b, work.record)) for i, b in work.blocks()]
    within = total(inside)
    return Cost(
        whole.params,
        whole.nonzero,
        outside.macs + within.macs,
        outside.decode_macs + within.decode_macs,
        within.macs,
    )


def _attention_width(block: nn.Module, record: Architecture) -> int:
    """Return query heads times head size; 0 where the attention is absent."""
    modules = dict(block.named_modules())
    output = modules.get(record.roles["o"])
    return 0 if output is None else in_features(output)


class CostModel:
    """The cost of any configuration of a super-network, from the configuration alone.

    The model is counted once, each block at each of its sizes; a configuration then costs one
    look-up a block, whichever configuration is active.

    Args:
        net: with any mix of dims.
        tokens: length ``T`` of the forward pass that MACs are for.
        merged: count sub-networks whose adapter is added to the weights. It costs nothing then, but
            leaves no zeros in the weights it is added to. Otherwise all its weights count, as
            non-zero.
    """

    def __init__(self, net: SuperNetwork, tokens: int, *, merged: bool = False) -> None:
        self._space = net.space
        self._merged = merged
        adapters = {id(p) for a in net.adapters.values() for p in (a.lora_A, a.lora_B)}
        work = Work(net.model, tokens)
        found = net.blocks
        tables = [_BlockTable(block, net, work, adapters) for block in found]
        inside = {id(p) for block in found for p in block.module.parameters()}
        table = net.embedding
        own = set() if table is None else {id(p) for p in table.parameters()}
        rest = [p for p in net.model.parameters() if id(p) not in inside | adapters | own]
        rows = [counted(rest)]
        rows += [work.linear(name, m) for name, m in work.linears() if not work.in_block(name)]
        self._outside = total(rows)
        self._tables = [
            (dim.name, {rank: work.embedding(table, rank) for rank in dim.choices})
            for dim in net.space.dims
            if dim.kind == "embedding" and table is not None
        ]
        self._outside_ranks = [
            (dim, _adapter_sizes(name, work, Cut(net.adapters[name]).at(None)))
            for name, dim in _rank_dims(net).items()
            if not work.in_block(name)
        ]
        # A search meets the same few choices of a block again and again.
        self._blocks: list[tuple[tuple[str, ...], Callable[..., Row]]] = [
            (table.dims, lru_cache(maxsize=4096)(partial(table.row, merged))) for table in tables
        ]

    def __call__(self, config: SubnetConfig) -> Cost:
        """Return the cost of a sub-network.

        Raises:
            InvalidSubnet: not in the space.
        """
        params = nonzero = macs = decode = 0
        try:
            for dims, row_at in self._blocks:
                row = row_at(*[config[name] for name in dims])
                params += row[0]
                nonzero += row[1]
                macs += row[2]
                decode += row[3]
            rest = [self._outside, *(rows[config[dim]] for dim, rows in self._tables)]
            rest += [
                _adapter_row(sizes, config[dim], self._merged) for dim, sizes in self._outside_ranks
            ]
        except KeyError:
            self._space.check(config)
            raise
        outside = total(rest)
        return Cost(
            params + outside.params,
            nonzero + outside.nonzero,
            macs + outside.macs,
            decode + outside.decode_macs,
            macs,
        )


def _rank_dims(net: SuperNetwork) -> dict[str, str]:
    """Return module name -> its rank dim."""
    return {name: dim.name for name, dim in _dims_of(net.space, "rank").items()}


def _dims_of(space: SearchSpace, kind: DimKind) -> dict[str, ElasticDim]:
    """Return module name -> the dim of a kind that it follows."""
    return {name: dim for dim in space.dims if dim.kind == kind for name in dim.modules}


class _AdapterSizes(NamedTuple):
    """What an adapter of rank 1 costs at some size of the layer it is added to."""

    features: int
    """In and out features together."""
    macs: int
    decode_macs: int
    zeros: int
    """In the layer's active weight."""


def _adapter_sizes(name: str, work: Work, active: Slice) -> _AdapterSizes:
    prefill, decode = work.positions(name)
    features = active.features
    return _AdapterSizes(features, features * prefill, features * decode, active.zeros)


def _adapter_row(sizes: _AdapterSizes, rank: int, merged: bool) -> Row:
    """Return what an adapter of some rank costs."""
    if rank == 0:
        return Row()
    if merged:
        return Row(nonzero=sizes.zeros)
    params = rank * sizes.features
    return Row(params, params, rank * sizes.macs, rank * sizes.decode_macs)


_Adapters = list[tuple[str, _AdapterSizes]]
"""Rank dim and sizes of adapters."""


class _Masked(NamedTuple):
    """What a dim of density takes from one weight."""

    dim: str
    rank_dim: str | None
    left_out: dict[int, int]
    """Density -> non-zeros that it turns to zero."""

    def row(self, chosen: Mapping[str, int], merged: bool) -> Row:
        """Return what there is less; a merged adapter leaves no zeros."""
        if merged and self.rank_dim is not None and chosen[self.rank_dim]:
            return Row()
        return Row(nonzero=-self.left_out[chosen[self.dim]])


class _Half(NamedTuple):
    """One half of a block at each of its sizes."""

    dim: str | None
    full: int
    rows: dict[int, Row]
    adapters: dict[int, _Adapters]
    masked: dict[int, list[_Masked]]


class _BlockTable:
    """What one block costs at each of its sizes.

    Args:
        block: of the super-network.
        net: all of it.
        work: of its model.
        adapters: ids of all adapters' parameters.
    """

    def __init__(self, block: Block, net: SuperNetwork, work: Work, adapters: set[int]) -> None:
        self._block, self._work = block, work
        self._cuts = cuts_of(block, net.space)
        ranks = _rank_dims(net)
        prefix = f"{block.name}."
        self._ranks = {n.removeprefix(prefix): d for n, d in ranks.items() if n.startswith(prefix)}
        self._densities = {
            name.removeprefix(prefix): dim
            for name, dim in _dims_of(net.space, "density").items()
            if name.startswith(prefix)
        }
        self._adapters = adapters
        self._halves = [self._half(part) for part in PARTS]
        sliced = [f"{prefix}{w.path}" for part in PARTS for w in self._weights(part, None)]
        self._fixed = self._unsliced(sliced)
        names = [dim.name for dim in (*self._cuts.values(), *self._densities.values())]
        self.dims = tuple(dict.fromkeys([*names, *self._ranks.values()]))

    def row(self, merged: bool, *choices: int) -> Row:
        """Return the cost at ``choices``, in the order of ``dims``."""
        chosen = dict(zip(self.dims, choices, strict=True))
        if "depth" in self._cuts and chosen[self._cuts["depth"].name] == 0:
            return Row()
        rows = [self._fixed[0]]
        present = list(self._fixed[1])
        for half in self._halves:
            size = half.full if half.dim is None else chosen[half.dim]
            rows.append(half.rows[size])
            present += half.adapters[size]
            rows += [masked.row(chosen, merged) for masked in half.masked[size]]
        rows += [_adapter_row(sizes, chosen[dim], merged) for dim, sizes in present]
        return total(rows)

    def _weights(self, part: Part, size: int | None) -> list[Weights]:
        """Return the weights of a half that are active at a size; None for all."""
        per_unit = self._block.heads_per_unit if part == "heads" else 1
        size = full_size(self._block, part) if size is None else size
        return list(self._block.weights_of(part, torch.arange(size // per_unit)))

    def _half(self, part: Part) -> _Half:
        """Count one half at each of its sizes."""
        block, work = self._block, self._work
        full = full_size(block, part)
        dim = self._cuts.get(part)
        cuts = {
            w.path: Cut(block.module.get_submodule(w.path), w.dim)
            for w in self._weights(part, full)
        }
        rest = counted(self._rest_of(part, list(cuts)))
        half = _Half(dim.name if dim else None, full, {0: Row()}, {0: _Adapters()}, {0: []})
        for size in {full, *(dim.choices if dim else ())} - {0}:
            found, masked, rows_here = _Adapters(), list[_Masked](), [rest]
            for weights in self._weights(part, size):
                name = f"{block.name}.{weights.path}"
                index = None if size == full else weights.index
                cut = cuts[weights.path]
                active = cut.at(index)
                prefill, decode = work.positions(name)
                macs = (active.weights * prefill, active.weights * decode)
                rows_here.append(Row(active.params, active.nonzero, *macs))
                if weights.path in self._ranks:
                    sizes = _adapter_sizes(name, work, active)
                    found.append((self._ranks[weights.path], sizes))
                density = self._densities.get(weights.path)
                if density is not None:
                    left_out = {choice: cut.left_out(index, choice) for choice in density.choices}
                    masked.append(_Masked(density.name, self._ranks.get(weights.path), left_out))
            if part == "heads":
                rows_here.append(work.attention(block.index, size * block.head_dim))
            half.rows[size], half.adapters[size] = total(rows_here), found
            half.masked[size] = masked
        return half

    def _part_ids(self, part: Part) -> set[int]:
        """Return the ids of the parameters that are gone when a half is."""
        paths = [self._block.record.roles[role] for role in self._block.roles_of(part)]
        if part == "heads":
            paths.append(self._block.record.attention.path)
        modules = [self._block.module.get_submodule(path) for path in paths]
        return {id(p) for module in modules for p in module.parameters()} - self._adapters

    def _rest_of(self, part: Part, sliced: Sequence[str]) -> list[nn.Parameter]:
        """Return the parameters of a half that do not follow its size, such as norms of a head."""
        modules = [self._block.module.get_submodule(path) for path in sliced]
        seen = {id(p) for module in modules for p in module.parameters()}
        ids = self._part_ids(part) - seen
        return [p for p in self._block.module.parameters() if id(p) in ids]

    def _unsliced(self, sliced: Sequence[str]) -> tuple[Row, _Adapters]:
        """Count what belongs to no half: norms over the hidden size, further linear layers."""
        block, work = self._block, self._work
        halves = {i for part in PARTS for i in self._part_ids(part)} | self._adapters
        rows = [counted([p for p in block.module.parameters() if id(p) not in halves])]
        adapters = _Adapters()
        for name, module in work.linears():
            if name.startswith(f"{block.name}.") and name not in sliced:
                rows.append(work.linear(name, module))
                path = name.removeprefix(f"{block.name}.")
                if path in self._ranks:
                    sizes = _adapter_sizes(name, work, Cut(module).at(None))
                    adapters.append((self._ranks[path], sizes))
        return total(rows), adapters


def cuts_of(block: Block, space: SearchSpace) -> dict[DimKind, ElasticDim]:
    """Return kind -> the dim that cuts a block."""
    found: dict[DimKind, ElasticDim] = {}
    for dim in space.dims:
        is_here = any(f"{name}.".startswith(f"{block.name}.") for name in dim.modules)
        if is_here and dim.kind in STRUCTURE_KINDS:
            found[dim.kind] = dim
    return found
