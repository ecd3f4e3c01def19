"""The nearest sub-network whose blocks are alike, so that it loads with stock classes."""

from __future__ import annotations

from transformers import PreTrainedModel

from elastune.errors import InvalidSubnet
from elastune.models.blocks import PARTS, Block, Part, blocks
from elastune.space import ElasticDim, SearchSpace, SubnetConfig


def snap_to_uniform(
    space: SearchSpace, config: SubnetConfig, model: PreTrainedModel
) -> SubnetConfig:
    """Return the nearest configuration with one width and one number of heads in all blocks.

    For heads and for channels: the choice that all blocks have which is closest to the mean over
    the blocks that are left (the larger of two as close). Depth and ranks stay. Blocks that no dim
    cuts have their full size, so that it is then the only one.

    Args:
        space: that ``config`` is of.
        config: any.
        model: that the space was made for; not changed.

    Raises:
        InvalidSubnet: not in the space, or no size but 0 is a choice of every block.
    """
    space.check(config)
    found = blocks(model)
    gone = {
        block.index
        for dim in space.dims
        if dim.kind == "depth" and config[dim.name] == 0
        for block in _members(dim, found)
    }
    left = [block for block in found if block.index not in gone]
    changes: dict[str, int] = {}
    for part in PARTS:
        dims = [dim for dim in space.dims if dim.kind == part]
        if dims and left:
            size = _common_size(part, dims, config, left)
            changes |= {dim.name: size if size in dim.choices else config[dim.name] for dim in dims}
    return SubnetConfig({**config, **changes})


def _common_size(
    part: Part, dims: list[ElasticDim], config: SubnetConfig, left: list[Block]
) -> int:
    """Return the choice of all blocks that is closest to the mean of what they have."""
    choices: set[int] | None = None
    sizes = []
    for block in left:
        dim = next((dim for dim in dims if block in _members(dim, left)), None)
        full = block.shape.heads if part == "heads" else block.shape.ffn
        own = {full} if dim is None else set(dim.choices)
        sizes.append(full if dim is None else config[dim.name])
        choices = own if choices is None else choices & own
    common = sorted((choices or set()) - {0}, reverse=True)
    if not common:
        raise InvalidSubnet(
            f"no size of {part} is a choice of every block, so that they cannot be made alike",
            try_="structure_space(..., shared=True), or the same choices for all blocks",
        )
    mean = sum(sizes) / len(sizes)
    return min(common, key=lambda size: abs(size - mean))


def _members(dim: ElasticDim, found: list[Block]) -> list[Block]:
    """Return the blocks that hold a dim's modules."""
    return [
        block
        for block in found
        if any(f"{name}.".startswith(f"{block.name}.") for name in dim.modules)
    ]
