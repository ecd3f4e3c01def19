"""Elastic sparsity of a model: dims of kind ``density`` and the weights that follow them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastune.elastic.linear import (
    ElasticConv1D,
    ElasticLinear,
    can_slice,
    make_sliceable,
    unmake_sliceable,
)
from elastune.elastic.mask import DENSE, WeightLevels, WeightMask
from elastune.errors import InvalidSpace, nearest
from elastune.linears import in_features, is_transposed, out_features
from elastune.space import ElasticDim

_MAKE = "sparsity_levels(model, space, scores)"


class ElasticSparsity:
    """The weights of a model whose density can be switched; all of them are dense at first.

    Stock modules stay where they are; their classes are exchanged (`elastune.elastic.linear`).

    Args:
        model: changed in place.
        dims: of kind density, as `check_density` passes them.
        levels: of all their weights.
    """

    def __init__(self, model: nn.Module, dims: Sequence[ElasticDim], levels: WeightLevels) -> None:
        self._masks: dict[str, list[WeightMask]] = {}
        self._masked: list[Any] = []
        self._made: list[nn.Module] = []
        for dim in dims:
            masks = []
            for name in dim.modules:
                module: Any = model.get_submodule(name)
                if not isinstance(module, ElasticLinear | ElasticConv1D):
                    self._made.append(make_sliceable(module))
                weight = f"{name}.weight"
                found = levels.levels[weight].to(module.weight.device)
                stored = found.T.contiguous() if is_transposed(module) else found
                module.mask = WeightMask(stored, tuple(levels.densities[weight]))
                masks.append(module.mask)
                self._masked.append(module)
            self._masks[dim.name] = masks

    def set_active(self, dim: str, density: int) -> None:
        """Let ``density`` percent of the weights of every module of a dim run."""
        for mask in self._masks[dim]:
            mask.set_active(density)

    def release(self) -> None:
        """Give all modules their own classes back; their weights never changed."""
        for module in self._masked:
            module.mask = None
        for module in self._made:
            unmake_sliceable(module)


def mask_of(module: nn.Module) -> WeightMask | None:
    """Return the mask of a linear layer, if its sparsity is elastic."""
    found: WeightMask | None = getattr(module, "mask", None) if _is_elastic(module) else None
    return found


def _is_elastic(module: nn.Module) -> bool:
    return isinstance(module, ElasticLinear | ElasticConv1D)


def levels_of(module: nn.Module, mask: WeightMask) -> Tensor:
    """Return the levels of a layer's weight as ``(O, I)``."""
    return mask.levels.T if is_transposed(module) else mask.levels


def check_density(
    model: nn.Module,
    dims: Sequence[ElasticDim],
    levels: WeightLevels | None,
    prunable: Container[str],
) -> None:
    """Raise InvalidSpace unless the weights of all dims can have all their densities.

    Args:
        model: as it is before anything is elastic.
        dims: of kind density.
        levels: of the model's weights.
        prunable: names of the linear layers in the model's blocks.
    """
    seen: dict[str, str] = {}
    for dim in dims:
        if dim.choices[0] > DENSE or dim.choices[-1] < 1:
            raise InvalidSpace(
                f"{dim.name}: a density is a percentage, 1 to {DENSE}, got {dim.choices}",
                try_="parts of the weights as whole percentages, such as 100, 70, 50",
            )
        if levels is None:
            raise InvalidSpace(
                f"{dim.name}: nothing says which weights stay at which density",
                try_=f"SuperNetwork(..., levels={_MAKE})",
            )
        for name in dim.modules:
            other = seen.setdefault(name, dim.name)
            if other != dim.name or dim.modules.count(name) > 1:
                raise InvalidSpace(
                    f"{name} stands in two density dims: {other}, {dim.name}",
                    try_="each layer in one dim",
                )
            _check_module(model, dim, name, levels, prunable)


def _check_module(
    model: nn.Module,
    dim: ElasticDim,
    name: str,
    levels: WeightLevels,
    prunable: Container[str],
) -> None:
    """Raise InvalidSpace unless one module's weight can be masked by its levels."""
    if name not in prunable:
        known = [other for other, _ in model.named_modules() if other in prunable]
        raise InvalidSpace(
            f"{dim.name}: {name!r} is no linear layer in a block of the model{nearest(name, known)}"
        )
    module = model.get_submodule(name)
    if not can_slice(module):
        raise InvalidSpace(
            f"{dim.name}: {name} is a {type(module).__name__}, whose weights cannot be left out",
            try_="sparsity for layers that are not quantised",
        )
    weight = f"{name}.weight"
    shape = (out_features(module), in_features(module))
    found = levels.levels.get(weight)
    if found is None or weight not in levels.densities:
        raise InvalidSpace(f"{dim.name}: there are no levels of {weight}", try_=_MAKE)
    if found.dtype != torch.uint8 or tuple(found.shape) != shape:
        raise InvalidSpace(
            f"{dim.name}: the levels of {weight} are {found.dtype} of shape "
            f"{tuple(found.shape)}, they must be {torch.uint8} of shape {shape}",
            try_=_MAKE,
        )
    stored = {DENSE, *levels.densities[weight]}
    missing = [density for density in dim.choices if density not in stored]
    if missing:
        raise InvalidSpace(
            f"{dim.name}: the levels of {weight} were made for densities of "
            f"{', '.join(map(str, sorted(stored, reverse=True)))} %, not {missing[0]} %",
            try_=_MAKE,
        )
