"""Elastic sparsity of one weight: a byte for each of its numbers says which densities keep it.

The weight itself is never written to. What runs is a copy with exact zeros, made when it is first
asked for; of a weight that is trained it is made in every forward pass, so that gradients flow to
kept numbers only.

Shapes: `O` out features, `I` in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DENSE = 100
"""Percent: the density at which nothing is left out."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a floating-point number -> integers of that size."""


@dataclass(frozen=True)
class WeightLevels:
    """Which numbers of which weights stay at which density.

    Attributes:
        levels: name of a weight -> uint8, ``(O, I)``: how many of its densities keep a number. The
            i-th density (from 1) keeps those of level i and above.
        densities: name of a weight -> percent of its numbers that stay, largest first, all below
            100; at 100 all stay.
    """

    levels: Mapping[str, Tensor]
    densities: Mapping[str, tuple[int, ...]]


class WeightMask:
    """What of one weight runs.

    Args:
        levels: uint8, shaped as the weight is stored.
        densities: as in `WeightLevels`.
    """

    def __init__(self, levels: Tensor, densities: tuple[int, ...]) -> None:
        self.levels = levels
        self.densities = densities
        self.least = 0
        """The lowest level that runs; 0 for all."""
        self._kept: Tensor | None = None
        self._made_of: tuple[Any, ...] = ()
        self._may_overwrite = False

    def least_at(self, density: int) -> int:
        """Return the lowest level that a density keeps."""
        return 0 if density == DENSE else self.densities.index(density) + 1

    def set_active(self, density: int) -> None:
        """Let ``density`` percent of the numbers run."""
        self.least = self.least_at(density)
        self._made_of = ()
        if not self._may_overwrite:
            self._kept = None

    def of(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros where it is left out; itself at full density."""
        if self.least == 0:
            return weight
        if self.levels.device != weight.device:
            self.levels = self.levels.to(weight.device)
        trains = torch.is_grad_enabled()
        if trains and weight.requires_grad:
            self._kept, self._made_of = None, ()  # of what is about to change
            kept: Tensor = _Kept.apply(weight, self.levels, self.least)
            return kept
        version = 0 if weight.is_inference() else weight._version
        made_of = (weight.data_ptr(), weight.device, weight.dtype, version)
        if self._kept is None or self._made_of != made_of:
            reused = self._kept if self._may_overwrite and _is_like(self._kept, weight) else None
            # A copy made in inference mode could not be used by a training step later.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = _keep(weight, self.levels, self.least, out=reused)
            self._made_of = made_of
            self._may_overwrite = True
        # What a training step has seen may be waiting for its backward pass.
        self._may_overwrite &= not trains
        return self._kept


def _is_like(tensor: Tensor | None, weight: Tensor) -> bool:
    return tensor is not None and (tensor.device, tensor.dtype) == (weight.device, weight.dtype)


def _keep(tensor: Tensor, levels: Tensor, least: int, out: Tensor | None = None) -> Tensor:
    """Return a copy that is zero where the level is below ``least``."""
    # As integers: plain zeros whatever stood there, where -1.5 times 0 is -0. Several times faster
    # than masked_fill.
    integer = _INTEGERS[tensor.element_size()]
    made = torch.empty_like(levels, dtype=integer) if out is None else out.view(integer)
    torch.ge(levels, least, out=made)
    return made.mul_(tensor.detach().view(integer)).view(tensor.dtype)


class _Kept(torch.autograd.Function):
    """The kept part of a weight that is trained; the mask of its gradient is made anew."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, levels: Tensor, least: int) -> Tensor:
        ctx.levels, ctx.least = levels, least
        return _keep(weight, levels, least)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _keep(grads[0], ctx.levels, ctx.least), None, None
