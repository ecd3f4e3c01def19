"""Where a forward pass multiplies: the MACs of each linear layer and of attention.

MACs (multiply-accumulates) count every linear layer and the two products of attention; masked
pairs count as computed, zeros too: common kernels compute them. Norms, activations and the
embedding's look-up are no products of matrices; a factorised embedding's projection is one.

Shapes: `T` tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from elastune.elastic.embedding import ElasticEmbedding
from elastune.linears import in_features, out_features
from elastune.models.architecture import type_of
from elastune.models.families import record_for
from elastune.models.four_bit import unpacked


class Row(NamedTuple):
    """A part of a cost."""

    params: int = 0
    nonzero: int = 0
    macs: int = 0
    decode_macs: int = 0


def total(rows: Iterable[Row]) -> Row:
    """Add parts up, field by field."""
    return Row(*map(sum, zip(Row(), *rows, strict=True)))


def counted(parameters: Iterable[Tensor]) -> Row:
    """Count parameters and those that are not zero."""
    numbers = (unpacked(p) for p in parameters)
    sizes = [(p.numel(), int(torch.count_nonzero(p))) for p in numbers]
    return Row(sum(size for size, _ in sizes), sum(nonzero for _, nonzero in sizes))


class Work:
    """How much of a model's forward pass each of its modules does.

    Args:
        model: of a known family.
        tokens: ``T``.
    """

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        # Not `architecture`: it looks for all roles in block 0, where halves may be absent.
        self.model = model
        self.record = record_for(type_of(model))
        self.tokens = tokens
        self._decodes = int(self.record.kind == "decoder")
        self._names = self.record.block_names(model)
        self._prefixes = tuple(f"{name}." for name in self._names)
        self._once = tuple(f"{name}." for name in self.record.once_names(model))
        self._windows = _windows(model.config, len(self._names))

    def blocks(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield the number and module of each block."""
        yield from enumerate(self.record.blocks_of(self.model))

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield what multiplies by a weight; a layer under an adapter by the adapter's name."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d):
                yield name.removesuffix(".base"), module

    def in_block(self, name: str) -> bool:
        """Tell whether a module belongs to a block."""
        return name.startswith(self._prefixes)

    def positions(self, name: str) -> tuple[int, int]:
        """Return how many vectors a linear layer is applied to, in prefill and for one token."""
        if f"{name}.".startswith(self._once):
            return 1, 0
        parent, _, last = name.rpartition(".")
        relative = _relative_positions(self.model.get_submodule(parent)) if parent else 0
        if last.startswith("pos_"):
            return relative, 0
        # DeBERTa's projections of words project the relative positions, too.
        more = relative if last in ("query_proj", "key_proj") and _shares(self.model, parent) else 0
        return self.tokens + more, self._decodes

    def linear(self, name: str, module: nn.Module) -> Row:
        """Return the MACs of a linear layer or convolution."""
        if isinstance(module, nn.Conv1d):  # of DeBERTa, over the tokens
            return Row(macs=self.tokens * module.weight.numel())
        if isinstance(module, nn.Conv2d):  # patches of a picture; one token is none
            return Row(macs=(self.tokens - 1) * module.weight.numel())
        prefill, decode = self.positions(name)
        weight = in_features(module) * out_features(module)
        return Row(macs=prefill * weight, decode_macs=decode * weight)

    def embedding(self, table: ElasticEmbedding, rank: int) -> Row:
        """Return what an elastic embedding costs at a rank; its width is the table as it is."""
        if rank == table.embedding_dim:
            return counted([table.weight])
        factors = [table.factor_a[:, :rank], table.factor_b[:rank]]
        weight = factors[1].numel()
        macs = Row(macs=self.tokens * weight, decode_macs=self._decodes * weight)
        return total([counted(factors), macs])

    def attention(self, index: int, width: int) -> Row:
        """Return the MACs of Q K^T and of the weighted sum over V, at heads times head size."""
        block = self.record.blocks_of(self.model)[index]
        module = dict(block.named_modules()).get(self.record.attention.path)
        relative = _relative_positions(module) if module is not None else 0
        kinds = getattr(module, "pos_att_type", ()) if relative else ()
        prefill = 2 * self.tokens + relative * len({"c2p", "p2c"}.intersection(kinds))
        keys = min(self.tokens + 1, self._windows[index] or self.tokens + 1)
        return Row(macs=width * self.tokens * prefill, decode_macs=self._decodes * 2 * keys * width)


def _windows(config: Any, n_blocks: int) -> list[int | None]:
    """Return how many keys each block's cache holds at most; None for all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * n_blocks
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _relative_positions(attention: nn.Module) -> int:
    """Return how many relative positions DeBERTa's attention has vectors for."""
    if not getattr(attention, "relative_attention", False):
        return 0
    return 2 * int(attention.pos_ebd_size)  # type: ignore[arg-type]


def _shares(model: nn.Module, name: str) -> bool:
    return bool(getattr(model.get_submodule(name), "share_att_key", False))
