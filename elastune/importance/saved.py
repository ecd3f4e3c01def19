"""Scores in a safetensors file, with what they were made from in its header.

Scores that several weights share (`SharedScores`) are written once each, and read back in the shape
of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elastune.artifacts import versions
from elastune.errors import BadArtifact, BadData
from elastune.files import whole_file
from elastune.importance.base import Scores, SharedScores
from elastune.importance.scored_linear import Grid

_FORMAT = "elastune-scores-1"


def save_scores(
    path: str | Path, scores: Mapping[str, Tensor], made_from: Mapping[str, Any]
) -> None:
    """Write scores, whole or not at all.

    Args:
        path: of the file; what was there is replaced.
        scores: name -> scores of single weights or of units, written as float32.
        made_from: method, model, data, steps, seed and what else led to the scores, as JSON can
            say it; the versions of the libraries are added under ``versions``.

    Raises:
        BadData: ``made_from`` holds what JSON cannot say, or scores that are said to be shared
            differ.
    """
    blocks = scores.blocks if isinstance(scores, SharedScores) else {}
    tensors, shared = {}, {}
    for name, values in scores.items():
        tensor = values.detach().float()
        if name in blocks:
            grid = Grid(tuple(tensor.shape), blocks[name])  # type: ignore[arg-type]
            shared[name] = {"shape": grid.shape, "block": grid.block}
            tensor = _first_of_each(name, tensor, grid)
        tensors[name] = tensor.cpu().contiguous()
    try:
        told = json.dumps({"versions": versions(), **made_from})
    except (TypeError, ValueError) as error:
        raise BadData(
            f"what the scores were made from is not JSON: {error}",
            try_="strings, numbers, lists and mappings of them",
        ) from None
    header = {"format": _FORMAT, "made_from": told, "shared": json.dumps(shared)}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as partial:
        save_file(tensors, partial, metadata=header)


def load_scores(path: str | Path) -> tuple[Scores, dict[str, Any]]:
    """Read what `save_scores` wrote.

    Returns:
        The scores, in the shape that they were given in, and what they were made from. Shared ones
        are `SharedScores`; of whole rows and columns views that take no memory.

    Raises:
        BadArtifact: missing, damaged, or a file of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BadArtifact(f"{path} is missing", try_="run the stage that makes it") from None
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    if header.get("format") != _FORMAT:
        raise BadArtifact(
            f"{path} holds no importance scores: its format is {header.get('format')!r}, this "
            f"version reads {_FORMAT!r}",
            try_="delete it and run again to measure the importance anew",
        )
    try:
        made_from = dict(json.loads(header["made_from"]))
        shared = dict(json.loads(header["shared"]))
        grids = {n: Grid(tuple(g["shape"]), tuple(g["block"])) for n, g in shared.items()}
        if any(tuple(tensors[name].shape) != grid.size for name, grid in grids.items()):
            raise ValueError("shared scores are not as many as the header says")
        scores = tensors | {name: grid.expand(tensors[name]) for name, grid in grids.items()}
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise _damaged(path, error) from error
    if not grids:
        return scores, made_from
    return SharedScores(scores, {name: grid.block for name, grid in grids.items()}), made_from


def _first_of_each(name: str, scores: Tensor, grid: Grid) -> Tensor:
    """Return the one score of each structure, ``(R, C)``."""
    rows, columns = grid.block
    firsts = scores[::rows, ::columns]
    if not torch.equal(grid.expand(firsts), scores):
        raise BadData(f"the scores of {name} differ within blocks of {rows} x {columns} weights")
    return firsts


def _damaged(path: str | Path, error: Exception) -> BadArtifact:
    return BadArtifact(
        f"the scores {path} cannot be read: {type(error).__name__}: {error}",
        try_="delete it and run again to measure the importance anew",
    )
