"""Put the linear layers of a model's blocks on an INT4 grid, group by group.

To nearest, or column by column so that what is still to be rounded makes up for what was (GPTQ;
Frantar et al. 2022, algorithm 1), block by block through the blocks that are rounded already.
Scales and zero points are those of the package compressed-tensors, in whose format the result is
saved (`elastune.export.compressed`). Weights stay as float32 numbers that lie on the grid: what
trains on top reads them as they are, and zeros stay exactly zero.

Shapes: `O` out features, `I` in features, `G` groups.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.calibrate import calibration_blocks
from elastune.elastic.merge_rules import Int4Grid
from elastune.errors import BadArtifact, BadRecipe
from elastune.files import whole_file
from elastune.importance.sparsegpt import InputHessian
from elastune.models import architecture
from elastune.sparsify import gather

METHODS = ("rtn", "gptq")

_FORMAT = "elastune-int4-grid-1"


@torch.no_grad()
def quantise_(
    model: PreTrainedModel,
    method: str = "rtn",
    *,
    group_size: int = 64,
    calibration: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Int4Grid]:
    """Round the weights of all linear layers in a model's blocks, in place; zeros stay.

    Args:
        model: in float32.
        method: ``"rtn"``, to nearest; ``"gptq"`` keeps the layers' outputs as near as it can.
        group_size: in features that share a scale and a zero point.
        calibration: token ids ``(N, L)``, needed by ``gptq``.
        progress: called with (blocks done, blocks in all), by ``gptq``.

    Returns:
        Module name -> its grid.

    Raises:
        BadRecipe: an unknown method, text or compressed-tensors missing, or a layer that cannot be
            quantised so; the model is then as it was.
    """
    if method not in METHODS:
        raise BadRecipe(f"unknown quantiser {method!r}; known are {', '.join(METHODS)}")
    if method == "gptq" and calibration is None:
        raise BadRecipe("gptq needs calibration text", try_="give it, or use rtn")
    if importlib.util.find_spec("compressed_tensors") is None:
        raise BadRecipe(
            "INT4 needs compressed-tensors, which is not installed",
            try_="pip install 'elastune[quantise]'",
        )
    names = architecture(model).linear_names(model)
    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        _check(name, layer, group_size)
    if calibration is not None and method == "gptq":
        return _gptq(model, group_size, calibration, progress)
    grids = {}
    for name, layer in layers.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        grid = grid_of(weight, group_size)
        weight.copy_(grid.nearest(weight))
        grids[name] = grid
    return grids


def _gptq(
    model: PreTrainedModel,
    group_size: int,
    calibration: Tensor,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Int4Grid]:
    """Quantise block by block, each on the outputs of those that are quantised already."""
    record = architecture(model)
    n_blocks = len(record.blocks_of(model))
    grids = {}
    for block in calibration_blocks(model, calibration):
        inputs = gather(block, InputHessian)
        for role, linear in block.linears.items():
            hessian = cast(InputHessian, inputs[role])
            weight, grid = gptq_round(linear.weight, hessian, group_size)
            linear.weight.copy_(weight)
            grids[f"{block.name}.{record.roles[role]}"] = grid
        if progress is not None:
            progress(block.index + 1, n_blocks)
    return grids


def gptq_round(weight: Tensor, inputs: InputHessian, group_size: int) -> tuple[Tensor, Int4Grid]:
    """Round a weight column by column, each error made up for by the columns to the right.

    Args:
        weight: ``(O, I)``; its zeros stay.
        inputs: the Hessian of its inputs.
        group_size: in features that share a scale; each group's is chosen when its turn comes.

    Returns:
        The new weight, float32 ``(O, I)``, and its grid.
    """
    factor, _ = inputs.inverse_factor
    w = weight.detach().float().clone()
    kept = w != 0
    grids = []
    for start in range(0, w.shape[1], group_size):
        stop = start + group_size
        u = factor[start:stop, start:stop]
        block = w[:, start:stop]
        # What was made up for at a zero will be gone, and must not widen the grid.
        grid = grid_of(block * kept[:, start:stop], group_size)
        errors = torch.zeros_like(block)
        for j in range(group_size):
            rounded = grid.nearest(block[:, j, None])[:, 0] * kept[:, start + j]
            errors[:, j] = (block[:, j] - rounded) / u[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * u[j, None, j + 1 :]
            block[:, j] = rounded
        w[:, stop:] -= errors @ factor[start:stop, stop:]
        grids.append(grid)
    scale = torch.cat([grid.scale for grid in grids], 1)
    return w, Int4Grid(scale, torch.cat([grid.zero_point for grid in grids], 1))


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
        raise BadRecipe(
            f"{name} is a {type(layer).__name__}: only nn.Linear can become INT4",
            try_="leave the layer out of targets",
        )
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
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"format": _FORMAT})


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
