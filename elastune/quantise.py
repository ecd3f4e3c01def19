"""Put the linear layers of a model's blocks on an INT4 grid, group by group, to nearest.

Scales and zero points are those of the package compressed-tensors, in whose format the result is
saved (`elastune.export.compressed`). Weights stay as float32 numbers that lie on the grid: what
trains on top reads them as they are, and zeros stay exactly zero.

Shapes: `O` out features, `I` in features, `G` groups.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.elastic.merge_rules import Int4Grid
from elastune.errors import BadArtifact, BadRecipe
from elastune.models import architecture

_FORMAT = "elastune-int4-grid-1"


@torch.no_grad()
def quantise_(model: PreTrainedModel, *, group_size: int = 64) -> dict[str, Int4Grid]:
    """Round the weights of all linear layers in a model's blocks, in place.

    Args:
        model: in float32.
        group_size: in features that share a scale and a zero point.

    Returns:
        Module name -> its grid.

    Raises:
        BadRecipe: compressed-tensors is missing, or a layer that cannot be quantised so.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise BadRecipe(
            "INT4 needs compressed-tensors, which is not installed",
            try_="pip install 'elastune[quantise]'",
        )
    names = architecture(model).linear_names(model)
    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        _check(name, layer, group_size)
    grids = {}
    for name, layer in layers.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        grid = grid_of(weight, group_size)
        weight.copy_(grid.nearest(weight))
        grids[name] = grid
    return grids


def grid_of(weight: Tensor, group_size: int) -> Int4Grid:
    """Return the grid from the least to the largest number of each group of ``(O, I)``."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    grouped = weight.detach().float().view(len(weight), -1, group_size)
    scale, zero_point = calculate_qparams(
        grouped.amin(-1),
        grouped.amax(-1),
        QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=group_size),
    )
    return Int4Grid(scale, zero_point.to(torch.int8))


def _check(name: str, layer: nn.Module, group_size: int) -> None:
    if not isinstance(layer, nn.Linear):
        raise BadRecipe(f"{name} is a {type(layer).__name__}: only nn.Linear can become INT4")
    if layer.weight.dtype != torch.float32:
        raise BadRecipe(
            f"{name} is {layer.weight.dtype}: the numbers of an INT4 grid are not exact in it",
            try_="dtype=float32",
        )
    if layer.in_features % group_size:
        raise BadRecipe(
            f"the {layer.in_features} inputs of {name} cannot be cut into groups of {group_size}",
            try_="another quantise.group_size, such as 32",
        )


def save_grids(path: Path, grids: Mapping[str, Int4Grid]) -> None:
    """Write grids, whole or not at all."""
    tensors = {}
    for name, grid in grids.items():
        tensors[f"{name}.scale"] = grid.scale.cpu().contiguous()
        tensors[f"{name}.zero_point"] = grid.zero_point.cpu().contiguous()
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata={"format": _FORMAT})
    partial.replace(path)


def load_grids(path: Path) -> dict[str, Int4Grid]:
    """Read what `save_grids` wrote.

    Raises:
        BadArtifact: missing, damaged, or a file of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadArtifact(
            f"the INT4 grid {path} cannot be read: {error}", try_="delete it and run again"
        ) from error
    if header.get("format") != _FORMAT:
        raise BadArtifact(f"{path} holds no INT4 grid", try_="delete it and run again")
    names = [name.removesuffix(".scale") for name in tensors if name.endswith(".scale")]
    return {n: Int4Grid(tensors[f"{n}.scale"], tensors[f"{n}.zero_point"]) for n in names}
