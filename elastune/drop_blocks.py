"""Take whole blocks out of a plain model: what is left is numbered anew and loads as usual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from elastune.errors import InvalidSpace
from elastune.models.blocks import blocks


def drop_blocks_(model: PreTrainedModel, numbers: Sequence[int]) -> PreTrainedModel:
    """Take blocks out of a model, in place: a fixed smaller base.

    The list of blocks is shortened, their numbers in the cache, ``num_hidden_layers`` and what the
    configuration lists for each block follow. The result computes what a super-network computes
    with these blocks left out, and is saved and loaded with the stock class.

    Args:
        model: plain, of a known architecture; before a super-network is made.
        numbers: of the blocks, from 0; none changes nothing.

    Returns:
        The same model.

    Raises:
        InvalidSpace: no such block, one that cannot be left out, or all of them. The model is then
            as it was.
        UnsupportedModel: unknown family.
    """
    found = blocks(model)
    gone = set(numbers)
    wrong = sorted(gone - set(range(len(found))))
    if wrong:
        raise InvalidSpace(f"there is no block {wrong}; blocks are 0 to {len(found) - 1}")
    for block in found:
        if block.index in gone and block.fixed_depth:
            raise InvalidSpace(
                f"{block.name} cannot be left out: {block.fixed_depth}",
                try_="leave this block out of depth",
            )
    kept = [block.index for block in found if block.index not in gone]
    if not kept:
        raise InvalidSpace(
            f"all {len(found)} blocks would be left out: nothing remains",
            try_="keep one block at least",
        )
    if gone:
        keep_blocks_(model, [block.name for block in found], kept)
    return model


def keep_blocks_(model: PreTrainedModel, names: Sequence[str], kept: Sequence[int]) -> None:
    """Keep only some of a model's blocks, in place.

    Args:
        model: plain.
        names: full module names of all blocks, in order; they stand in one list.
        kept: numbers of those that stay, ascending.
    """
    left = nn.ModuleList(model.get_submodule(names[index]) for index in kept)
    for number, block in enumerate(left):
        _number(block, number)
    container, _, _ = names[0].rpartition(".")
    model.set_submodule(container, left)
    _tell_depth(model.config, len(names), kept)


def _number(block: nn.Module, number: int) -> None:
    """Let every module of a block that knows the block's place say the new one."""
    for module in block.modules():
        if getattr(module, "layer_idx", None) is not None:
            module.layer_idx = number  # type: ignore[assignment]


def _tell_depth(config: Any, n_full: int, kept: Sequence[int]) -> None:
    """Shorten what a config says for each block: lists such as layer_types, no_rope_layers."""
    if len(kept) == n_full:
        return
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == n_full:
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
