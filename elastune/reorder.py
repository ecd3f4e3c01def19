"""Sort heads and feed-forward channels by importance, so that the first are the best.

Elastic structure keeps prefixes; after reordering the prefixes are what matters most. The function
that the model computes is unchanged (EFTNAS, Munoz et al. 2024, section 3.2; MultiPruner).

Shapes: `U` units of a half of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastune.elastic.linear import can_slice
from elastune.errors import BadData, UnsupportedModel, nearest
from elastune.linears import is_transposed
from elastune.models.blocks import PARTS, Block, Part, blocks

Halves = Mapping[str, tuple[Block, Part]]
"""``layers.<block>.heads|ffn`` -> the block and which half of it."""


def halves_of(found: Iterable[Block]) -> Halves:
    """Return the halves of blocks by name."""
    return {f"layers.{block.index}.{part}": (block, part) for block in found for part in PARTS}


@torch.no_grad()
def reorder_(model: PreTrainedModel, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sort the units of every scored half, highest score first, in place.

    Whole units move: of attention key/value groups with their query heads, whose order inside the
    group stays. Zeros of sparse weights move with their weights. Heads of models whose positions
    belong to head numbers (ALiBi) stay where they are. Equal scores keep their order.

    Args:
        model: of a known architecture, without adapters. Do this before a super-network is made.
        scores: ``layers.<block>.heads`` and ``layers.<block>.ffn`` -> ``(U,)``, as
            `elastune.importance.structure_scores` returns. Halves without scores stay.

    Returns:
        What was moved: name -> int64 ``(U,)``, the unit that now stands at each place.

    Raises:
        BadData: an unknown name, another number of units, or a score that is not a number; the
            model is then as it was.
        UnsupportedModel: unknown family, or weights that cannot be moved (quantised, adapters).
    """
    halves = halves_of(blocks(model))
    orders = {name: _order(name, score, halves) for name, score in scores.items()}
    moved = {}
    for name, order in orders.items():  # before the first weight is moved
        block, part = halves[name]
        if part == "heads" and block.fixed_heads:
            continue
        _check(block, part)
        moved[name] = order
    for name, order in moved.items():
        _permute(*halves[name], order)
    return moved


def _order(name: str, score: Tensor, halves: Halves) -> Tensor:
    scored_half(name, score, halves)
    if bool(score.isnan().any()):
        raise BadData(
            f"{name}: {int(score.isnan().sum())} of {len(score)} scores are not a number",
            try_="other calibration batches; precision fp32 where a loss makes them",
        )
    return score.detach().cpu().argsort(descending=True, stable=True)


def scored_half(name: str, score: Tensor, halves: Halves) -> tuple[Block, Part]:
    """Return the half that scores are of.

    Raises:
        BadData: the model has no such half, or one of another number of units.
    """
    if name not in halves:
        raise BadData(
            f"there are scores for {name!r}, which the model does not have{nearest(name, halves)}",
            try_="names such as 'layers.0.heads' and 'layers.0.ffn'",
        )
    block, part = halves[name]
    n = block.n_units(part)
    if tuple(score.shape) != (n,):
        raise BadData(
            f"{name}: scores of shape {tuple(score.shape)} for {n} units",
            try_="structure_scores of this very model",
        )
    return block, part


def _check(block: Block, part: Part) -> None:
    for path, _, _ in block.weights_of(part, torch.arange(block.n_units(part))):
        module = block.module.get_submodule(path)
        if not can_slice(module):
            raise UnsupportedModel(
                f"{block.name}.{path} is a {type(module).__name__}, whose rows cannot be moved",
                try_="reorder the plain model, before adapters are added or it is quantised",
            )
        if getattr(module, "mask", None) is not None:
            raise UnsupportedModel(
                f"the sparsity of {block.name}.{path} is elastic: its weights would move, and what "
                "says which of them stay would not",
                try_="reorder the plain model, then sparsity_levels",
            )


def _permute(block: Block, part: Part, order: Tensor) -> None:
    before = block.weights_of(part, torch.arange(len(order)))
    after = block.weights_of(part, order)
    for (path, dim, to), (_, _, source) in zip(before, after, strict=True):
        module = block.module.get_submodule(path)
        for parameter in module.parameters(recurse=False):
            if dim == 1 and parameter.dim() == 1:
                continue  # the bias belongs to the out features
            # Transposed layers keep (in, out).
            axis = dim if parameter.dim() == 1 or not is_transposed(module) else 1 - dim
            at = parameter.device
            moved = parameter.index_select(axis, source.to(at))
            parameter.index_copy_(axis, to.to(at), moved)
