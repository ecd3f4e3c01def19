"""Scores of heads and channels of a model that is not in memory, one block's weights at a time.

The same numbers as `structure_scores` and `fisher_scores` give in memory, for token ids. Those that
follow a loss recompute: forward, keeping what flows into each block; the loss from what flows out
of the last; then backward block by block, each block run again from its input.

Shapes: `N` rows, `L` tokens a row, `U` units of a half.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from elastune.calibrate import CalibrationBlock, calibration_blocks, standing_in
from elastune.errors import BadRecipe, nearest
from elastune.hidden_states import States, StatesOnDisk
from elastune.importance.fisher import row_gated
from elastune.importance.passes import Passes
from elastune.importance.structure import (
    UnitScores,
    block_ends,
    gated,
    magnitude_of,
    taylor_of,
    wanda_of,
)
from elastune.linears import weight_of
from elastune.models.architecture import Architecture
from elastune.models.blocks import Block, blocks
from elastune.models.families import architecture
from elastune.models.streamed import StreamedModel

StreamedMethod = Literal["wanda", "taylor", "magnitude", "fisher"]
STREAMED_METHODS: tuple[StreamedMethod, ...] = ("wanda", "taylor", "magnitude", "fisher")


def streamed_scores(
    streamed: StreamedModel,
    rows: Tensor | None = None,
    method: StreamedMethod = "wanda",
    *,
    tokens_per_batch: int = 2048,
    folder: Path | None = None,
) -> UnitScores:
    """Score every head unit and every feed-forward channel.

    Weights in memory: one block's, and what lies outside of the blocks. ``taylor`` and ``fisher``
    need a model made with ``whole_head``; fisher is scored once, as `fisher_scores` does.

    Args:
        rows: token ids ``(N, L)`` without padding; magnitude reads none.
        method: one of `STREAMED_METHODS`.
        tokens_per_batch: in one forward pass; as in memory, sums depend on it in their last bits.
        folder: an empty one for hidden states; without it they are in memory, of all blocks at
            once where a loss is followed.

    Returns:
        ``layers.<block>.heads|ffn`` -> float32 ``(U,)`` on the CPU.

    Raises:
        BadRecipe: unknown method, or no rows where they are needed.
        BadData: there is no loss to follow.
        UnsupportedModel: a model that text cannot calibrate.
    """
    if method not in STREAMED_METHODS:
        raise BadRecipe(
            f"unknown importance {method!r}{nearest(method, STREAMED_METHODS)}; "
            f"known are {', '.join(STREAMED_METHODS)}"
        )
    if method == "magnitude":
        return _magnitude(streamed)
    if rows is None:
        raise BadRecipe(f"{method} needs calibration text", try_="give it, or use magnitude")
    if method == "wanda":
        states = _states(folder, "hidden")
        parts = blocks(streamed.model)
        found: UnitScores = {}
        for stage in calibration_blocks(
            streamed.model,
            rows,
            tokens_per_batch=tokens_per_batch,
            resident=streamed.resident,
            states=states,
        ):
            found |= wanda_of_stage(stage, parts[stage.index])
        return found
    return _Backward(streamed, rows, tokens_per_batch, folder).scores(method)


@torch.no_grad()
def wanda_of_stage(stage: CalibrationBlock, block: Block) -> UnitScores:
    """Score one block's units by what flows through it; it is advanced."""
    squares: dict[str, Tensor] = {}

    def observe(roles: tuple[str, ...], x: Tensor) -> None:
        new = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
        role = roles[0]
        squares[role] = squares[role].add_(new) if role in squares else new

    stage.pass_through(observe)
    of_module = {id(stage.linears[role]): found for role, found in squares.items()}
    return {
        name: wanda_of(module, of_module[id(module)], table)
        for name, module, table in block_ends(block)
    }


@torch.no_grad()
def _magnitude(streamed: StreamedModel) -> UnitScores:
    found: UnitScores = {}
    for block in blocks(streamed.model):
        with streamed.resident(block.index):
            found |= magnitude_of(block)
    return found


def _states(folder: Path | None, name: str) -> States:
    return [] if folder is None else StatesOnDisk(folder, name)


class _HandOn(nn.Module):
    """Stands in for a block: gives the hidden states on, or those it was told instead."""

    def __init__(self, block: nn.Module, record: Architecture) -> None:
        super().__init__()
        self.returns_tuple = record.returns_tuple
        self.instead: Tensor | None = None
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden: Tensor, *_: object, **__: object) -> object:
        found = hidden if self.instead is None else self.instead
        return (found, None) if self.returns_tuple else found


class _Backward:
    """One pass forward through a streamed model, and one backward."""

    def __init__(
        self, streamed: StreamedModel, rows: Tensor, tokens_per_batch: int, folder: Path | None
    ) -> None:
        self.streamed = streamed
        self.model = streamed.model
        self.rows = rows
        self.tokens_per_batch = tokens_per_batch
        self.folder = folder
        self.stages: list[CalibrationBlock] = []
        self.inputs: list[States] = []
        """Of each block, what flows into it."""
        self.gradients: States = _states(folder, "gradient")
        """Of the loss with respect to what flows out of the block whose turn it is."""
        self.n_targets = 0

    def scores(self, method: StreamedMethod) -> UnitScores:
        """Return the scores of all units."""
        self._forward()
        self._loss()
        found: UnitScores = {}
        parts = blocks(self.model)
        with torch.enable_grad():
            for stage in reversed(self.stages):
                with self.streamed.resident(stage.index):
                    score = self._taylor if method == "taylor" else self._fisher
                    found = score(stage, parts[stage.index]) | found
        return found

    def _forward(self) -> None:
        outputs = _states(self.folder, "hidden")
        for stage in calibration_blocks(
            self.model,
            self.rows,
            tokens_per_batch=self.tokens_per_batch,
            resident=self.streamed.resident,
            states=outputs,
        ):
            kept = _states(self.folder, f"block-{stage.index}")
            for position in range(len(stage.inputs)):
                kept.append(stage.inputs[position])
            self.inputs.append(kept)
            self.stages.append(stage)
            stage.advance()
        self.outputs = outputs

    def _loss(self) -> None:
        """Begin the way back: from the loss to what flows out of the last block."""
        record = architecture(self.model)
        modules = record.blocks_of(self.model)
        others = [_HandOn(block, record) for block in modules]
        passes = Passes(self.model, self.rows, None, self.tokens_per_batch, None)
        with torch.enable_grad(), standing_in(modules, others):
            for position, batch in enumerate(passes):
                hidden = self.outputs[position].detach().requires_grad_()
                others[-1].instead = hidden
                loss, targets = passes.loss(batch)
                loss.backward()
                self.n_targets += targets
                assert hidden.grad is not None
                self.gradients.append(hidden.grad)

    def _back(self, stage: CalibrationBlock) -> Iterator[None]:
        """Run a block backward, batch by batch."""
        for position in range(len(self.gradients)):
            hidden = self.inputs[stage.index][position].detach().requires_grad_()
            torch.autograd.backward(stage.run(position, hidden), self.gradients[position])
            assert hidden.grad is not None
            self.gradients[position] = hidden.grad
            yield

    def _taylor(self, stage: CalibrationBlock, block: Block) -> UnitScores:
        ends = list(block_ends(block))
        gates = {
            name: torch.ones(table.numel(), device=weight_of(module).device, requires_grad=True)
            for name, module, table in ends
        }
        with ExitStack() as stack:
            for name, module, _ in ends:
                stack.callback(module.register_forward_pre_hook(gated(gates[name])).remove)
            for _ in self._back(stage):
                pass
        return {name: taylor_of(name, gates[name], self.n_targets, t) for name, _, t in ends}

    def _fisher(self, stage: CalibrationBlock, block: Block) -> UnitScores:
        gates: dict[str, Tensor] = {}
        found: UnitScores = {}
        with ExitStack() as stack:
            for name, module, table in block_ends(block):
                mask = torch.ones(len(table), device=weight_of(module).device)
                hook = row_gated(name, table, mask, gates)
                stack.callback(module.register_forward_pre_hook(hook).remove)
                found[name] = torch.zeros(len(table))
            for _ in self._back(stage):
                for name, gate in gates.items():
                    assert gate.grad is not None
                    found[name] += gate.grad.square().sum(dim=0).cpu()
        return {name: score / max(self.n_targets, 1) for name, score in found.items()}
