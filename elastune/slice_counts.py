"""Parameters and non-zeros of parts of a linear layer or norm, at any size and density."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from elastune.elastic.lora import ElasticLoRALinear
from elastune.elastic.sparse import levels_of, mask_of
from elastune.linears import in_features, is_linear, out_features, weight_of
from elastune.macs import Row, counted, total
from elastune.models.four_bit import unpacked


class Slice(NamedTuple):
    """The active part of a linear layer or norm."""

    params: int
    nonzero: int
    weights: int
    """In features times out features; 0 for a norm."""
    features: int
    """In and out features together; 0 for a norm."""
    zeros: int
    """In the weight, where a merged adapter leaves none."""


class Cut:
    """Counts parts of a linear layer or norm that are some of its rows or columns.

    Args:
        module: the layer, its adapter around it or not.
        dim: 0 for rows, with their biases; 1 for columns.
    """

    def __init__(self, module: nn.Module, dim: Literal[0, 1] = 0) -> None:
        self._module: Any = module.base if isinstance(module, ElasticLoRALinear) else module
        self._dim = dim
        self._nonzero: list[tuple[Tensor, int]] | None = None
        self._left_out: dict[int, Tensor] = {}

    def at(self, index: Tensor | None) -> Slice:
        """Count what ``index`` takes; None takes all, of a quantised layer too."""
        module = self._module
        whole = counted(list(module.parameters(recurse=False)))
        if not is_linear(module):
            rows = whole if index is None else self._taken(index)
            return Slice(rows.params, rows.nonzero, 0, 0, 0)
        sizes = [out_features(module), in_features(module)]
        if index is None:
            weight = unpacked(module.weight)
            zeros = weight.numel() - int(torch.count_nonzero(weight))
            return Slice(whole.params, whole.nonzero, sizes[0] * sizes[1], sum(sizes), zeros)
        sizes[self._dim] = len(index)
        weights = sizes[0] * sizes[1]
        taken = self._taken(index)
        per_line, _ = self._lines()[0]
        zeros = weights - int(per_line[index].sum())
        return Slice(taken.params, taken.nonzero, weights, sum(sizes), zeros)

    def left_out(self, index: Tensor | None, density: int) -> int:
        """Count the non-zeros of what ``index`` takes that a density turns to zero."""
        per_line = self._left_out.get(density)
        if per_line is None:
            mask = mask_of(self._module)
            assert mask is not None  # asked of layers that follow a dim of density alone
            gone = levels_of(self._module, mask) < mask.least_at(density)
            gone &= (weight_of(self._module) != 0).to(gone.device)
            per_line = self._left_out[density] = gone.sum(1 - self._dim).cpu()
        return int(per_line.sum() if index is None else per_line[index].sum())

    def _taken(self, index: Tensor) -> Row:
        """Count the parameters in some rows or columns."""
        lines = [(nonzero[index], size) for nonzero, size in self._lines()]
        params = sum(len(nonzero) * size for nonzero, size in lines)
        taken = Row(params, sum(int(nonzero.sum()) for nonzero, _ in lines))
        # With some of the columns the bias stays whole.
        bias = getattr(self._module, "bias", None) if self._dim == 1 else None
        return taken if bias is None else total([taken, counted([bias])])

    def _lines(self) -> list[tuple[Tensor, int]]:
        """Return non-zeros in each row (or column) of each parameter, and a row's size."""
        if self._nonzero is None:
            module = self._module
            if is_linear(module):
                weight = weight_of(module)
                per_line = torch.count_nonzero(weight, dim=1 - self._dim).cpu()
                self._nonzero = [(per_line, weight.shape[1 - self._dim])]
            else:
                self._nonzero = []
            flat = [p for p in module.parameters(recurse=False) if p.dim() == 1]
            if self._dim == 0:
                self._nonzero += [((p != 0).long().cpu(), 1) for p in flat]
        return self._nonzero
