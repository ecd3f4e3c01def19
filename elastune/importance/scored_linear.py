"""Linear layers whose weights are masked by learned scores: the layer of movement pruning.

    W' = W * 1[S > tau],  dL/dS = sum over the weights of a structure of dL/dW' * W

The threshold counts as the identity for the gradient of S (straight-through); weights get that of
what was used, so masked ones get none. Biases are not masked.

Sources: Sanh et al. 2020 (section 3), of single weights; Lagunas et al. 2021 (section 3) of blocks,
rows and columns. Shapes: `O` out features, `I` in features, `(R, C)` structures down and across.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

from elastune.elastic.linear import can_slice
from elastune.errors import UnsupportedModel
from elastune.linears import in_features, out_features

StructureKind = Literal["block", "row", "column", "weight"]
STRUCTURE_KINDS: tuple[StructureKind, ...] = ("block", "row", "column", "weight")


@dataclass(frozen=True)
class Grid:
    """How a weight ``(O, I)`` is divided into rectangles that share a score.

    Attributes:
        shape: of the weight.
        block: rows and columns of a rectangle; the last ones may be cut by the weight's edge.
    """

    shape: tuple[int, int]
    block: tuple[int, int]

    @classmethod
    def of(cls, shape: tuple[int, int], kind: StructureKind, size: int) -> Grid:
        """Divide a weight; ``size`` is the edge of the square blocks of kind ``"block"``."""
        rows, columns = shape
        return cls(
            shape,
            {
                "block": (min(size, rows), min(size, columns)),
                "row": (1, columns),
                "column": (rows, 1),
                "weight": (1, 1),
            }[kind],
        )

    @property
    def size(self) -> tuple[int, int]:
        """Structures down and across, ``(R, C)``."""
        rows, columns = (math.ceil(n / b) for n, b in zip(self.shape, self.block, strict=True))
        return rows, columns

    def expand(self, values: Tensor) -> Tensor:
        """Return ``(R, C)`` as ``(O, I)``; of rows and columns a view, which takes no memory."""
        if self._broadcasts:
            return values.expand(self.shape)
        for dim in (0, 1):
            values = values.repeat_interleave(self.block[dim], dim)
        return values[: self.shape[0], : self.shape[1]]

    def multiply(self, weight: Tensor, values: Tensor) -> Tensor:
        """Return ``(O, I)`` times the ``(R, C)`` of its structures."""
        if self._broadcasts:
            return weight * values
        product = self._tiles(weight) * values[:, None, :, None]
        return product.flatten(2).flatten(0, 1)[: self.shape[0], : self.shape[1]]

    def sum(self, weights: Tensor) -> Tensor:
        """Return the sums ``(R, C)`` over the structures of ``(O, I)``."""
        if self._broadcasts:
            return weights.sum_to_size(self.size)
        return self._tiles(weights).sum((1, 3))

    def counts(self) -> Tensor:
        """Return how many weights each structure has, int64 ``(R, C)``."""
        ends = [
            (torch.arange(n) * b + b).clamp(max=full) - torch.arange(n) * b
            for n, b, full in zip(self.size, self.block, self.shape, strict=True)
        ]
        return ends[0][:, None] * ends[1]

    @property
    def _broadcasts(self) -> bool:
        sides = zip(self.shape, self.block, strict=True)
        return all(block in (1, full) for full, block in sides)

    def _tiles(self, weight: Tensor) -> Tensor:
        """Return ``(R, rows of a block, C, columns of a block)``, zeros beyond the edge."""
        (rows, columns), (n, m) = self.block, self.size
        missing = (n * rows - self.shape[0], m * columns - self.shape[1])
        if any(missing):
            weight = pad(weight, (0, missing[1], 0, missing[0]))
        return weight.unflatten(1, (m, columns)).unflatten(0, (n, rows))


class _Masked(torch.autograd.Function):
    """``W * mask``, with the straight-through gradient for the scores that the mask is made of."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor | None, grid: Grid
    ) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.grid = grid
        return weight.view_as(weight) if mask is None else grid.multiply(weight, mask)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, mask = ctx.saved_tensors
        of_weight = of_scores = None
        if ctx.needs_input_grad[0]:
            of_weight = gradient if mask is None else ctx.grid.multiply(gradient, mask)
        if ctx.needs_input_grad[1]:
            of_scores = ctx.grid.sum(gradient.float() * weight.float())
        return of_weight, of_scores, None, None


class ScoredLinear(nn.Module):
    """A linear layer with a learned score for each structure of its weight.

    Made of a stock layer by exchanging its class: names, weights and hooks stay as they are.

    Attributes:
        movement_scores: float32 ``(R, C)``, learned, at first 0.
        grid: the structures.
        mask: ``(R, C)``, 1 for what is used, in the weight's dtype; None: all of it.
        learns: whether scores get a gradient.
    """

    movement_scores: nn.Parameter
    grid: Grid
    mask: Tensor | None
    learns: bool
    weight: Tensor
    bias: Tensor | None
    transposed = False
    _plain_class: type[nn.Module]

    def used_weight(self) -> Tensor:
        """Return the masked weight, ``(O, I)``."""
        weight = self.weight.T if self.transposed else self.weight
        scores = self.movement_scores if self.learns else self.movement_scores.detach()
        masked: Tensor = _Masked.apply(weight, scores, self.mask, self.grid)
        return masked

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.used_weight(), self.bias)


class _ScoredLinear(ScoredLinear, nn.Linear):  # type: ignore[misc]
    """An `nn.Linear` with scores."""


class _ScoredConv1D(ScoredLinear, Conv1D):  # type: ignore[misc]
    """A transformers `Conv1D` (weight ``(I, O)``, as in GPT-2) with scores."""

    transposed = True


def add_scores(name: str, layer: nn.Module, kind: StructureKind, size: int) -> ScoredLinear:
    """Give a linear layer scores, in place.

    Raises:
        UnsupportedModel: not a plain linear layer: quantised, elastic already or with an adapter.
    """
    plain = type(layer)
    is_plain = isinstance(layer, nn.Linear | Conv1D) and "_plain_class" not in vars(layer)
    if not is_plain or not can_slice(layer):
        raise UnsupportedModel(
            f"{name} is a {plain.__name__}, which movement pruning cannot mask",
            try_="the plain model, before adapters are added or it is quantised",
        )
    grid = Grid.of((out_features(layer), in_features(layer)), kind, size)
    scores = torch.zeros(grid.size, dtype=torch.float32, device=layer.weight.device)  # type: ignore[arg-type]
    layer.register_parameter("movement_scores", nn.Parameter(scores))
    layer.__class__ = _ScoredConv1D if isinstance(layer, Conv1D) else _ScoredLinear
    for key, value in {"grid": grid, "mask": None, "learns": True, "_plain_class": plain}.items():
        setattr(layer, key, value)
    return layer  # type: ignore[return-value]


def remove_scores(layer: ScoredLinear) -> None:
    """Give a layer its own class back; its weights are as they were trained, unmasked."""
    plain = layer._plain_class
    del layer.movement_scores
    for name in ("grid", "mask", "learns", "_plain_class"):
        layer.__dict__.pop(name, None)
    layer.__class__ = plain  # type: ignore[assignment]
