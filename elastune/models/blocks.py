"""The blocks of a model: how wide they are, and which weights belong to which head or channel.

What can be cut comes in units: of attention a key/value group with all its query heads (where all
query heads share one key and value, a query head), of the feed-forward a channel.
`Block.weights_of` says which rows and columns of which weights some units are; reordering, slicing,
extraction and cost all read it from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.linears import in_features, out_features
from elastune.models.architecture import Architecture
from elastune.models.families import architecture

Part = Literal["heads", "ffn"]
"""A half of a block: its attention, cut by heads, or its feed-forward, cut by channels."""

PARTS: tuple[Part, ...] = ("heads", "ffn")

_ATTENTION_ROLES = ("qkv", "q", "k", "v", "o")


class BlockShape(NamedTuple):
    """The sizes of one block; a half of size 0 is absent, its norms and residual stay."""

    heads: int
    """Query heads."""
    kv_heads: int
    ffn: int
    """Channels of the feed-forward."""


class Weights(NamedTuple):
    """Some rows (``dim`` 0, out features) or columns (``dim`` 1, in features) of a module."""

    path: str
    """Inside the block."""
    dim: Literal[0, 1]
    index: Tensor  # type: ignore[assignment]
    """int64, in the order wanted."""


@dataclass(frozen=True)
class Block:
    """One block of a model, and its full sizes.

    Attributes:
        index: place in the model, from 0.
        name: full module name.
        module: the block itself.
        record: of the model's family.
        shape: the full sizes.
        head_dim: size of one head.
        layout: how the rows of a fused ``qkv`` are ordered.
        fixed_heads: why heads cannot be cut one by one, or None.
        fixed_depth: why the block cannot be left out, or None.
    """

    index: int
    name: str
    module: nn.Module
    record: Architecture
    shape: BlockShape
    head_dim: int
    layout: str
    fixed_heads: str | None = None
    fixed_depth: str | None = None

    @property
    def heads_per_unit(self) -> int:
        """Query heads that can only be cut together."""
        if self.shape.kv_heads <= 1:
            return 1
        return self.shape.heads // self.shape.kv_heads

    def n_units(self, part: Part) -> int:
        """Return how many units a half consists of."""
        return self.shape.heads // self.heads_per_unit if part == "heads" else self.shape.ffn

    def kv_heads_at(self, heads: int) -> int:
        """Return the key/value heads that are left with ``heads`` query heads."""
        if heads == 0 or self.shape.kv_heads == 1:
            return min(heads, self.shape.kv_heads)
        return heads // self.heads_per_unit

    def roles_of(self, part: Part) -> list[str]:
        """Return the roles of the linear layers of a half."""
        is_attention = part == "heads"
        return [r for r in self.record.roles if (r in _ATTENTION_ROLES) == is_attention]

    def weights_of(self, part: Part, units: Tensor) -> Iterator[Weights]:
        """Yield the weights that ``units`` (int64, in the order wanted) consist of.

        Biases and norms go with the rows of their module.
        """
        for role in self.roles_of(part):
            dim: Literal[0, 1] = 1 if role in ("o", "down") else 0
            yield Weights(self.record.roles[role], dim, self._index(role, units))
        if part == "heads":
            for path, role in self.record.attention.followers.items():
                if _has(self.module, path):
                    yield Weights(path, 0, self._index(role, units))

    def attention_sizes(self, heads: int) -> dict[str, int]:
        """Return what the attention module's own fields must say with ``heads`` query heads."""
        kv_heads = self.kv_heads_at(heads)
        values = {
            "heads": heads,
            "kv_heads": kv_heads,
            "groups": heads // max(kv_heads, 1),
            "width": heads * self.head_dim,
        }
        sizes = {name: values[what] for name, what in self.record.attention.sizes.items()}
        if hasattr(self.module.get_submodule(self.record.attention.path), "num_key_value_groups"):
            sizes["num_key_value_groups"] = values["groups"]
        return sizes

    def _index(self, role: str, units: Tensor) -> Tensor:
        """Return the rows (of ``o`` and ``down``: the columns) that some units have in a role."""
        if role in ("up", "gate", "down"):
            return units
        if role == "gate_up":
            return torch.cat([units, units + self.shape.ffn])
        q_size = self.heads_per_unit * self.head_dim
        if role in ("q", "o"):
            return _spread(units, q_size)
        is_shared = self.shape.kv_heads == 1 and self.n_units("heads") != 1
        if role in ("k", "v"):
            return torch.arange(self.head_dim) if is_shared else _spread(units, self.head_dim)
        if self.layout == "by_group":
            return _spread(units, q_size + 2 * self.head_dim)
        q_width = self.shape.heads * self.head_dim
        kv_width = self.shape.kv_heads * self.head_dim
        kv = torch.arange(self.head_dim) if is_shared else _spread(units, self.head_dim)
        return torch.cat([_spread(units, q_size), q_width + kv, q_width + kv_width + kv])


def blocks(model: PreTrainedModel) -> list[Block]:
    """Return the blocks of a model, first block first.

    Of a model with blocks of several sizes each block has its own; halves that are absent are 0.

    Raises:
        UnsupportedModel: unknown family, or a mixture of experts.
    """
    record = architecture(model)
    names = record.block_names(model)
    modules = record.blocks_of(model)
    return [
        _block(model, record, index, name, module)
        for index, (name, module) in enumerate(zip(names, modules, strict=True))
    ]


def _block(
    model: PreTrainedModel, record: Architecture, index: int, name: str, module: nn.Module
) -> Block:
    heads, kv_heads, head_dim = _heads(record, module)
    layout = record.attention.layout
    layout = layout if isinstance(layout, str) else layout(model.config)
    alibi = record.attention.alibi
    is_alibi = alibi if isinstance(alibi, bool) else alibi(model.config)
    return Block(
        index,
        name,
        module,
        record,
        BlockShape(heads, kv_heads, in_features(module.get_submodule(record.roles["down"]))),
        head_dim,
        "stacked" if kv_heads == 1 else layout,  # one group: both orders are the same
        "its positions are slopes that belong to head numbers (ALiBi)" if is_alibi else None,
        None if record.fixed_depth is None else record.fixed_depth(model.config, index),
    )


def _heads(record: Architecture, block: nn.Module) -> tuple[int, int, int]:
    """Return the query heads and key/value heads of a block, and the size of one; absent: zeros."""
    attention = block.get_submodule(record.attention.path)
    if not hasattr(attention, record.attention.head_dim):
        return 0, 0, 0
    head_dim = int(getattr(attention, record.attention.head_dim))
    heads = in_features(block.get_submodule(record.roles["o"])) // head_dim
    if "k" in record.roles:
        return heads, out_features(block.get_submodule(record.roles["k"])) // head_dim, head_dim
    fused = out_features(block.get_submodule(record.roles["qkv"])) // head_dim
    return heads, (fused - heads) // 2, head_dim


def _spread(units: Tensor, size: int) -> Tensor:
    """Return the rows of units of ``size`` rows each."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
