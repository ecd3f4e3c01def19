"""How the product of an adapter joins the weight it belongs to, where more is to be kept than sums.

Source: Munoz et al. 2024 (SQFT, section 3): SparsePEFT, ``W' = W + s (B A) * 1[W != 0]``, and
QA-SparsePEFT, the same rounded to the base's own INT4 grid. What trains is then what is merged.

Shapes: `O` out features, `I` in features, `G` groups of in features that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Keep = Literal["nothing", "zeros", "int4"]
"""What merging an adapter keeps of the base: nothing (LoRA), its zeros (SparsePEFT), or its zeros
and its INT4 grid (QA-SparsePEFT)."""

KEEPS: tuple[Keep, ...] = ("nothing", "zeros", "int4")

LOWEST, HIGHEST = -8, 7
"""Codes of INT4."""


@dataclass(frozen=True)
class Int4Grid:
    """The numbers that a weight can be: ``(q - zero_point) * scale`` for q in -8..7.

    Attributes:
        scale: float32, ``(O, G)``.
        zero_point: whole numbers as int8, ``(O, G)``; so that 0 is on the grid.
    """

    scale: Tensor
    zero_point: Tensor

    def codes(self, weight: Tensor) -> Tensor:
        """Return what ``(O, I)`` numbers are on the grid before they are cut to -8..7, float32."""
        out, groups = self.scale.shape
        grouped = weight.float().view(out, groups, -1)
        shifted = grouped / self.scale[..., None] + self.zero_point[..., None]
        return shifted.round_().view(weight.shape)

    def numbers(self, codes: Tensor) -> Tensor:
        """Return the numbers of ``(O, I)`` codes, float32."""
        out, groups = self.scale.shape
        grouped = codes.view(out, groups, -1) - self.zero_point[..., None]
        return grouped.mul_(self.scale[..., None]).view(codes.shape)

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the nearest numbers of the grid, in the weight's type."""
        return self.numbers(self.codes(weight).clamp_(LOWEST, HIGHEST)).to(weight.dtype)

    def to(self, device: torch.device) -> Int4Grid:
        """Return the grid on a device."""
        return Int4Grid(self.scale.to(device), self.zero_point.to(device))


class MergeRule(Protocol):
    """Puts a weight ``(O, I)`` and what an adapter adds to it, float32, together."""

    def merge(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the merged weight, in the weight's type; ``delta`` is written to."""

    def merge_and_pass(self, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the merged weight, and where gradients reach ``delta``: true or false."""


class KeepZeros:
    """SparsePEFT: nothing is added where the weight is zero."""

    def merge(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return W + delta * 1[W != 0]."""
        return self.merge_and_pass(weight, delta)[0]

    def merge_and_pass(self, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return it, and where the weight is not zero."""
        kept = weight != 0
        return delta.mul_(kept).add_(weight).to(weight.dtype), kept


class KeepGrid:
    """QA-SparsePEFT: zeros stay, and every sum is rounded to the grid of the base.

    Gradients pass the rounding as if it were not there, but for codes that are cut off.
    """

    def __init__(self, grid: Int4Grid) -> None:
        self.grid = grid

    def merge(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the number of the grid next to W + delta * 1[W != 0]."""
        return self.merge_and_pass(weight, delta)[0]

    def merge_and_pass(self, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return it, and where the weight is not zero and its code is not cut off."""
        if self.grid.scale.device != weight.device:
            self.grid = self.grid.to(weight.device)
        kept = weight != 0
        codes = self.grid.codes(delta.mul_(kept).add_(weight))
        inside = (codes >= LOWEST) & (codes <= HIGHEST)
        numbers = self.grid.numbers(codes.clamp_(LOWEST, HIGHEST))
        return numbers.to(weight.dtype), kept & inside
