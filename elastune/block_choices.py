"""What each block of a super-network computes with: the choices that have an effect there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from elastune.models.blocks import PARTS, Block
from elastune.space import ElasticDim, SubnetConfig
from elastune.supernet import SuperNetwork

_NONE = -1
"""Stands for a choice without effect."""


class Effective(NamedTuple):
    """The choices that matter; two configurations with equal ones are the same network."""

    outside: tuple[int, ...]
    """Of dims with a module in no block, such as the word embedding."""
    blocks: tuple[tuple[int, ...], ...]
    """Of each block, first block first."""

    def common_blocks(self, other: Effective) -> int:
        """Return how many blocks, counted from the first, compute the same in both."""
        if self.outside != other.outside:
            return 0
        pairs = enumerate(zip(self.blocks, other.blocks, strict=True))
        return next((i for i, (own, its) in pairs if own != its), len(self.blocks))

    def present_blocks(self) -> list[bool]:
        """Tell of each block whether it is there; one that is left out has no effective choice."""
        return [not block or any(choice != _NONE for choice in block) for block in self.blocks]


class EffectiveChoices:
    """Configuration -> the choices that have an effect.

    Nothing inside a block that is left out has, nor has a rank or density in a half without heads
    or channels.
    """

    def __init__(self, net: SuperNetwork) -> None:
        dims, found = net.space.dims, net.blocks
        self._outside = [
            dim.name for dim in dims if not all(_holder(m, found) for m in dim.modules)
        ]
        self._blocks = [
            [(dim.name, _switches(dim, block, dims)) for dim in dims if _modules_in(dim, block)]
            for block in found
        ]

    def __call__(self, config: SubnetConfig) -> Effective:
        """Return the effective choices of a configuration of the super-network's space."""
        blocks = tuple(
            tuple(
                _NONE if any(config[switch] == 0 for switch in switches) else config[name]
                for name, switches in dims
            )
            for dims in self._blocks
        )
        return Effective(tuple(config[name] for name in self._outside), blocks)

    def idle(self, config: SubnetConfig) -> set[str]:
        """Return the dims without effect: other choices leave out every part that they concern."""
        names, at_work = {name for dims in self._blocks for name, _ in dims}, {*self._outside}
        for dims in self._blocks:
            for name, switches in dims:
                if all(config[switch] != 0 for switch in switches if switch != name):
                    at_work.add(name)
        return names - at_work


def blocks_of(dim: ElasticDim, found: Sequence[Block]) -> list[Block]:
    """Return the blocks that hold a dim's modules."""
    return [block for block in found if _modules_in(dim, block)]


def _holder(module: str, found: list[Block]) -> Block | None:
    return next((b for b in found if f"{module}.".startswith(f"{b.name}.")), None)


def _modules_in(dim: ElasticDim, block: Block) -> list[str]:
    return [m for m in dim.modules if f"{m}.".startswith(f"{block.name}.")]


def _switches(dim: ElasticDim, block: Block, dims: tuple[ElasticDim, ...]) -> list[str]:
    """Return the dims that leave this one without effect in a block when they are 0.

    That a block is left out is said by all of its dims, the one that leaves it out among them.
    """
    near = [d for d in dims if _modules_in(d, block)]
    found = [d.name for d in near if d.kind == "depth"]
    if dim.kind in ("rank", "density"):
        for part in PARTS:
            half = {f"{block.name}.{block.record.roles[role]}" for role in block.roles_of(part)}
            if set(_modules_in(dim, block)) <= half:
                found += [d.name for d in near if d.kind == part]
    return found
