"""Run a model block by block over calibration tokens, seeing what each projection reads.

Each block is run on the outputs of the blocks before it *as they are by then*, so whatever was done
to earlier blocks (pruned, say) is seen by later ones. Only one block's activations are alive.

Shapes: `N` calibration rows, `L` tokens a row, `D` model, `I` in features of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.data import row_batches
from elastune.errors import UnsupportedModel
from elastune.linears import out_features
from elastune.models import architecture
from elastune.models.architecture import type_of

Observer = Callable[[tuple[str, ...], Tensor], None]
"""Receives the roles that read an input, and the input, ``(tokens, I)``."""


@dataclass
class CalibrationBlock:
    """One block, what flows into it, and its projections by role."""

    index: int
    name: str
    module: nn.Module
    linears: dict[str, Any]
    shared_inputs: tuple[tuple[str, ...], ...]
    _inputs: list[Tensor]
    _arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def observe(self, observer: Observer) -> None:
        """Run the block over all calibration rows, handing each projection's input on once.

        Projections that read the same tensor are reported together.
        """
        hooks = []
        for roles in self._readers():
            # The first of those that share an input speaks for all of them.
            def hook(_: nn.Module, args: tuple[Tensor, ...], roles: Any = roles) -> None:
                observer(roles, args[0].reshape(-1, args[0].shape[-1]))

            hooks.append(self.linears[roles[0]].register_forward_pre_hook(hook))
        # What the last projection of a block writes is of no use yet, and costs a quarter of the
        # pass: it is computed in `advance`, with whatever was done to the block by then.
        try:
            with _silent(self.linears.get("down")):
                for _ in self._run():
                    pass
        finally:
            for handle in hooks:
                handle.remove()

    def advance(self) -> None:
        """Replace what flows into the block by what flows out of it."""
        for position, output in enumerate(self._run()):
            self._inputs[position] = output

    def _readers(self) -> list[tuple[str, ...]]:
        """Group roles by the tensor they read."""
        groups = [tuple(r for r in roles if r in self.linears) for roles in self.shared_inputs]
        placed = {role for roles in groups for role in roles}
        groups += [(role,) for role in self.linears if role not in placed]
        return [roles for roles in groups if roles]

    def _run(self) -> Iterator[Tensor]:
        for hidden, (args, kwargs) in zip(self._inputs, self._arguments, strict=True):
            output = self.module(hidden, *args, **kwargs)
            yield output[0] if isinstance(output, tuple) else output


@contextmanager
def _silent(linear: Any) -> Iterator[None]:
    """Let a linear layer, where there is one, give zeros as long as the context lasts."""
    if linear is None:
        yield
        return
    width = out_features(linear)
    own_forward = vars(linear).get("forward")
    linear.forward = lambda x: x.new_zeros(*x.shape[:-1], width)
    try:
        yield
    finally:
        del linear.forward  # the class's own shows again
        if own_forward is not None:
            linear.forward = own_forward


class _Recorder(nn.Module):
    """Stands in for a block: notes what it was called with and hands the hidden states on."""

    def __init__(self, block: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden: list[Tensor] = []
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        self.hidden.append(hidden)
        return (hidden, None) if self.returns_tuple else hidden


@torch.inference_mode()
def calibration_blocks(
    model: PreTrainedModel, rows: Tensor, *, tokens_per_batch: int = 4096
) -> Iterator[CalibrationBlock]:
    """Yield the model's blocks in order; the caller may change each before asking for the next.

    The head is never run, and each block runs once for ``observe`` and once for ``advance``.

    Args:
        model: of a known architecture.
        rows: int64 token ids, ``(N, L)``.
        tokens_per_batch: tokens in one forward call.

    Raises:
        UnsupportedModel: unknown family, a model that reads no tokens, or one that changes the
            hidden states between two blocks.
    """
    record = architecture(model)
    if model.main_input_name != "input_ids":
        raise UnsupportedModel(
            f"models of type {type_of(model)!r} read {model.main_input_name}, so that text cannot "
            "calibrate them",
            try_="a method that takes no calibration, such as magnitude",
        )
    blocks = record.blocks_of(model)
    options = {"use_cache": False} if record.kind == "decoder" else {}
    batches = [batch.to(model.device) for batch in row_batches(rows, tokens_per_batch)]
    recorders = _record_calls(model, blocks, batches, options, record.returns_tuple)
    inputs = recorders[0].hidden
    held = record.linear_names(model)
    for index, (name, block) in enumerate(zip(record.block_names(model), blocks, strict=True)):
        paths = {r: path for r, path in record.roles.items() if f"{name}.{path}" in held}
        linears = {role: block.get_submodule(path) for role, path in paths.items()}
        stage = CalibrationBlock(
            index, name, block, linears, record.shared_inputs, inputs, recorders[index].calls
        )
        yield stage
        if index + 1 < len(blocks):
            stage.advance()


def _record_calls(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    batches: list[Tensor],
    options: dict[str, Any],
    returns_tuple: bool,
) -> list[_Recorder]:
    """Find the arguments of every block by running the model with recorders in their place.

    Blocks of one model may be called with different masks and rotary embeddings (sliding and full
    attention), so each has its own record.
    """
    originals = list(blocks)
    recorders = [_Recorder(block, returns_tuple) for block in originals]
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        for batch in batches:
            model.base_model(input_ids=batch, **options)
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
    for number, recorder in enumerate(recorders[1:], start=1):
        if recorder.hidden[0] is not recorders[0].hidden[0]:
            raise UnsupportedModel(
                f"this {type_of(model)!r} model changes the hidden states between blocks "
                f"{number - 1} and {number}, which block-by-block calibration would miss",
                try_="a method that takes no calibration, such as magnitude",
            )
        recorder.hidden = []
    return recorders
