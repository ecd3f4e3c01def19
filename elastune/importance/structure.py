"""How much each head (key/value group) and each feed-forward channel of a model matters.

One score for each unit of a block's half (`elastune.models.blocks`), large = keep:

- ``wanda``: the norm of a unit's output columns times the norm of what flows into them, after Wanda
  (Sun et al. 2023, eq. 1): sqrt(sum_j ||W_:j||^2 ||x_j||^2) over the columns j of the unit in the
  projection that ends the half.
- ``taylor``: |sum_j sum_t x_tj dL/dx_tj| over the same columns and all tokens, the first-order
  change of the loss when the unit is removed (Molchanov et al. 2019).
- ``magnitude``: the L1 norm of the unit's rows in q, k, v or gate, up (MultiPruner, Munoz et al.
  2025). It takes no data, and it removes channels of massive activations.

Shapes: `N` rows, `L` tokens a row, `U` units of a half, `O` out features, `I` in features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.errors import BadData, BadRecipe, nearest
from elastune.heads import Head
from elastune.importance.base import Scores
from elastune.importance.passes import Batches, Passes, gradients_of
from elastune.linears import is_linear, weight_of
from elastune.models.blocks import PARTS, Block, Part, blocks

logger = logging.getLogger("elastune")

StructureMethod = Literal["wanda", "taylor", "magnitude"]
STRUCTURE_METHODS: tuple[StructureMethod, ...] = ("wanda", "taylor", "magnitude")

Tie = Literal["sum", "any"]
TIES: tuple[Tie, ...] = ("sum", "any")

UnitScores = dict[str, Tensor]
"""``layers.<block>.heads`` or ``layers.<block>.ffn`` -> float32 ``(U,)``; large = keep."""

Hook = Callable[[nn.Module, tuple[Any, ...]], Any]

_END_ROLES = ("o", "down")


def structure_scores(
    model: PreTrainedModel,
    inputs: Batches | None = None,
    method: StructureMethod = "wanda",
    *,
    head: Head | None = None,
    tokens_per_batch: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> UnitScores:
    """Score every head unit and every feed-forward channel of a model.

    The model is not changed. Activations of one batch are alive at a time; with ``taylor`` those of
    a training step with frozen weights.

    Args:
        model: of a known architecture, not yet elastic, or all of it active.
        inputs: token ids ``(N, L)`` without padding, or batches: as ``head.collate`` makes them
            where a head is given, else the keyword arguments of the model's forward (``taylor``:
            with labels). Positions that an ``attention_mask`` leaves out do not count. Magnitude
            reads none.
        method: one of `STRUCTURE_METHODS`.
        head: makes the loss of the batches.
        tokens_per_batch: of token ids, in one forward pass.
        progress: called with the number of batches done.

    Returns:
        Dim-like names -> float32 ``(U,)`` on the CPU. ``taylor`` is in nats per target where the
        targets can be counted (token ids, or a head), else in units of the summed loss.

    Raises:
        BadRecipe: unknown method.
        BadData: inputs are missing, empty, or have no loss that ``taylor`` could follow.
        UnsupportedModel: unknown family.
    """
    if method not in STRUCTURE_METHODS:
        known = ", ".join(STRUCTURE_METHODS)
        raise BadRecipe(
            f"unknown importance {method!r}{nearest(method, STRUCTURE_METHODS)}; known are {known}"
        )
    if method == "magnitude":
        logger.warning(
            "magnitude removes the few channels of massive activations first, which can destroy a "
            "language model; wanda and taylor look at the activations"
        )
        return _magnitude(model)
    if inputs is None:
        raise BadData(f"{method} needs calibration data", try_="give token ids, or use magnitude")
    passes = Passes(model, inputs, head, tokens_per_batch, progress)
    return _wanda(model, passes) if method == "wanda" else _taylor(model, passes)


def units_from_weights(model: PreTrainedModel, scores: Scores, tie: Tie = "sum") -> UnitScores:
    """Put scores of single weights together to scores of the units that consist of them.

    Args:
        model: that the weights belong to.
        scores: name of a weight -> ``(O, I)``, of any criterion. Weights without a score count
            nothing; halves without any score are left out of the result.
        tie: ``"sum"`` of the scores over a unit's rows and columns; ``"any"``: the largest of
            them, so that a unit outlives a threshold if any of its weights does (EFTNAS, section
            3.2). Rows that all units share, such as those of the one key of multi-query attention,
            tell no units apart: they add the same to every sum, and "any" passes them over.

    Raises:
        BadRecipe: unknown ``tie``.
        BadData: a name that is no weight of a block's projections, or another shape.
    """
    if tie not in TIES:
        raise BadRecipe(f"unknown tie {tie!r}{nearest(tie, TIES)}; known are {', '.join(TIES)}")
    found: UnitScores = {}
    used: set[str] = set()
    known = []
    for block in blocks(model):
        for part in PARTS:
            name = f"layers.{block.index}.{part}"
            for path, dim, table in unit_indices(block, part):
                weight = f"{block.name}.{path}.weight"
                module = block.module.get_submodule(path)
                known.append(weight)
                if weight not in scores or not is_linear(module):
                    continue
                used.add(weight)
                given, wanted = tuple(scores[weight].shape), tuple(weight_of(module).shape)
                if given != wanted:
                    raise BadData(f"the scores of {weight} are {given}, the weight is {wanted}")
                own = _tied(scores[weight].detach(), dim, table, tie)
                if name in found and own is not None:
                    own = found[name] + own if tie == "sum" else found[name].maximum(own)
                if own is not None:
                    found[name] = own
    unknown = [name for name in scores if name not in used]
    if unknown:
        raise BadData(
            f"{unknown[0]!r} is no weight of the model's attention or feed-forward"
            f"{nearest(unknown[0], known)}"
        )
    return found


def _tied(scores: Tensor, dim: Literal[0, 1], table: Tensor, tie: Tie) -> Tensor | None:
    """Put one weight's scores together by units, float32 ``(U,)``; None: all units share them."""
    if tie == "sum":
        return scores.float().sum(dim=1 - dim).cpu()[table].sum(dim=1)
    if len(table) > 1:
        table = table[:, (table != table[0]).any(dim=0)]
    if table.shape[1] == 0:
        return None
    return scores.float().amax(dim=1 - dim).cpu()[table].amax(dim=1)


def unit_indices(block: Block, part: Part) -> Iterator[tuple[str, Literal[0, 1], Tensor]]:
    """Yield path, dim and an index ``(U, k)``: the k rows (columns) of each unit in a module.

    Rows that all units share, such as the one key of multi-query attention, stand in each.
    """
    n = block.n_units(part)
    if part == "ffn":  # too many to ask for one by one; fused gate and up lie one after the other
        for path, dim, index in block.weights_of(part, torch.arange(n)):
            yield path, dim, index.view(-1, n).T
        return
    of_unit = [list(block.weights_of(part, torch.tensor([unit]))) for unit in range(n)]
    for same in zip(*of_unit, strict=True):
        yield same[0].path, same[0].dim, torch.stack([weights.index for weights in same])


@torch.no_grad()
def _magnitude(model: PreTrainedModel) -> UnitScores:
    return {name: score for block in blocks(model) for name, score in magnitude_of(block).items()}


def magnitude_of(block: Block) -> UnitScores:
    """Score the units of one block by magnitude."""
    found = {}
    for part in PARTS:
        total = torch.zeros(block.n_units(part))
        for path, dim, table in unit_indices(block, part):
            module = block.module.get_submodule(path)
            if dim == 0 and is_linear(module):
                norms = weight_of(module).float().abs().sum(dim=1).cpu()
                total += norms[table].sum(dim=1)
        found[f"layers.{block.index}.{part}"] = total
    return found


@torch.no_grad()
def _wanda(model: PreTrainedModel, passes: Passes) -> UnitScores:
    ends = list(unit_ends(model))
    squares: dict[str, Tensor] = {}

    def observer(name: str) -> Hook:
        def observe(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = passes.counted(args[0].reshape(-1, args[0].shape[-1]))
            new = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
            squares[name] = squares[name].add_(new) if name in squares else new

        return observe

    with ExitStack() as stack:
        for name, module, _ in ends:
            stack.callback(module.register_forward_pre_hook(observer(name)).remove)
        for batch in passes:
            passes.forward(batch)
    return {name: wanda_of(module, squares[name], table) for name, module, table in ends}


def wanda_of(end: nn.Module, squares: Tensor, table: Tensor) -> Tensor:
    """Score units by the projection that ends their half, and its inputs' summed squares."""
    columns = torch.linalg.vector_norm(weight_of(end), dim=0, dtype=torch.float32)
    return (columns.square() * squares).cpu()[table].sum(dim=1).sqrt()


def _taylor(model: PreTrainedModel, passes: Passes) -> UnitScores:
    ends = list(unit_ends(model))
    # dL/dg of a gate g = 1 on each column is the sum of x dL/dx over the tokens.
    gates = {
        name: torch.ones(table.numel(), device=weight_of(module).device, requires_grad=True)
        for name, module, table in ends
    }

    n_targets = 0
    with gradients_of(model, ()), torch.enable_grad(), ExitStack() as stack:
        for name, module, _ in ends:
            stack.callback(module.register_forward_pre_hook(gated(gates[name])).remove)
        for batch in passes:
            loss, targets = passes.loss(batch)
            loss.backward()
            n_targets += targets
    return {name: taylor_of(name, gates[name], n_targets, table) for name, _, table in ends}


def gated(gate: Tensor) -> Hook:
    """Return a hook that puts a gate ``(I,)`` on the columns of a layer's input."""

    def multiply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return ((args[0] * gate).to(args[0].dtype), *args[1:])

    return multiply


def taylor_of(name: str, gate: Tensor, n_targets: int, table: Tensor) -> Tensor:
    """Score units by the gradient of the gate on the columns that end their half."""
    if gate.grad is None:
        raise BadData(
            f"the loss does not depend on {name}",
            try_="a head whose loss uses it, or leave it out of the space",
        )
    return (gate.grad.cpu() / max(n_targets, 1))[table].sum(dim=1).abs()


def unit_ends(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield each half's name, the projection that ends it, and the units' columns ``(U, k)``."""
    for block in blocks(model):
        yield from block_ends(block)


def block_ends(block: Block) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield what `unit_ends` does, of one block."""
    ends = [block.record.roles[role] for role in _END_ROLES]
    for part in PARTS:
        path, table = next((p, t) for p, _, t in unit_indices(block, part) if p in ends)
        yield f"layers.{block.index}.{part}", block.module.get_submodule(path), table
