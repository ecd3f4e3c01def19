"""Run a model block by block over calibration tokens, seeing what each projection reads.

Each block is run on the outputs of the blocks before it *as they are by then*, so whatever was done
to earlier blocks (pruned, say) is seen by later ones. Only one block's activations are alive; of a
model that is streamed (`elastune.models.streamed`) only one block's weights, too.

Shapes: `N` calibration rows, `L` tokens a row, `D` model, `I` in features of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.data import row_batches
from elastune.errors import UnsupportedModel
from elastune.hidden_states import States
from elastune.linears import out_features
from elastune.models import architecture
from elastune.models.architecture import type_of

Observer = Callable[[tuple[str, ...], Tensor], None]
"""Receives the roles that read an input, and the input, ``(tokens, I)``."""

Resident = Callable[[int], AbstractContextManager[None]]
"""Keeps the weights of the block of a number in memory as long as its context lasts."""


def always(_: int) -> AbstractContextManager[None]:
    """Return the `Resident` of a model that is in memory whole."""
    return nullcontext()


@dataclass
class CalibrationBlock:
    """One block, what flows into it, and its projections by role."""

    index: int
    name: str
    module: nn.Module
    linears: dict[str, Any]
    shared_inputs: tuple[tuple[str, ...], ...]
    _inputs: States
    _arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    _is_advanced: bool = field(default=False, init=False)

    def observe(self, observer: Observer) -> None:
        """Run the block over all calibration rows, handing each projection's input on once.

        Projections that read the same tensor are reported together.
        """
        # What the last projection of a block writes is of no use yet, and costs a quarter of the
        # pass: it is computed in `advance`, with whatever was done to the block by then.
        with self._watched(observer), _silent(self.linears.get("down")):
            for _ in self._run():
                pass

    def pass_through(self, observer: Observer) -> None:
        """Observe and advance in one pass: for those who leave the block as it is till then."""
        with self._watched(observer):
            self.advance()

    def advance(self) -> None:
        """Replace what flows into the block by what flows out of it; once."""
        if self._is_advanced:
            return
        self._is_advanced = True
        for position, output in enumerate(self._run()):
            self._inputs[position] = output

    def run(self, position: int, hidden: Tensor) -> Tensor:
        """Run the block on the hidden states of one batch, ``(rows, L, D)``."""
        args, kwargs = self._arguments[position]
        output = self.module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @property
    def inputs(self) -> States:
        """What flows into the block, batch by batch; what flows out of it once it is advanced."""
        return self._inputs

    @contextmanager
    def _watched(self, observer: Observer) -> Iterator[None]:
        hooks = []
        for roles in self._readers():
            # The first of those that share an input speaks for all of them.
            def hook(_: nn.Module, args: tuple[Tensor, ...], roles: Any = roles) -> None:
                observer(roles, args[0].reshape(-1, args[0].shape[-1]))

            hooks.append(self.linears[roles[0]].register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _readers(self) -> list[tuple[str, ...]]:
        """Group roles by the tensor they read."""
        groups = [tuple(r for r in roles if r in self.linears) for roles in self.shared_inputs]
        placed = {role for roles in groups for role in roles}
        groups += [(role,) for role in self.linears if role not in placed]
        return [roles for roles in groups if roles]

    def _run(self) -> Iterator[Tensor]:
        for position in range(len(self._arguments)):
            yield self.run(position, self._inputs[position])


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
        self.hidden: Tensor | None = None
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        self.hidden = hidden
        return (hidden, None) if self.returns_tuple else hidden


@torch.no_grad()
def calibration_blocks(
    model: PreTrainedModel,
    rows: Tensor,
    *,
    tokens_per_batch: int = 4096,
    resident: Resident = always,
    states: States | None = None,
) -> Iterator[CalibrationBlock]:
    """Yield the model's blocks in order; the caller may change each before asking for the next.

    The head is never run, and each block runs once for ``observe`` and once for ``advance``.

    Args:
        model: of a known architecture.
        rows: int64 token ids, ``(N, L)``.
        tokens_per_batch: tokens in one forward call.
        resident: of a streamed model: a block's weights are needed from when it is yielded until
            the next one is asked for.
        states: where the hidden states between blocks are kept; empty. In memory by default.

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
    inputs: States = [] if states is None else states
    recorders = _record_calls(model, blocks, batches, options, record.returns_tuple, inputs)
    held = record.linear_names(model)
    for index, (name, block) in enumerate(zip(record.block_names(model), blocks, strict=True)):
        paths = {r: path for r, path in record.roles.items() if f"{name}.{path}" in held}
        linears = {role: block.get_submodule(path) for role, path in paths.items()}
        stage = CalibrationBlock(
            index, name, block, linears, record.shared_inputs, inputs, recorders[index].calls
        )
        with resident(index):
            yield stage
            if index + 1 < len(blocks):
                stage.advance()


def _record_calls(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    batches: list[Tensor],
    options: dict[str, Any],
    returns_tuple: bool,
    inputs: States,
) -> list[_Recorder]:
    """Find the arguments of every block by running the model with recorders in their place.

    Blocks of one model may be called with different masks and rotary embeddings (sliding and full
    attention), so each has its own record. ``inputs`` receives what flows into the first block.
    """
    recorders = [_Recorder(block, returns_tuple) for block in blocks]
    with standing_in(blocks, recorders):
        for batch in batches:
            model.base_model(input_ids=batch, **options)
            for number, recorder in enumerate(recorders[1:], start=1):
                if recorder.hidden is not recorders[0].hidden:
                    raise UnsupportedModel(
                        f"this {type_of(model)!r} model changes the hidden states between blocks "
                        f"{number - 1} and {number}, which block-by-block calibration would miss",
                        try_="a method that takes no calibration, such as magnitude",
                    )
            assert recorders[0].hidden is not None
            inputs.append(recorders[0].hidden)
    for recorder in recorders:
        recorder.hidden = None
    return recorders


@contextmanager
def standing_in(blocks: nn.ModuleList, others: Sequence[nn.Module]) -> Iterator[None]:
    """Put other modules in the place of a model's blocks as long as the context lasts."""
    originals = list(blocks)
    try:
        for index, other in enumerate(others):
            blocks[index] = other
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
