"""Elastic linear layers and norms: the same weights, of which a part of rows and columns is used.

By slicing, not masking, so that a smaller sub-network is a smaller matrix product in training too.
The class of the stock module is exchanged; names, weights and hooks stay as they are.

Source: Munoz et al. 2024 (LoNAS, section 3): frozen weights become elastic by taking the first
rows or columns. Shapes: `O` out features, `I` in features.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from elastune.elastic.mask import WeightMask

Ranges = tuple[tuple[int, int], ...]
"""Start and stop of what is active; more than one where a matrix holds several projections."""


def to_ranges(index: Tensor) -> Ranges:
    """Return the runs of consecutive numbers in ``index``."""
    found: list[tuple[int, int]] = []
    for value in index.tolist():
        if found and found[-1][1] == value:
            found[-1] = (found[-1][0], value + 1)
        else:
            found.append((value, value + 1))
    return tuple(found)


def take(tensor: Tensor, dim: int, ranges: Ranges | None) -> Tensor:
    """Return the active part of a tensor: a view, or of several ranges a copy."""
    if ranges is None:
        return tensor
    if len(ranges) == 1:
        start, stop = ranges[0]
        return tensor.narrow(dim, start, stop - start)
    if not ranges:
        return tensor.narrow(dim, 0, 0)
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in ranges], dim)


def length_of(ranges: Ranges | None, full: int) -> int:
    """Return how many rows or columns are active."""
    return full if ranges is None else sum(stop - start for start, stop in ranges)


class _Sliced:
    """What a linear layer of any spelling has active; None means all."""

    rows: Ranges | None
    columns: Ranges | None
    _plain_class: type[nn.Module]
    weight: Tensor
    bias: Tensor | None
    transposed = False
    mask: WeightMask | None = None
    """Which of its numbers run, where the sparsity is elastic."""

    def set_active(self, *, rows: Ranges | None = None, columns: Ranges | None = None) -> None:
        """Use these out and in features; with no in feature at all the output is zero, bias too."""
        self.rows = rows
        self.columns = columns

    @property
    def is_absent(self) -> bool:
        """Whether no in feature is left."""
        return self.columns == ()

    def active_weight(self) -> Tensor:
        """Return the active part of the weight, ``(O, I)``, with zeros where it is sparse."""
        weight = self.weight if self.mask is None else self.mask.of(self.weight)
        weight = weight.T if self.transposed else weight
        return take(take(weight, 0, self.rows), 1, self.columns)

    def active_bias(self) -> Tensor | None:
        """Return the active part of the bias, ``(O,)``."""
        return None if self.bias is None else take(self.bias, 0, self.rows)

    def forward(self, x: Tensor) -> Tensor:
        if self.columns == ():
            full = self.weight.shape[1 if self.transposed else 0]
            return x.new_zeros(*x.shape[:-1], length_of(self.rows, full))
        return nn.functional.linear(x, self.active_weight(), self.active_bias())


class ElasticLinear(_Sliced, nn.Linear):  # type: ignore[misc]
    """An `nn.Linear` of which a part is active."""


class ElasticConv1D(_Sliced, Conv1D):  # type: ignore[misc]
    """A transformers `Conv1D` (weight ``(I, O)``, as in GPT-2) of which a part is active."""

    transposed = True

    @property
    def in_features(self) -> int:
        """All in features."""
        return int(self.nx)

    @property
    def out_features(self) -> int:
        """All out features."""
        return int(self.nf)


class ElasticNorm(nn.Module):
    """A norm over the concatenated heads, of which a part is active."""

    rows: Ranges | None
    _plain_class: type[nn.Module]

    def set_active(self, *, rows: Ranges | None = None, columns: Ranges | None = None) -> None:
        """Norm these features."""
        self.rows = rows

    def forward(self, x: Tensor) -> Any:
        if self.rows is None:
            return super().forward(x)
        full = dict(self._parameters)
        try:
            for name, parameter in full.items():
                if parameter is not None:
                    self._parameters[name] = take(parameter, 0, self.rows)  # type: ignore[assignment]
            return super().forward(x)
        finally:
            self._parameters.update(full)


@cache
def _elastic_norm(plain: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": ElasticNorm.__module__}
    return type(f"Elastic{plain.__name__}", (ElasticNorm, plain), names)


ElasticSlices = ElasticLinear | ElasticConv1D | ElasticNorm


def can_slice(module: nn.Module) -> bool:
    """Tell whether a module is a plain linear layer, or an RMS norm of one weight per feature.

    Quantised layers are not: their weights are packed. Nor is `nn.LayerNorm`, which keeps its size
    in a second place.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return False
    is_norm = weight.dim() == 1 and not hasattr(module, "normalized_shape")
    return is_norm or isinstance(module, nn.Linear | Conv1D)


def make_sliceable(module: nn.Module) -> ElasticSlices:
    """Exchange the class of a linear layer or norm; all of it is active at first."""
    plain = type(module)
    if isinstance(module, Conv1D):
        module.__class__ = ElasticConv1D
    elif isinstance(module, nn.Linear):
        module.__class__ = ElasticLinear
    else:
        module.__class__ = _elastic_norm(plain)  # type: ignore[arg-type]
    module._plain_class = plain  # type: ignore[assignment]
    module.set_active()  # type: ignore[operator]
    return module  # type: ignore[return-value]


def unmake_sliceable(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, _Sliced | ElasticNorm):
        plain = module._plain_class
        for name in ("rows", "columns", "mask", "_plain_class"):
            module.__dict__.pop(name, None)
        module.__class__ = plain  # type: ignore[assignment]
