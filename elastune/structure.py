"""The blocks of a model made elastic: heads, feed-forward channels, whole blocks.

Stock modules stay where they are; their classes are exchanged for ones that use a part of their
weights (`elastune.elastic.linear`) or none (`elastune.elastic.skip`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from elastune.elastic.absent import AbsentAttention
from elastune.elastic.linear import (
    Ranges,
    can_slice,
    make_sliceable,
    to_ranges,
    unmake_sliceable,
)
from elastune.elastic.sizes import set_sizes
from elastune.elastic.skip import (
    make_skippable_attention,
    make_skippable_block,
    unmake_skippable,
)
from elastune.errors import InvalidSpace
from elastune.linears import out_features
from elastune.models.blocks import PARTS, Block, BlockShape, Part, blocks
from elastune.space import ElasticDim, SubnetConfig

STRUCTURE_KINDS = (*PARTS, "depth")
"""Kinds of dims that cut the model itself, not an adapter."""


@dataclass
class _Choice:
    """What is done to make one choice of one dim active in one block."""

    slices: list[tuple[nn.Module, Ranges | None, Ranges | None]] = field(default_factory=list)
    switches: list[tuple[nn.Module, int]] = field(default_factory=list)
    sizes: list[tuple[nn.Module, dict[str, int]]] = field(default_factory=list)

    def apply(self) -> None:
        for module, rows, columns in self.slices:
            module.set_active(rows=rows, columns=columns)  # type: ignore[operator]
        for module, size in self.switches:
            module.set_active(size)  # type: ignore[operator]
        for module, sizes in self.sizes:
            set_sizes(module, sizes)


class ElasticStructure:
    """The elastic blocks of a model; all of every block is active at first.

    Args:
        model: changed in place.
        dims: of the kinds heads, ffn and depth, their modules inside blocks of the model.

    Raises:
        InvalidSpace: a choice that a block cannot have; the model is then as it was.
        UnsupportedModel: unknown family.
    """

    def __init__(self, model: PreTrainedModel, dims: Sequence[ElasticDim]) -> None:
        self.blocks = blocks(model)
        self._of_dim = {dim.name: self._blocks_of(dim) for dim in dims}
        self._kinds = {dim.name: dim.kind for dim in dims}
        for dim in dims:
            for block in self._of_dim[dim.name]:
                check_choices(dim.name, dim.kind, dim.choices, block)
                _check_weights(dim, block)
        _refuse_overlap(dims, self._of_dim)
        self._made: list[nn.Module] = []
        self._choices = {
            (dim.name, choice): [self._choice(block, dim, choice) for block in found]
            for dim in dims
            for found in (self._of_dim[dim.name],)
            for choice in (*dim.choices, *self._full_sizes(dim))
        }

    def set_active(self, dim: str, choice: int) -> None:
        """Use ``choice`` in every block of a dim."""
        for change in self._choices[dim, choice]:
            change.apply()

    def shapes(self, config: SubnetConfig) -> list[BlockShape | None]:
        """Return the sizes of every block of a sub-network; None for a block that is left out."""
        found: list[BlockShape | None] = [block.shape for block in self.blocks]
        for name, members in self._of_dim.items():
            for block in members:
                found[block.index] = _cut(
                    block, found[block.index], self._kinds[name], config[name]
                )
        return found

    def release(self) -> None:
        """Give all modules their own classes and sizes back."""
        for name, members in self._of_dim.items():
            full = self._full_sizes_of(self._kinds[name], members)
            for size in full:
                self.set_active(name, size)
        for module in self._made:
            unmake_sliceable(module)
            unmake_skippable(module)

    def _blocks_of(self, dim: ElasticDim) -> list[Block]:
        """Return the blocks that hold a dim's modules."""
        found = []
        for name in dim.modules:
            block = next((b for b in self.blocks if f"{name}.".startswith(f"{b.name}.")), None)
            if block is None:
                raise InvalidSpace(
                    f"{dim.name}: {name!r} is in no block of the model",
                    try_=f"modules such as {self.blocks[0].name!r}" if self.blocks else None,
                )
            if block not in found:
                found.append(block)
        return found

    def _full_sizes(self, dim: ElasticDim) -> list[int]:
        """Return the sizes that switch a dim off, where they are no choice of it."""
        full = self._full_sizes_of(dim.kind, self._of_dim[dim.name])
        return [size for size in full if size not in dim.choices]

    @staticmethod
    def _full_sizes_of(kind: str, members: Sequence[Block]) -> list[int]:
        sizes = {1 if kind == "depth" else full_size(block, kind) for block in members}
        if len(sizes) > 1:
            raise InvalidSpace("blocks of different widths cannot share a dim", try_="shared=False")
        return list(sizes)

    def _choice(self, block: Block, dim: ElasticDim, choice: int) -> _Choice:
        """Prepare one choice: which rows and columns, what is off, what the fields say."""
        if dim.kind == "depth":
            return _Choice(switches=[(self._skippable_block(block), choice)])
        part: Part = "heads" if dim.kind == "heads" else "ffn"
        change = _Choice()
        is_full = choice == full_size(block, dim.kind)
        units = torch.arange(choice // block.heads_per_unit if part == "heads" else choice)
        ranges: dict[str, dict[int, Ranges | None]] = {}
        for weights in block.weights_of(part, units):
            # With no head left, shared keys and values are of no use either.
            index = to_ranges(weights.index) if choice else ()
            ranges.setdefault(weights.path, {})[weights.dim] = None if is_full else index
        for path, by_dim in ranges.items():
            module = self._sliceable(block, path)
            change.slices.append((module, by_dim.get(0), by_dim.get(1)))
        if part == "heads":
            attention = self._skippable_attention(block)
            change.switches.append((attention, int(choice > 0)))
            if choice:
                change.sizes.append((attention, block.attention_sizes(choice)))
        return change

    def _sliceable(self, block: Block, path: str) -> nn.Module:
        module = block.module.get_submodule(path)
        if module not in self._made:
            self._made.append(make_sliceable(module))
        return module

    def _skippable_block(self, block: Block) -> nn.Module:
        module = block.module
        if module not in self._made:
            attention = module.get_submodule(block.record.attention.path)
            make_skippable_block(
                module,
                returns_tuple=block.record.returns_tuple,
                layer_idx=getattr(attention, "layer_idx", None),
            )
            self._made.append(module)
        return module

    def _skippable_attention(self, block: Block) -> nn.Module:
        module = block.module.get_submodule(block.record.attention.path)
        if module not in self._made:
            make_skippable_attention(module, absent_attention(block))
            self._made.append(module)
        return module


def absent_attention(block: Block) -> AbsentAttention:
    """Return what stands in for a block's attention that has no heads."""
    attention = block.record.attention
    output = block.record.roles["o"]
    # Where the output projection stands outside, it is absent by itself.
    is_inside = f"{output}.".startswith(f"{attention.path}.")
    module = block.module.get_submodule(attention.path)
    width = out_features(block.module.get_submodule(output)) if is_inside else 0
    layer_idx = getattr(module, "layer_idx", None)
    return AbsentAttention(width, layer_idx, attention.adds_residual)


def full_size(block: Block, kind: str) -> int:
    """Return the largest choice that a block has for a kind of dim."""
    if kind == "depth":
        return 1
    return block.shape.heads if kind == "heads" else block.shape.ffn


def check_choices(name: str, kind: str, choices: Sequence[int], block: Block) -> None:
    """Raise InvalidSpace unless a block can have all these sizes."""
    full = full_size(block, kind)
    for choice in choices:
        if choice > full:
            raise InvalidSpace(
                f"{name}: {block.name} has {full} {_NOUNS[kind]}, not {choice}",
                try_="choices up to the full size of the smallest block, or shared=False",
            )
        if kind == "heads" and choice % block.heads_per_unit:
            per = block.heads_per_unit
            raise InvalidSpace(
                f"{name}: {choice} heads cannot be kept in {block.name}: every key/value head "
                f"serves {per} query heads, which go together",
                try_=f"multiples of {per}",
            )
        if kind == "depth" and block.fixed_depth and choice == 0:
            raise InvalidSpace(
                f"{name}: {block.name} cannot be left out: {block.fixed_depth}",
                try_="heads and widths, which can be cut there, down to 0",
            )
        if kind == "heads" and block.fixed_heads and choice not in (0, full):
            raise InvalidSpace(
                f"{name}: {choice} of {full} heads cannot be kept in {block.name}: "
                f"{block.fixed_heads}",
                try_=f"{full} (all) or 0 (no attention); widths and depth can be cut freely",
            )


_NOUNS = {"heads": "heads", "ffn": "channels", "depth": "block (1 or 0)"}


def _check_weights(dim: ElasticDim, block: Block) -> None:
    """Raise InvalidSpace unless all that a dim cuts in a block can be cut."""
    if dim.kind == "depth":
        return
    part: Part = "heads" if dim.kind == "heads" else "ffn"
    for weights in block.weights_of(part, torch.arange(block.n_units(part))):
        module = block.module.get_submodule(weights.path)
        if not can_slice(module):
            raise InvalidSpace(
                f"{dim.name}: {block.name}.{weights.path} is a {type(module).__name__}, whose "
                "weight cannot be cut",
                try_="a base in float32, bfloat16 or float16; packed weights cannot be cut",
            )


def _refuse_overlap(dims: Sequence[ElasticDim], of_dim: dict[str, list[Block]]) -> None:
    seen: dict[tuple[str, int], str] = {}
    for dim in dims:
        for block in of_dim[dim.name]:
            other = seen.setdefault((dim.kind, block.index), dim.name)
            if other != dim.name:
                raise InvalidSpace(
                    f"{block.name} stands in two {dim.kind} dims: {other}, {dim.name}",
                    try_="each block in one dim of a kind",
                )


def _cut(block: Block, shape: BlockShape | None, kind: str, choice: int) -> BlockShape | None:
    if shape is None or (kind == "depth" and choice == 0):
        return None
    if kind == "heads":
        return shape._replace(heads=choice, kv_heads=block.kv_heads_at(choice))
    return shape._replace(ffn=choice) if kind == "ffn" else shape
